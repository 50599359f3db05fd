"""The optimizers that a run may name, and how DeepSpeed is given each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from train.common.errors import ConfigError, require

if TYPE_CHECKING:
    import torch

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("BalancedAdam", {"variant": "adam"}),
    "adamd": ("BalancedAdam", {"variant": "adamd"}),
    "adamprox": ("BalancedAdam", {"variant": "adamprox"}),
    "adamp": ("AdamP", {}),
    "l1": ("LpAdam", {"p": 1.0}),
    "l1.5": ("LpAdam", {"p": 1.5}),
    "l3": ("LpAdam", {"p": 3.0}),
    "l6": ("LpAdam", {"p": 6.0}),
    "amsgrad": ("AMSGrad", {}),
    "adamnc": ("AdamNC", {}),
}
"""Name: the type in a ds_config, and what its params have beside those that all have."""
FOREIGN = ("torch", "deepspeed")
"""torch:NAME is a class of torch.optim, deepspeed:NAME one of DeepSpeed's own."""
DEEPSPEED = {"Adam": {"eps"}, "AdamW": {"eps"}, "Lamb": {"eps"}, "Lion": set[str]()}
"""Those with betas that ZeRO takes, and what they take beside lr, betas and weight_decay, which is decoupled."""
UNIVERSAL = {name for name in OWN if name != "amsgrad"}
"""The optimizers whose state DeepSpeed's universal checkpoints hold: two moments and a step."""


def checkpoint_bytes(name: str) -> int:
    """Return the bytes of a checkpoint per parameter: four float32 numbers for the weight, two moments and the model's
    own weight; one more where there may be another moment."""
    return 16 if name in UNIVERSAL else 20


def is_foreign(name: str) -> bool:
    """Whether it is one of torch's or DeepSpeed's."""
    return name.partition(":")[0] in FOREIGN and ":" in name


def has_kernels(name: str) -> bool:
    """Whether there are kernels for it, which the ds_config may turn on and off."""
    return OWN.get(name, ("", {}))[0] == "BalancedAdam"


def left_at_defaults(name: str) -> set[str]:
    """Return the optimizer's own settings that a run does not change."""
    if is_foreign(name):
        return set()
    import balanced_adam

    kind, given = OWN[name]
    return set(getattr(balanced_adam, kind).OWN) - set(given)


def check_name(name: str) -> None:
    """Check that there is such an optimizer.

    Raises:
        ConfigError: if there is none, or it takes no betas.
    """
    kind, _, of_theirs = name.partition(":")
    require(
        name in OWN or (is_foreign(name) and bool(of_theirs)),
        f"optimizer is {name!r}; it must be one of {', '.join(OWN)}, or torch:NAME or deepspeed:NAME.",
    )
    if kind == "deepspeed":
        require(
            of_theirs in DEEPSPEED,
            f"optimizer is {name!r}; of DeepSpeed's own it may be {', '.join(DEEPSPEED)}; torch:NAME is for torch's.",
        )
    elif kind == "torch":
        import torch

        from balanced_adam import BalancedAdam

        found: Any = getattr(torch.optim, of_theirs, None)
        is_one = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
        require(
            is_one and not issubclass(found, BalancedAdam),
            f"optimizer is {name!r}, and torch.optim has no optimizer {of_theirs}.",
        )
        require(
            "betas" in _taken(name),
            f"optimizer is {name!r}, and torch.optim.{of_theirs} takes no betas; take one that does.",
        )


def _taken(name: str) -> set[str]:
    """Return the names of an optimizer's arguments; it is one of torch's or DeepSpeed's."""
    kind, _, of_theirs = name.partition(":")
    if kind == "deepspeed":
        return {"lr", "betas", "weight_decay", *DEEPSPEED[of_theirs]}
    import torch

    return set(inspect.signature(getattr(torch.optim, of_theirs)).parameters)


def _decouples(name: str) -> bool:
    """Return whether weight decay does not go through the averages."""
    return name.startswith("deepspeed:") or name == "torch:AdamW" or "decoupled_weight_decay" in _taken(name)


def build(name: str, params: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer] | None:
    """Return what makes an optimizer of torch's from parameter groups; None for one that DeepSpeed finds by its name.

    Weight decay is decoupled. What a ds_config may have for another Adam is left out.

    Args:
        name: as of ``--optimizer``.
        params: of the ds_config.
    """
    if not name.startswith("torch:"):
        return None
    import torch

    kind = getattr(torch.optim, name.partition(":")[2])
    taken = _taken(name)
    settings = {key: value for key, value in params.items() if key in taken} | {"betas": tuple(params["betas"])}
    if "decoupled_weight_decay" in taken:
        settings["decoupled_weight_decay"] = True
    return lambda groups: kind(groups, **settings)


def settings_of(name: str, params: dict[str, Any], unbalanced: bool) -> dict[str, Any]:
    """Return ``optimizer.params`` of the ds_config of a run.

    Args:
        name: as of ``--optimizer``.
        params: lr, betas (a pair), eps, weight_decay and state.
        unbalanced: whether the betas may differ.

    Raises:
        ConfigError: if the optimizer rejects them.
    """
    import torch

    import balanced_adam

    if not is_foreign(name):
        kind, more = OWN[name]
        params = {**params, **more, "allow_unbalanced": unbalanced}
        try:
            getattr(balanced_adam, kind)([torch.zeros(1)], **params)
        except ValueError as error:
            raise ConfigError(str(error).replace("allow_unbalanced=True", "--allow-unbalanced")) from None
        return params
    first, second = params["betas"]
    require(
        first == second or unbalanced,
        f"betas is ({first}, {second}); --allow-unbalanced is needed where they differ, whichever the optimizer is.",
    )
    state = params.pop("state")
    require(
        state == "fp32",
        f"state is {state!r} and optimizer is {name!r}; only BalancedAdam, LpAdam and AdamP pack their moments.",
    )
    require(
        params["weight_decay"] == 0.0 or _decouples(name),
        f"weight_decay is {params['weight_decay']} and optimizer is {name!r}, which adds it to the gradient, where it "
        "is another thing than for the others; give --weight-decay 0.",
    )
    params = {key: value for key, value in params.items() if key in _taken(name)}
    if maker := build(name, params):
        try:
            maker([torch.zeros(1)])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"optimizer is {name!r}, which refuses this: {error}") from None
    return params
