"""How an update responds to a change in the gradient's scale, for any betas, on the gradients of a real run.

A window of gradients is recorded before clipping, for elements drawn from every tensor. The moments for each pair of
betas are recomputed on it in float64, with the gradient's scale drifting, or with only the last gradient rescaled. The
change of the update's size is compared with theory (balanced_adam.gradient_scale): for a steady gradient, the case of
arXiv 2601.21739, and for one that is pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor

from train.analysis.plots import as_svg
from train.common.files import write_text

CHANGES = {
    "drift": (-1e-1, -3e-2, -1e-2, -3e-3, -1e-3, -3e-4, -1e-4, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "rescaled": (1 / 8, 1 / 4, 1 / 2, 2 ** (-1 / 4), 2 ** (1 / 4), 2.0, 4.0, 8.0),
}
"""drift: growth of the gradient's logarithm per step. rescaled: factor of the last gradient alone."""
NEAR = {"drift": (-1e-3, 1e-3), "rescaled": (2 ** (-1 / 4), 2 ** (1 / 4))}
"""The two values between which the slope is measured."""
STABLE = 10
"""Number of last steps over which a gradient's sign has to be stable; see :class:`Lag`."""
TICKS = {
    "drift": {"-0.1": -1e-1, "-0.01": -1e-2, "-0.001": -1e-3, "0.001": 1e-3, "0.01": 1e-2, "0.1": 1e-1},
    "rescaled": {"1/8": 1 / 8, "1/2": 1 / 2, "1": 1.0, "2": 2.0, "8": 8.0},
}
SHOWN = {0.25: "1/4", 0.5: "1/2", 1.0: "1", 2.0: "2", 4.0: "4"}


class Recording(NamedTuple):
    """Recorded gradients of some elements."""

    gradients: Tensor
    """(steps, elements), float32, before clipping."""
    layers: dict[str, slice]
    """The columns of each tensor, by its name."""


class Mean(NamedTuple):
    """A plain mean over the last so many steps, in place of an average with a beta (docs/theory.md)."""

    steps: int


Averages = tuple[float | Mean, float | Mean]
"""Of the first and of the second moment: beta1 and beta2, or means."""


def weights(average: float | Mean, steps: int) -> Tensor:
    """Return the weight of each step's gradient in an average with bias correction: (steps,), float64, in order."""
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    weight = (
        (ages < average.steps).double()
        if isinstance(average, Mean)
        else torch.tensor(average, dtype=torch.float64) ** ages
    )
    return weight / weight.sum()


def update_of(gradients: Tensor, betas: Averages, scales: Tensor) -> Tensor:
    """Return the update, step / lr without eps, after these gradients: (elements,), float64.

    The moments start at zero, with bias correction. The update is 0 where all gradients are 0.

    Args:
        gradients: (steps, elements), float64.
        betas: beta1 and beta2.
        scales: (steps,), float64; each step's gradient is multiplied by its scale.
    """
    first, second = (weights(beta, len(gradients)) for beta in betas)
    m, v = (first * scales) @ gradients, (second * scales**2) @ gradients**2
    return torch.where(v > 0.0, m / v.sqrt(), 0.0)


def changed(steps: int, kind: str, value: float) -> Tensor:
    """Return the scale of each step, (steps,), float64.

    With ``kind`` "drift" the scale grows by e^value per step and is 1 at the last one. Otherwise it is 1, and ``value``
    at the last step.
    """
    scales = torch.ones(steps, dtype=torch.float64)
    if kind == "drift":
        return torch.exp(value * torch.arange(1 - steps, 1, dtype=torch.float64))
    scales[-1] = value
    return scales


def of_steady(betas: Averages, scales: Tensor) -> float:
    """Return the size of the update for a gradient that is constant but for these scales, (steps,).

    For many steps and a drifting scale this is :func:`balanced_adam.gradient_scale.update_under_drift`.
    """
    first, second = (weights(beta, len(scales)) for beta in betas)
    return float(first @ scales / (second @ scales**2).sqrt())


def of_noise(betas: Averages, scales: Tensor) -> float:
    """Return the root of E[m^2] / E[v] for a gradient that is independent noise of mean 0 with these scales, (steps,).

    For many steps and a drifting scale this is :func:`balanced_adam.gradient_scale.update_of_noise_under_drift`.
    """
    first, second = (weights(beta, len(scales)) for beta in betas)
    return float((first**2 @ scales**2 / (second @ scales**2)).sqrt())


def measure(recording: Recording, betas: Averages) -> pd.DataFrame:
    """Return one row for each layer and for "all" layers, each kind of change and each value of it.

    ``size`` is the norm of the changed update over that of the unchanged one, and ``cosine`` the cosine of the angle
    between them. ``steady`` and ``noise`` are what the size would be, on as many steps, for a gradient that is constant
    or pure noise.
    """
    gradients = recording.gradients.double()
    steps = len(gradients)
    unchanged = torch.ones(steps, dtype=torch.float64)
    base = update_of(gradients, betas, unchanged)
    places = {"all": slice(None), **recording.layers}
    rows = []
    for kind, values in CHANGES.items():
        for value in values:
            scales = changed(steps, kind, value)
            update = update_of(gradients, betas, scales)
            steady, noise = (form(betas, scales) / form(betas, unchanged) for form in (of_steady, of_noise))
            for layer, place in places.items():
                ours, right = update[place], base[place]
                size, cosine = ours.norm() / right.norm(), (ours @ right) / (ours.norm() * right.norm())
                rows.append((layer, kind, value, float(size), float(cosine), steady, noise))
    return pd.DataFrame(rows, columns=["layer", "kind", "value", "size", "cosine", "steady", "noise"])


def slopes(rows: pd.DataFrame, kind: str) -> pd.Series:
    """Return the slopes of ``size``, ``steady`` and ``noise`` of a :func:`measure`, over all elements.

    A slope is the derivative of the logarithm of the size between the two values in NEAR: by the drift, in steps, or by
    the logarithm of the last gradient's scale.
    """
    here = rows[(rows["layer"] == "all") & (rows["kind"] == kind)].set_index("value")[["size", "steady", "noise"]]
    low, high = NEAR[kind]
    return (here.loc[high] / here.loc[low]).map(math.log) / (high - low if kind == "drift" else math.log(high / low))


def signal_share(recording: Recording) -> float:
    """Return the share of the gradients' mean square that is due to their mean over the window, estimated without bias.

    It is 1 for a constant gradient and 0 for noise.
    """
    gradients = recording.gradients.double()
    noise = gradients.var(dim=0)
    return float(((gradients**2).mean(dim=0) - noise).sum() / (gradients**2).mean(dim=0).sum())


class Lag(NamedTuple):
    """The magnitude-lag decomposition of arXiv 2601.21739 (version 2), m̂ / √v̂ = S + L + E.

    Here S = sign(g) and L = S (EMA1[log |g|] - EMA2[log |g|]). It is taken over the elements whose gradient has kept
    its sign for the last STABLE steps and is nowhere 0. The averages use the complete recording, since ten steps alone
    hold little of an average with a beta of 0.999.
    """

    share: float
    """Fraction of all elements that the decomposition covers."""
    lag: float
    """Root mean square of L."""
    rest: float
    """Root mean square of E."""
    r_squared: float
    """1 - Var(S E) / Var(S R) over these elements, with R = m̂ / √v̂: what L explains with its factor of 1 in the
    decomposition. It may be negative. NaN if L is 0 throughout, as with equal betas."""
    correlation: float
    """Squared correlation of S L and S R: what L would explain with the best factor."""


def magnitude_lag(recording: Recording, betas: Averages) -> Lag:
    """Decompose the update at the last step of the recording."""
    gradients = recording.gradients.double()
    last = gradients[-STABLE:]
    stable = (torch.sign(last).sum(dim=0).abs() == len(last)) & (gradients != 0.0).all(dim=0)
    g = gradients[:, stable]
    sign, logs = torch.sign(g[-1]), g.abs().log()
    first, second = (weights(beta, len(g)) for beta in betas)
    away = sign * update_of(g, betas, torch.ones(len(g), dtype=torch.float64)) - 1.0
    lag = first @ logs - second @ logs
    share, rest = g.shape[1] / gradients.shape[1], away - lag
    explained = together = math.nan
    if betas[0] != betas[1] and g.shape[1] > 1:
        explained = float(1.0 - rest.var() / away.var())
        together = float(torch.corrcoef(torch.stack([away, lag]))[0, 1] ** 2)
    return Lag(share, float((lag**2).mean().sqrt()), float((rest**2).mean().sqrt()), explained, together)


def near_eps(recording: Recording, average: float | Mean) -> float:
    """Return the share of the elements in which eps = 1e-8, the optimizer's default, is more than 1 % of √v̂.

    There the theory, which has no eps, does not describe the update. The gradients are those before clipping; in a run
    that clips, v is smaller and the share larger.
    """
    gradients = recording.gradients.double()
    v = weights(average, len(gradients)) @ gradients**2
    return float((v.sqrt() < 100.0 * 1e-8).double().mean())


def write(out: Path, pairs: dict[str, Averages], recordings: Iterator[tuple[int, Recording]]) -> None:
    """Write response.md, response.csv, and a figure for each kind of change at the last step.

    Args:
        out: the folder to write to.
        pairs: pairs of betas, by label.
        recordings: steps, and the gradients recorded up to each.
    """
    tables, lines, last = [], [], pd.DataFrame()
    for step, recording in recordings:
        share = signal_share(recording)
        for label, betas in pairs.items():
            rows = measure(recording, betas)
            rows.insert(0, "betas", label)
            rows.insert(0, "step", step)
            tables.append(rows)
            drift, rescaled = slopes(rows, "drift"), slopes(rows, "rescaled")
            lag = magnitude_lag(recording, betas)
            lines.append(
                f"| {step} | {label} | {share:.2f} "
                f"| {drift['size']:+.2f} | {drift['steady']:+.2f} | {drift['noise']:+.2f} "
                f"| {rescaled['size']:+.4f} | {rescaled['steady']:+.4f} | {rescaled['noise']:+.4f} "
                f"| {lag.share:.2%} | {lag.lag:.3f} | {lag.rest:.3f} | {lag.r_squared:.2f} | {lag.correlation:.2f} "
                f"| {near_eps(recording, betas[1]):.2%} |"
            )
        last = pd.concat(tables[-len(pairs) :])
    head = (
        "| step | betas | signal | drift: slope | if steady | if noise | rescaled: slope | if steady | if noise "
        "| stable for 10 steps | L | E | R² | r² | near eps |\n|" + "---|" * 15
    )
    text = "\n".join([head, *lines]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "response.md", text)
    write_text(out / "response.csv", pd.concat(tables).to_csv(index=False, float_format="%.6g"))
    for kind in CHANGES:
        write_text(out / f"{kind}.svg", figure(last, kind))
    print(text)


def figure(rows: pd.DataFrame, kind: str) -> str:
    """Plot the update's size over the change, one plot for each pair of betas, as SVG.

    The measured size is shown with what it would be for a steady gradient and for noise.
    """
    rows = rows[(rows["layer"] == "all") & (rows["kind"] == kind)]
    labels = list(rows["betas"].unique())
    canvas, axes = plt.subplots(
        1, len(labels), figsize=(3.2 * len(labels), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for place, label in zip(axes[0], labels, strict=True):
        here = rows[rows["betas"] == label].sort_values("value")
        place.plot(here["value"], here["steady"], label="steady gradient", linewidth=1.2)
        place.plot(here["value"], here["noise"], label="noise", linewidth=1.2, linestyle="--")
        place.plot(here["value"], here["size"], "o", label="measured", markersize=3.5, color="black")
        place.set_title(f"({label})", fontsize=10)
        place.set_yscale("log")
        place.set_yticks(list(SHOWN), list(SHOWN.values()))
        place.set_ylim(min(SHOWN), max(SHOWN))  # a gradient that shrinks faster than the averages decay leaves the plot
        place.set_xscale("symlog", linthresh=1e-3) if kind == "drift" else place.set_xscale("log")
        place.set_xticks(list(TICKS[kind].values()), list(TICKS[kind]), fontsize=8)
        place.minorticks_off()
        place.set_xlabel("drift rho per step" if kind == "drift" else "scale of the last gradient")
        place.spines[["top", "right"]].set_visible(False)
        place.grid(alpha=0.25)
    axes[0][0].set_ylabel("size of the update")
    axes[0][0].legend(frameon=False, fontsize=7)
    return as_svg(canvas)
