"""The state of one parameter, in any format: fp32 moments ``exp_avg`` and ``exp_avg_sq``, or ``packed`` words of
both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from balanced_adam import bias_correction, dtensor, packed, rule
from balanced_adam.values import as_float, shown

FORMATS = ("fp32", *packed.FORMATS)
"""What ``BalancedAdam(state=...)`` may be."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MAXIMUM = "max_exp_avg_sq"
"""The greatest second moment so far, which AMSGrad has beside them."""
PACKED = "packed"
TENSORS = (*MOMENTS, PACKED)

State = dict[str, Any]
CAST = (
    "the packed moments were words of another dtype, and something has made numbers of bfloat16 of them: what they "
    "were is lost."
)


def moment_tensors(state: State) -> dict[str, Tensor]:
    """The tensors that hold the moments, by name: two moments, or the words."""
    return {name: state[name] for name in TENSORS if name in state}


def maximum(state: State) -> dict[str, Tensor]:
    """AMSGrad's maximum by its name, if there is one; torch's Adam may have left one that nobody uses."""
    return {name: state[name] for name in (MAXIMUM,) if isinstance(state.get(name), Tensor)}


def moments(state: State) -> tuple[Tensor, Tensor]:
    """m and v; decoded from words if need be."""
    if "exp_avg" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    m, v = packed.unpack(dtensor.local(state[PACKED]))
    return dtensor.placed_as(state[PACKED], m), dtensor.placed_as(state[PACKED], v)


def convert_(format: str, state: State, param: Tensor) -> int:
    """Make, or change, a parameter's state in place so that it is in this format.

    Words of another format are decoded first. Moments that are there beside words are newer: DeepSpeed puts them there
    when it loads a universal checkpoint. Nothing is lost if there is no memory for it.

    Returns:
        The number of elements of loaded moments whose m was beyond what the format holds, and is cut off: |m| above √v,
        as unequal betas make it, or in packed8 above 0.91 times the root of the w that is stored.
    """
    known = packed.FORMATS.get(format)
    loaded = "exp_avg" in state
    if PACKED in state and state[PACKED].dtype not in packed.BY_WORD:
        raise ValueError(
            f"the packed moments of a parameter of shape {tuple(param.shape)} are {state[PACKED].dtype}, which no "
            "format has: something has cast them, and what they were is lost."
        )
    if PACKED in state and state[PACKED].dtype == torch.int16:  # of an older file
        state[PACKED] = dtensor.placed_as(param, dtensor.local(state[PACKED]).view(torch.bfloat16))
    if not loaded and PACKED not in state:
        dtypes = dict.fromkeys(MOMENTS, rule.moments_dtype(param.dtype)) if known is None else {PACKED: known.word}
        for name, dtype in dtypes.items():
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return 0
    if known is None:
        if not loaded:
            decoded = packed.unpack(dtensor.local(state[PACKED]))
            placed = [dtensor.placed_as(param, value.to(rule.moments_dtype(param.dtype))) for value in decoded]
            state.update(zip(MOMENTS, placed, strict=True))
        state.pop(PACKED, None)
        return 0
    if not loaded and state[PACKED].dtype == known.word:
        return 0
    if not loaded and packed.is_cast(dtensor.local(state[PACKED])):
        raise ValueError(CAST)
    source = [dtensor.local(state[name]) for name in (MOMENTS if loaded else (PACKED,))]
    own = dtensor.local(param.detach())
    # In logical order, whatever the parameter's: only of a contiguous tensor are the parts views.
    words, cut = torch.empty(own.shape, dtype=known.word, device=own.device), 0
    # Part by part: the oracle's intermediate results take eighty bytes an element.
    whole = (words, own, *source)
    for target, weights, *values in zip(*(t.reshape(-1).split(2**20) for t in whole), strict=True):
        exp_avg, exp_avg_sq = (v.to(torch.float32) for v in values) if loaded else packed.unpack(values[0])
        # As a step would round them, if not by a gradient; moments that have come from words are those words again.
        numbers = packed.dither(weights.to(torch.float32), exp_avg, int(state["step"]))
        target.copy_(packed.pack(known, exp_avg, exp_avg_sq, numbers))
        if loaded:
            cut += int(packed.beyond(target, exp_avg).sum())
    state[PACKED] = dtensor.placed_as(param, words)
    for name in MOMENTS:
        state.pop(name, None)
    return cut


def format_of(state: State) -> str | None:
    """The format that a parameter's state is in; None if it has none yet, or one that isn't known."""
    if "exp_avg" in state:
        return "fp32"
    return (
        packed.BY_WORD[state[PACKED].dtype].name if PACKED in state and state[PACKED].dtype in packed.BY_WORD else None
    )


def check_loaded(format: Any, group: list[State], betas: tuple[float, float]) -> None:
    """See that the loaded states of a group's parameters can be read, and are what they are called.

    A group may hold several formats: that of a run that ended while it changed to the one that its group is called by.

    Raises:
        ValueError: if it is called by an unknown format, or by one that none of its states has, or one of them lacks
            something.
    """
    if format not in FORMATS:
        raise ValueError(
            f"the loaded state is in the format {shown(format)}; this version of BalancedAdam reads "
            f"{', '.join(FORMATS)}."
        )
    for state in group:
        if not isinstance(state, dict):
            raise ValueError(f"the loaded state of a parameter is {shown(state)}; it must be a dict.")
        check_counts(state, betas)
        for name, tensor in moment_tensors(state).items():
            if (
                not isinstance(tensor, Tensor)
                or tensor.layout != torch.strided
                or tensor.is_meta
                or tensor.is_complex()
            ):
                raise ValueError(f"the loaded {name} is {_kind(tensor)}; it must be a dense tensor of real numbers.")
        if PACKED in state and state[PACKED].dtype not in packed.BY_WORD:
            raise ValueError(
                f"the loaded state has packed moments of {state[PACKED].dtype}, which no format has; it is damaged."
            )
        if PACKED in state and packed.is_cast(dtensor.local(state[PACKED])):
            raise ValueError(CAST)
        begun = bool(state.keys() - {"step", bias_correction.EXCESS}) or float(state.get("step", 0)) > 0
        whole = "step" in state and (
            all(name in state for name in MOMENTS) or (PACKED in state and not state.keys() & {*MOMENTS})
        )
        if begun and not whole:
            raise ValueError(
                f"the loaded state of a parameter has {list(state)}; it must have 'step', and either "
                f"{' and '.join(map(repr, MOMENTS))} or {PACKED!r}: it is damaged, or another optimizer's."
            )
        if "exp_avg_sq" in state and bool((dtensor.local(state["exp_avg_sq"]) < 0).any()):
            raise ValueError(
                "the loaded exp_avg_sq has negative elements, which no average of squares has; it is damaged."
            )
    found = dict.fromkeys(filter(None, map(format_of, group)))
    if found and format not in found:
        raise ValueError(
            f"the loaded state is called {format}, and what it holds is {', '.join(found)}; it is damaged."
        )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"


def check_counts(state: State, betas: tuple[float, float]) -> None:
    """See that a loaded state's step count and product of betas are such.

    Raises:
        ValueError: naming the one that isn't, and its value.
    """
    try:
        step = as_float(state.get("step", 0))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        step = math.nan
    if not (0.0 <= step < math.inf and step.is_integer()):
        raise ValueError(f"step is {shown(state['step'])} in the loaded state; it must be a whole number, at least 0.")
    try:
        excess = as_float(state.get(bias_correction.EXCESS, 0.0))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        excess = math.nan
    if not isinstance(state.get(bias_correction.LOG_PRODUCT, 0.0), int | float):
        raise ValueError(
            f"{bias_correction.LOG_PRODUCT} is {shown(state[bias_correction.LOG_PRODUCT])} in the loaded state, not a "
            "number: a flattened state dict of torch.distributed.checkpoint can't hold it."
        )
    logarithm = bias_correction.from_excess(excess, betas, int(step))
    if not (
        math.isfinite(excess)
        and (logarithm < 0.0 or (step == 0 and excess == 0.0) or logarithm == bias_correction.UNKNOWN)
    ):
        raise ValueError(
            f"{bias_correction.EXCESS} is {shown(state[bias_correction.EXCESS])} in the loaded state at step "
            f"{step:.0f}; it does not make a product of betas."
        )


def unpacked(saved: Any) -> Any:
    """A copy of an optimizer's ``state_dict()`` with fp32 moments in place of words, which ``torch.optim.AdamW`` loads.

    The state dict may lie anywhere within ``saved``, so that a whole file of a DeepSpeed checkpoint will do. Going
    back, words that have not changed meanwhile are the same again.
    """
    if isinstance(saved, list):
        return [unpacked(item) for item in saved]
    if not isinstance(saved, dict):
        return saved
    copy = {key: unpacked(value) for key, value in saved.items()}
    if "step" in saved and isinstance(saved.get(PACKED), Tensor):  # not a parameter of this name
        copy |= zip(MOMENTS, moments(saved), strict=True)
        del copy[PACKED]
    if isinstance(saved.get("param_groups"), list):
        copy["param_groups"] = [
            {**group, "state": "fp32"} if "state" in group else group for group in copy["param_groups"]
        ]
    return copy
