"""Checks of BalancedAdam's arguments, of its groups' settings, and of settings that a checkpoint brings."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from balanced_adam import bias_correction, dtensor, rule
from balanced_adam import state as states
from balanced_adam.warn import warn_once

Betas = float | tuple[float, float]
SWITCHES = ("allow_unbalanced", "fused", "capturable", "fused_zero")
"""Settings of the optimizer, not of its groups; no checkpoint holds them."""


def check_switches(defaults: dict[str, Any]) -> None:
    """Check the settings that are switches.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    for field in SWITCHES:
        allowed = (True, False, None) if field == "fused" else (True, False)
        if not any(defaults[field] is value for value in allowed):
            raise ValueError(f"{field} is {defaults[field]!r}; it must be one of {', '.join(map(str, allowed))}.")
    if defaults["capturable"] and defaults["fused"] is False:
        raise ValueError("capturable is True and fused is False; only the kernels can be captured in a CUDA graph.")


def check_group(group: dict[str, Any], allow_unbalanced: bool) -> None:
    """Check a group's settings and bring them to floats, betas to a pair; one sentence for what is wrong.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.dim() != 0:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; give a number or a 0-dim tensor.")
    for field in ("lr", "eps", "weight_decay"):
        try:
            value = float(group[field])
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"{field} is {group[field]!r:.80}; it must be a number.") from None
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{field} is {value}; it must be a finite number, at least 0.")
        if field != "lr" or not isinstance(group[field], Tensor):  # a scheduler may hold on to an lr that is a tensor
            group[field] = value
    group["betas"] = as_pair(group["betas"], allow_unbalanced)
    check_format(group)
    if group["state"] in ("packed16", "packed8") and group["eps"] < 1e-9:
        warn_once(
            f"eps is {group['eps']} and state is {group['state']!r}, which reads sqrt(v) below 7e-9 as 0: updates of "
            "such small gradients may be as large as lr; keep eps at 1e-9 or above, or take packed32."
        )


def check_before_step(group: dict[str, Any], allow_unbalanced: bool) -> None:
    """Refuse, before anything has changed, what a scheduler, a checkpoint or the model may have brought.

    Raises:
        RuntimeError: if a gradient is sparse.
        ValueError: if betas are no pair, or unequal without permission, or a gradient is not placed as its parameter.
    """
    group["betas"] = as_pair(group["betas"], allow_unbalanced)
    check_format(group)
    for param in group["params"]:
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError("BalancedAdam does not take sparse gradients; build the embedding with sparse=False.")
        if reason := dtensor.obstacle(param, param.grad):
            raise ValueError(reason)


def check_loaded_group(group: dict[str, Any], own: dict[str, Any]) -> None:
    """Check the settings of a group that is about to be loaded; unequal betas may pass.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    settings = {name: group.get(name, own[name]) for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
    try:
        check_group({**settings, "state": "fp32"}, allow_unbalanced=True)
        if not isinstance(settings["maximize"], bool):
            raise ValueError(f"maximize is {settings['maximize']!r}; it must be True or False.")
        bias_correction.history({**group, "betas": as_pair(settings["betas"], allow_unbalanced=True)})
    except ValueError as error:
        raise ValueError(f"in the loaded state, {error}") from None


def check_format(group: dict[str, Any]) -> None:
    """Check how the moments are to be stored.

    Raises:
        ValueError: if there is no such format, or the group's betas are unequal and it needs equal ones.
    """
    if group["state"] not in states.FORMATS:
        raise ValueError(f"state is {group['state']!r}; it must be one of {', '.join(states.FORMATS)}.")
    if group["state"] != "fp32" and group["betas"][0] != group["betas"][1]:
        raise ValueError(
            f"state is {group['state']!r} and betas is {group['betas']}; packed moments need equal betas, since only "
            "then is |m| <= sqrt(v)."
        )


def as_pair(betas: Betas, allow_unbalanced: bool) -> rule.Betas:
    """``betas`` as a pair of floats.

    Raises:
        ValueError: if they are no such pair, out of [0, 1), or unequal without permission.
    """
    try:
        beta1, beta2 = map(float, betas) if isinstance(betas, list | tuple) else (float(betas),) * 2
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"betas is {betas!r:.80}; give one number, or a pair of numbers, in [0, 1).") from None
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas is {betas}; each beta must lie in [0, 1).")
    if beta1 != beta2 and not allow_unbalanced:
        raise ValueError(
            f"betas is ({beta1}, {beta2}); BalancedAdam's betas are equal, since only then is a step bounded by lr and "
            "free, to first order, of the gradient's scale: give one number, or allow_unbalanced=True to run plain "
            "AdamW."
        )
    return beta1, beta2
