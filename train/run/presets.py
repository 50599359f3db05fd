"""The shapes of the models that ``--model`` takes by name."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """The shape of a Llama model."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    """Fewer than heads: grouped-query attention (arXiv 2305.13245)."""
    inner: int
    """Width of the feed-forward layers."""
    positions: int
    tied: bool
    """Whether the output embedding is the input embedding."""
    multiple: int
    """The embedding's rows are a multiple of this: GPUs multiply such matrices faster."""


PRESETS = {
    "tiny": Shape(128, 2, 4, 4, 352, 1024, True, 1),  # 0.45 M parameters with the byte tokenizer
    "small": Shape(384, 6, 6, 6, 1024, 2048, True, 1),  # 10.8 M
    "124m": Shape(768, 12, 12, 12, 2048, 2048, True, 128),  # this and the following: sizes with 50 000 tokens
    "350m": Shape(1024, 24, 16, 16, 2736, 2048, True, 128),
    "1.3b": Shape(2048, 24, 32, 32, 5504, 4096, False, 128),
    "3b": Shape(3072, 28, 24, 8, 8192, 8192, True, 128),
    "7b": Shape(4096, 32, 32, 8, 14336, 8192, False, 128),
}
LARGE = tuple(name for name in PRESETS if name not in ("tiny", "small"))
