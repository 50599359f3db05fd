"""What BalancedAdam's state dicts hold beside torch's, and what is checked before one is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from balanced_adam import bias_correction, dtensor, rule
from balanced_adam import state as states
from balanced_adam.arguments import as_pair, check_loaded_group, check_meaning
from balanced_adam.values import shown

State = states.State
Groups = list[dict[str, Any]]


def as_saved(saved: Mapping[Any, State], groups: Groups) -> dict[Any, State]:
    """A copy of the states with the excess of the product of betas in place of the product
    (:mod:`balanced_adam.bias_correction`)."""
    copy = dict(saved) if type(saved) is dict else defaultdict(dict, saved)
    for group in groups:
        betas = as_pair(group["betas"], allow_unbalanced=True)
        for key in group["params"]:
            state = saved.get(key, {})
            if bias_correction.LOG_PRODUCT in state:
                logarithm = state[bias_correction.LOG_PRODUCT]
                steps = 0 if logarithm == bias_correction.UNKNOWN else int(state["step"])
                copy[key] = {name: value for name, value in state.items() if name != bias_correction.LOG_PRODUCT}
                copy[key][bias_correction.EXCESS] = bias_correction.excess(logarithm, betas, steps)
    return copy


def restore_products(
    group: dict[str, Any], states_by_param: Mapping[Any, State], made_with: bias_correction.History | None
) -> None:
    """The reverse of :func:`as_saved` for a group that has been loaded, in place.

    Args:
        group: the loaded group.
        states_by_param: the loaded states.
        made_with: what the group said of the betas that its averages were made with.
    """
    betas = as_pair(group["betas"], allow_unbalanced=True)
    begun = [state for p in group["params"] if bias_correction.EXCESS in (state := states_by_param.get(p, {}))]
    # A loader may have filled it in where an old file has none; then the group knows better.
    known = any(state[bias_correction.EXCESS] for state in begun) or not (made_with or (0, 0))[1]
    for state in begun:
        value = float(state.pop(bias_correction.EXCESS))
        if known and "step" in state:
            state[bias_correction.LOG_PRODUCT] = bias_correction.from_excess(value, betas, int(state["step"]))


def describe_groups(saved: dict[str, Any]) -> None:
    """Let the groups of a state dict say, in place, which format their moments are in, and how betas have changed.

    The latter is for DeepSpeed's universal checkpoints, which keep the groups, and of the states no more than moments
    and steps.
    """
    for group in saved["param_groups"]:
        taken = [saved["state"].get(number, {}) for number in group["params"]]
        formats = {states.format_of(state) for state in taken} - {None}
        if len(formats) == 1:
            group["state"] = formats.pop()
        begun = [state for state in taken if "step" in state]
        oldest: State = max(begun, key=lambda state: int(state["step"]), default={})
        group.pop(bias_correction.GROUP_KEY, None)
        if bias_correction.LOG_PRODUCT in oldest:
            betas = as_pair(group["betas"], allow_unbalanced=True)
            steps, logarithm = int(oldest["step"]), oldest[bias_correction.LOG_PRODUCT]
            if history := bias_correction.of_group(betas, steps, logarithm):
                group[bias_correction.GROUP_KEY] = history


def check_state_dict(seen: dict[str, Any], groups: Groups) -> dict[Tensor, State]:
    """See whether a state dict can be loaded into an optimizer with these groups.

    Returns:
        The loaded states by parameter; empty where the groups don't match, which torch itself refuses.

    Raises:
        ValueError: as :meth:`balanced_adam.BalancedAdam.load_state_dict`.
    """
    for key, kind in (("param_groups", list), ("state", dict)):
        if not isinstance(seen.get(key), kind):
            raise ValueError(f"the loaded state has no {key}; it is not the state dict of an optimizer.")
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in seen["param_groups"]):
        raise ValueError("the loaded state has groups without params; it is not the state dict of an optimizer.")
    if [len(g["params"]) for g in seen["param_groups"]] != [len(g["params"]) for g in groups]:
        return {}
    for group, own in zip(seen["param_groups"], groups, strict=True):
        _check_is_adamw(group, own)
    ids = list(chain.from_iterable(group["params"] for group in seen["param_groups"]))
    _check_ids(ids, seen["state"])
    params = chain.from_iterable(group["params"] for group in groups)
    loaded = {param: seen["state"].get(number, {}) for number, param in zip(ids, params, strict=False)}
    for group, own in zip(seen["param_groups"], groups, strict=True):
        for state in (seen["state"].get(i, {}) for i in group["params"]) if own.get("amsgrad") else ():
            if "exp_avg" in state and not states.maximum(state):
                raise ValueError(f"the loaded state has no {states.MAXIMUM}, which AMSGrad goes on with.")
        betas = as_pair(group["betas"], allow_unbalanced=True)
        states.check_loaded(group.get("state", "fp32"), [seen["state"].get(i, {}) for i in group["params"]], betas)
    for param, state in loaded.items():
        _check_fits(param, state)
    return loaded


def _check_is_adamw(group: dict[str, Any], own: dict[str, Any]) -> None:
    if "betas" not in group:
        raise ValueError("the loaded state has groups without betas; it is not that of an Adam.")
    check_loaded_group(group, own)
    check_meaning(group, own, "in the loaded state, ")
    if group.get("decoupled_weight_decay") is False and group.get("weight_decay", 0.0) != 0.0:
        raise ValueError(
            f"the loaded state is that of an Adam with weight_decay = {group['weight_decay']} added to the gradient, "
            "and BalancedAdam decouples it, as AdamW; set it to 0 in the state, or go on with Adam."
        )


def _check_ids(ids: list[Any], state: Mapping[Any, Any]) -> None:
    """Check that each parameter has an id of its own, and each parameter's state a parameter.

    State under other keys belongs to whoever put it there; torch copies it as it is.
    """
    seen: set[Any] = set()
    for key in ids:
        if not isinstance(key, Hashable) or key in seen:
            raise ValueError(
                f"the loaded state has {shown(key)} among its groups' params; each must be a number or a name, and in "
                "one place: it is damaged."
            )
        seen.add(key)
    for key, value in state.items():
        if key not in seen and isinstance(value, dict) and value.keys() & {"step", *states.TENSORS}:
            raise ValueError(
                f"the loaded state has moments of the parameter {shown(key)}, which none of its groups has: it is "
                "damaged."
            )


def _check_fits(param: Tensor, state: State) -> None:
    for name, tensor in {**states.moment_tensors(state), **states.maximum(state)}.items():
        if tensor.shape != param.shape:
            raise ValueError(f"the loaded {name} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}.")
        if reason := dtensor.refuses(param, tensor):
            raise ValueError(reason)


def keep_precision(param: Tensor, loaded: State, own: State) -> None:
    """Put the moments of a loaded state into ``own``, in place, where torch's loading has cast them to the parameter's
    dtype."""
    for name, tensor in {**states.moment_tensors(loaded), **states.maximum(loaded)}.items():
        is_packed = name == states.PACKED
        dtype = tensor.dtype if is_packed else rule.moments_dtype(param.dtype)
        if own[name].dtype != dtype or (is_packed and own[name] is tensor):
            own[name] = tensor.to(device=param.device, dtype=dtype, copy=True)
        own[name] = dtensor.distributed_as(param, own[name])


def fill_in(group: dict[str, Any], own: dict[str, Any], names: Iterable[str]) -> None:
    """Give a loaded group, in place, its own format, and those of these settings that another Adam's, or an older one,
    lacks.

    Raises:
        ValueError: if it says that its second moments are another quantity.
    """
    check_meaning(group, own, "in the loaded state, ")
    for name in names:
        if name in own:
            group.setdefault(name, own[name])
    group["state"] = own["state"]


def keep_betas(group: dict[str, Any], own: Any, may_be_unequal: bool) -> str | None:
    """Put a group's own betas back, in place, where the loaded ones are unequal and may not be; then, what to warn
    of."""
    beta1, beta2 = as_pair(group["betas"], allow_unbalanced=True)
    if beta1 == beta2 or may_be_unequal:
        return None
    group["betas"] = own
    return f"the loaded state was made with betas ({beta1}, {beta2}); this BalancedAdam goes on with {own}." + (
        " A step may exceed lr until the old averages have faded." if group["state"] == "fp32" else ""
    )
