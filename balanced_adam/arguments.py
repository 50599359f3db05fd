"""Checks of BalancedAdam's arguments, of its groups' settings, and of settings that a checkpoint brings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from balanced_adam import bias_correction, dtensor, rule
from balanced_adam import state as states
from balanced_adam.values import as_float, shown
from balanced_adam.warn import warn_once

Betas = float | tuple[float, float]
SWITCHES = ("allow_unbalanced", "fused", "capturable", "fused_zero")
"""Settings of the optimizer, not of its groups; no checkpoint holds them."""
NUMBERS = ("lr", "eps", "weight_decay")
"""Settings of a group that are numbers, finite and at least 0."""
LEAST_LR = -1e-12
"""What a scheduler may leave of a learning rate of 0: torch's LinearLR ends at -5e-20."""
ANY = object()
LEFT_OVER: dict[str, tuple[Any, str]] = {
    "foreach": (ANY, ""),
    "torch_adam": (ANY, ""),
    "set_grad_none": (True, "it keeps no gradients of zero"),
    "amsgrad": (False, "it keeps no maximum of v"),
    "differentiable": (False, "autograd can't go through its step"),
    "bias_correction": (True, "it always corrects for bias"),
    "adam_w_mode": (True, "its weight decay is AdamW's"),
    "adamw_mode": (True, "its weight decay is AdamW's"),
    "decoupled_weight_decay": (True, "its weight decay is AdamW's"),
    "fp32_optimizer_states": (True, 'its moments are float32, or packed: set "state"'),
}
"""Arguments of torch's and DeepSpeed's Adam that a configuration may still have: the value that changes nothing, and
why there is no other."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a parameter may be."""


MEANING: dict[str, Any] = {"p": 2.0, "amsgrad": False, "mean_of_squares": False}
"""Settings that say what a group's second moment is (:mod:`balanced_adam.relatives`), and Adam's values of them."""


def check_left_over(settings: dict[str, Any], name: str = "BalancedAdam", own: Collection[str] = ()) -> None:
    """Check arguments of another Adam. They are accepted where they change nothing.

    Args:
        settings: by name.
        name: of the optimizer.
        own: names of its own arguments, where all others are to be those of another Adam.

    Raises:
        TypeError: on one that neither has.
        ValueError: naming the field, the value and what would be right.
    """
    if own and (unknown := min(settings.keys() - LEFT_OVER.keys(), default=None)):
        close = "".join(f"; did you mean {name!r}?" for name in difflib.get_close_matches(unknown, own, 1))
        raise TypeError(f"{name} has no argument {unknown!r}{close or '.'}")
    for field, (allowed, why) in LEFT_OVER.items():
        if field in settings and allowed is not ANY and settings[field] is not allowed:
            raise ValueError(f"{field} is {shown(settings[field])}, and {name} takes {allowed} alone: {why}.")


def check_meaning(group: dict[str, Any], own: dict[str, Any], where: str = "") -> None:
    """See that a group's second moment is what the optimizer takes it for.

    Args:
        group: perhaps of another optimizer.
        own: what the optimizer has of MEANING where it isn't Adam's.
        where: the beginning of the sentence.

    Raises:
        ValueError: if it isn't.
    """
    for name, of_adam in MEANING.items():
        theirs, ours = group.get(name, of_adam), own.get(name, of_adam)
        if name == "p" and not isinstance(theirs, int | float):
            theirs = of_adam  # a key of the user's own
        if theirs != ours:
            raise ValueError(
                f"{where}{name} is {shown(theirs)}, and this optimizer takes {ours} alone: it has another second "
                "moment (balanced_adam.relatives has optimizers with others)."
            )


def check_switches(defaults: dict[str, Any]) -> None:
    """Check the settings that are switches.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    for field in SWITCHES:
        allowed = (True, False, None) if field == "fused" else (True, False)
        if not any(defaults[field] is value for value in allowed):
            raise ValueError(f"{field} is {shown(defaults[field])}; it must be one of {', '.join(map(str, allowed))}.")
    if defaults["capturable"]:
        check_capturable(defaults)
    if defaults["capturable"] and defaults["fused"] is False:
        raise ValueError("capturable is True and fused is False; only the kernels can be captured in a CUDA graph.")


def check_group(group: dict[str, Any], allow_unbalanced: bool, least_lr: float = 0.0) -> None:
    """Check a group's settings and bring them to floats, betas to a pair; one sentence for what is wrong.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.dtype == torch.bool or lr.is_complex()):
        raise ValueError(
            f"lr is a {lr.dtype} tensor of shape {tuple(lr.shape)}; give a number, or a tensor with one element."
        )
    for field in NUMBERS:
        value = as_setting(field, group[field], least=least_lr if field == "lr" else 0.0)
        if field != "lr" or not isinstance(group[field], Tensor):  # a scheduler may hold on to an lr that is a tensor
            group[field] = value
    group["betas"] = as_pair(group["betas"], allow_unbalanced)
    check_maximize(group)
    check_left_over({name: value for name, value in group.items() if name not in MEANING})
    check_variant(group)
    check_format(group)
    if group["state"] in ("packed16", "packed8") and group["eps"] < 1e-9:
        warn_once(
            f"eps is {group['eps']} and state is {group['state']!r}, which reads sqrt(v) below 7e-9 as 0: updates of "
            "such small gradients may be as large as lr; keep eps at 1e-9 or above, or take packed32."
        )


def check_before_step(group: dict[str, Any], allow_unbalanced: bool, capturable: bool) -> None:
    """Refuse, before anything has changed, what a scheduler, a checkpoint or the model may have brought.

    Args:
        group: of the optimizer.
        allow_unbalanced: the optimizer's setting.
        capturable: the optimizer's setting; then what lies on a GPU is not read here.

    Raises:
        RuntimeError: if a gradient is sparse.
        ValueError: if a number is none any more, if betas are no pair, or unequal without permission, or a gradient is
            not placed as its parameter.
    """
    for field in NUMBERS:
        value = group.get(field)
        if not (capturable and isinstance(value, Tensor)):
            as_setting(field, value, " at this step", least=LEAST_LR if field == "lr" else 0.0)
    check_maximize(group)
    check_variant(group)
    group["betas"] = as_pair(group.get("betas", ()), allow_unbalanced=True)
    if group["betas"][0] != group["betas"][1] and not allow_unbalanced:
        raise ValueError(
            f"betas is {group['betas']} at this step, and BalancedAdam needs equal betas: change both; OneCycleLR, "
            "CyclicLR and DeepSpeed's OneCycle change one: give them cycle_momentum=False."
        )
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
    settings = {name: group.get(name, own[name]) for name in (*NUMBERS, "betas", "maximize", "variant")}
    try:
        check_group({**settings, "state": "fp32"}, allow_unbalanced=True, least_lr=LEAST_LR)
        check_left_over({name: group[name] for name in ("bias_correction", "differentiable") if name in group})
        bias_correction.history({**group, "betas": as_pair(settings["betas"], allow_unbalanced=True)})
    except ValueError as error:
        raise ValueError(f"in the loaded state, {error}") from None


def check_maximize(group: dict[str, Any]) -> None:
    """Check which way to go.

    Raises:
        ValueError: if it is neither True nor False.
    """
    if not isinstance(group.get("maximize"), bool):
        raise ValueError(f"maximize is {shown(group.get('maximize'))}; it must be True or False.")


def check_capturable(group: dict[str, Any]) -> None:
    """Check a group whose steps a CUDA graph is to capture.

    Raises:
        ValueError: if it is of a variant, whose learning rate is worked out on the CPU.
    """
    if group["variant"] != "adam":
        raise ValueError(f"capturable is True and variant is {group['variant']!r}; in a CUDA graph it must be 'adam'.")


def check_variant(group: dict[str, Any]) -> None:
    """Check which variant of AdamW it is.

    Raises:
        ValueError: if there is none of that name.
    """
    if group.get("variant") not in rule.VARIANTS:
        raise ValueError(f"variant is {shown(group.get('variant'))}; it must be one of {', '.join(rule.VARIANTS)}.")


def check_format(group: dict[str, Any]) -> None:
    """Check how the moments are to be stored.

    Raises:
        ValueError: if there is no such format, or the group's betas are unequal and it needs equal ones.
    """
    if group.get("state") not in states.FORMATS:
        raise ValueError(f"state is {shown(group.get('state'))}; it must be one of {', '.join(states.FORMATS)}.")
    if group["state"] != "fp32" and group["betas"][0] != group["betas"][1]:
        raise ValueError(
            f"state is {group['state']!r} and betas is {group['betas']}; packed moments need equal betas, since only "
            "then is |m| <= sqrt(v)."
        )


def check_param(param: Tensor, format: str) -> None:
    """Check a parameter of a group whose moments are stored in this format.

    Raises:
        ValueError: if it can't be stepped, or not with such moments.
    """
    if torch.is_complex(param):
        raise ValueError("BalancedAdam does not take complex parameters; give torch.view_as_real of them instead.")
    if param.requires_grad and param.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is {param.dtype}; BalancedAdam takes {names}; don't "
            "give it to the optimizer."
        )
    if format != "fp32" and param.dtype == torch.float64:
        raise ValueError(f"state is {format!r}, and a parameter is float64; its moments must be 'fp32'.")
    if reason := dtensor.obstacle(param):
        raise ValueError(f"BalancedAdam can't step it: {reason}")
    if format != "fp32" and dtensor.is_opaque(param):
        raise ValueError(
            f"state is {format!r}, and a parameter is of the class {type(param).__name__}, which may do with integers "
            "what it likes; its moments must be 'fp32'."
        )


def as_setting(field: str, value: Any, when: str = "", least: float = 0.0) -> float:
    """A setting as a float.

    Args:
        field: its name.
        value: as it was given.
        when: the end of the sentence's first clause.
        least: what it may be, for the sake of rounding.

    Raises:
        ValueError: if it is no finite number, or below 0.
    """
    try:
        number = as_float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{field} is {shown(value)}{when}; it must be a number.") from None
    if not (math.isfinite(number) and number >= least):
        raise ValueError(f"{field} is {number}{when}; it must be a finite number, at least 0.")
    return number


def as_pair(betas: Betas, allow_unbalanced: bool) -> rule.Betas:
    """``betas`` as a pair of floats.

    Raises:
        ValueError: if they are no such pair, out of [0, 1), or unequal without permission.
    """
    try:
        beta1, beta2 = map(as_float, betas) if isinstance(betas, list | tuple) else (as_float(betas),) * 2
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"betas is {shown(betas)}; give one number, or a pair of numbers, in [0, 1).") from None
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas is {betas}; each beta must lie in [0, 1).")
    if beta1 != beta2 and not allow_unbalanced:
        raise ValueError(
            f"betas is ({beta1}, {beta2}), and BalancedAdam needs equal betas: give one number, or "
            "allow_unbalanced=True to run plain AdamW."
        )
    return beta1, beta2
