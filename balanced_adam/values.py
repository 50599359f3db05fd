"""Values that a user or a file gives: what counts as a number, and how a value is shown in a sentence."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def as_float(value: Any) -> float:
    """A real number as a float.

    Raises:
        TypeError: if it is none. A string is none, though YAML reads 1e-4 as one, and neither is True.
        OverflowError: if no float is as large.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool and not value.is_complex():
        return float(value)  # torch's Adam may have betas that are tensors
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{shown(value)} is no number")
    return float(value)


def shown(value: Any) -> str:
    """A value in one line that is not long."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
