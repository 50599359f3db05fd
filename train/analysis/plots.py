"""Figures as reproducible SVG, with text as text, and tables as Markdown."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "report"}


def as_svg(figure: Any) -> str:
    """Return the figure as SVG and close it. Axes with labelled lines get a legend."""
    for axes in figure.axes:
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    plt.close(figure)
    return svg.getvalue()


def as_url(svg: str) -> str:
    """Return the image as a data URL for an HTML page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table. The keys of the first row are the header."""
    lines = [" | ".join(row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in [" | ".join(rows[0]), "|".join(["---"] * len(rows[0])), *lines])
