"""The state of one parameter, in any format: fp32 moments ``exp_avg`` and ``exp_avg_sq``, or ``packed`` words of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from balanced_adam import packed, rule

FORMATS = ("fp32", *packed.FORMATS)
"""What ``BalancedAdam(state=...)`` may be."""
MOMENTS = ("exp_avg", "exp_avg_sq")
WORDS = "packed"
TENSORS = (*MOMENTS, WORDS)

State = dict[str, Any]


def moments(state: State) -> tuple[Tensor, Tensor]:
    """m and v; decoded from words if need be."""
    if WORDS in state:
        return packed.unpack(state[WORDS])
    return state["exp_avg"], state["exp_avg_sq"]


def bring_to(format: str, state: State, param: Tensor) -> int:
    """Make, or change, a parameter's state in place so that it is in this format.

    Words of another format are decoded first. Moments that are there beside words are newer: DeepSpeed puts them there when it
    loads a universal checkpoint.

    Returns:
        The number of elements whose |m| was above √v, where packing has cut it off.
    """
    known = packed.FORMATS.get(format)
    if "exp_avg" in state:
        state.pop(WORDS, None)
    elif WORDS in state:
        if known is not None and state[WORDS].dtype == known.word:
            return 0
        state["exp_avg"], state["exp_avg_sq"] = packed.unpack(state.pop(WORDS))
    else:
        dtypes = dict.fromkeys(MOMENTS, rule.moments_dtype(param.dtype)) if known is None else {WORDS: known.word}
        for name, dtype in dtypes.items():
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return 0
    if known is None:
        return 0
    exp_avg, exp_avg_sq = (state.pop(name).to(torch.float32) for name in MOMENTS)
    # As a step would round them, if not by a gradient; moments that have come from words are those words again.
    numbers = packed.dither(param.detach().to(torch.float32), exp_avg, int(state["step"]))
    state[WORDS] = packed.pack(known, exp_avg, exp_avg_sq, numbers)
    # Beyond what rounding explains.
    return int((exp_avg.abs() > rule.root(exp_avg_sq) * (1.0 + 1e-3) + known.w_floor**0.5).sum())


def check_loaded(format: Any, state: State) -> None:
    """See that a loaded state can be read.

    Raises:
        ValueError: if it is in a format that isn't known, or not in the one that it is said to be in.
    """
    if WORDS not in state:
        return
    if format not in packed.FORMATS:
        raise ValueError(
            f"the loaded state is in the format {format!r}; this version of BalancedAdam reads {', '.join(FORMATS)}."
        )
    if state[WORDS].dtype != packed.FORMATS[format].word:
        raise ValueError(
            f"the loaded state is said to be {format}, whose words are {packed.FORMATS[format].word}, and they are "
            f"{state[WORDS].dtype}; it is damaged."
        )


def unpacked(saved: Any) -> Any:
    """A copy of an optimizer's ``state_dict()`` with fp32 moments in place of words, which ``torch.optim.AdamW`` loads.

    The state dict may lie anywhere within ``saved``, so that a whole file of a DeepSpeed checkpoint will do. Going back, words
    that have not changed meanwhile are the same again.
    """
    if isinstance(saved, list):
        return [unpacked(item) for item in saved]
    if not isinstance(saved, dict):
        return saved
    copy = {key: unpacked(value) for key, value in saved.items() if key != WORDS}
    if isinstance(saved.get(WORDS), Tensor):
        copy |= zip(MOMENTS, packed.unpack(saved[WORDS]), strict=True)
    if isinstance(saved.get("param_groups"), list):
        copy["param_groups"] = [
            {**group, "state": "fp32"} if "state" in group else group for group in copy["param_groups"]
        ]
    return copy
