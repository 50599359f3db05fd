"""DeepSpeed's access to optimizer state, where the moments are packed words (:mod:`balanced_adam.packed`).

DeepSpeed asks for ``exp_avg`` and ``exp_avg_sq`` by name, to show them (``safe_get_full_optimizer_state`` and its kin):
they are decoded for it. To set one of them isn't possible, and refused: a value written into a copy would be lost.
Universal checkpoints hold fp32 moments, which the first step after loading packs again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from balanced_adam import bias_correction
from balanced_adam.state import MOMENTS, PACKED, moments, unpacked
from balanced_adam.warn import warn_once
from balanced_adam.zero.partitions import classes
from balanced_adam.zero.wrappers import Override


def overrides() -> Sequence[Override]:
    """Methods of DeepSpeed's, with the wrappers that run for BalancedAdam."""
    DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer = classes()
    return [
        (DeepSpeedZeroOptimizer, "load_state_dict", _load),
        (BF16_Optimizer, "load_state_dict", _load),
        (DeepSpeedZeroOptimizer, "load_hp_checkpoint_state_from_checkpoint_dir", keep_formats),
        (BF16_Optimizer, "load_hp_checkpoint_state_from_checkpoint_dir", keep_formats),
        (DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state", _link_again_1),
        (BF16_Optimizer, "_lazy_init_hp_params_optimizer_state", _link_again_bf16),
        (DeepSpeedZeroOptimizer, "initialize_optimizer_states", _refuse_elastic),
        (DeepSpeedZeroOptimizer_Stage3, "initialize_optimizer_states", _say_moments_are_fp32),
        (DeepSpeedZeroOptimizer_Stage3, "_get_fp32_opt_state_partition", _decoded_3),
        (DeepSpeedZeroOptimizer_Stage3, "set_full_hp_param", _refuse_3),
        (DeepSpeedZeroOptimizer_Stage3, "set_local_hp_param", _refuse_3),
    ]


@contextmanager
def unpacking() -> Iterator[None]:
    """Within it ``torch.load`` gives fp32 moments in place of packed ones (:func:`balanced_adam.unpacked`), in
    processes that are forked, too.

    For what knows no packed state: ``deepspeed.checkpoint.ds_to_universal.main`` becomes able to convert such a
    checkpoint.
    """
    load = torch.load
    torch.load = lambda *args, **kwargs: unpacked(load(*args, **kwargs))
    try:
        yield
    finally:
        torch.load = load


def missing_function() -> str | None:
    """Which of the functions that :func:`patch_fragments` replaces is not there; None if both are."""
    from deepspeed.utils import mixed_precision_linkage, tensor_fragment

    needed = ((tensor_fragment, "get_optim_state_fragment"), (mixed_precision_linkage, "set_full_hp_param"))
    return next((f"{module.__name__}.{name}" for module, name in needed if not hasattr(module, name)), None)


def check_loaders() -> None:
    """See that universal checkpoints can be told from others.

    Raises:
        AttributeError: if a ``load_state_dict`` does not say so, or stage 3, which mixes up the settings of groups, has
            none.
    """
    _, stage3, _ = classes()
    for cls in classes():
        if not hasattr(cls, "load_state_dict") and cls is not stage3:
            continue  # packed state is refused
        parameters = inspect.signature(getattr(cls, "load_state_dict")).parameters.values()  # noqa: B009
        named = {"checkpoint_folder", "load_optimizer_states"} <= {each.name for each in parameters}
        if not named and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
            raise AttributeError(f"{cls.__name__}.load_state_dict takes no checkpoint_folder")


def patch_fragments() -> None:
    """Let parameters of stages 1 and 2 and of BF16_Optimizer decode their packed state when they are asked for moments.

    Nothing changes for other state.
    """
    from deepspeed.utils import mixed_precision_linkage, tensor_fragment

    get, put = tensor_fragment.get_optim_state_fragment, mixed_precision_linkage.set_full_hp_param
    if hasattr(get, "balanced_adam_patched"):
        return

    def get_decoded(self: Any, key: str) -> Tensor:
        return _decoded(self.optim_fragment, key) if _is_packed(self.optim_fragment, key) else get(self, key)

    def set_or_refuse(self: Any, value: Tensor, optim_state_key: str | None = None) -> None:
        if self._hp_mapping is not None and _is_packed(self._hp_mapping.optim_fragment or {}, optim_state_key):
            _refuse(optim_state_key)
        put(self, value, optim_state_key)

    get_decoded.balanced_adam_patched = True  # type: ignore[attr-defined]
    tensor_fragment.get_optim_state_fragment = get_decoded
    mixed_precision_linkage.set_full_hp_param = set_or_refuse


def keep_formats(original: Callable[..., None], self: Any, *args: Any) -> None:
    """Loading a universal checkpoint sets everything in a group as it was saved; the format of the state is this run's
    own."""
    groups = self.optimizer.param_groups
    if hasattr(self, "balanced_adam_keeps"):  # within another call of this
        original(self, *args)
        return
    self.balanced_adam_keeps = True
    own: list[dict[str, Any]] = []
    try:
        with self.optimizer.keeping_own():
            own += [{name: group.pop(name) for name in self.optimizer.OWN} for group in groups]
            original(self, *args)  # what is loaded must say for itself what it is
    except BaseException:
        for group, settings in zip(groups, own, strict=False):
            group.update(settings)
        raise
    finally:
        del self.balanced_adam_keeps
    for loaded in self.optimizer.state.values():
        loaded.pop(bias_correction.LOG_PRODUCT, None)  # of before; such a checkpoint has none
        if "exp_avg" in loaded:
            loaded.pop(PACKED, None)  # of before


def universal_folder(load_state_dict: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> str | None:
    """The universal checkpoint whose optimizer state such a call loads; None if it loads none, or another kind."""
    given = {**inspect.signature(load_state_dict).bind(self, *args, **kwargs).arguments, **kwargs}
    folder: str | None = given.get("checkpoint_folder")
    return folder if given.get("load_optimizer_states", True) else None


def _load(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """By whichever method DeepSpeed loads it."""
    if universal_folder(original, self, *args, **kwargs):
        keep_formats(lambda self: original(self, *args, **kwargs), self)
    else:
        original(self, *args, **kwargs)


def _is_packed(state: dict[str, Any], key: str | None) -> bool:
    return key in MOMENTS and PACKED in state


def _decoded(state: dict[str, Any], key: str) -> Tensor:
    return moments(state)[MOMENTS.index(key)]


def _refuse(key: str | None) -> None:
    raise RuntimeError(
        f"{key} can't be set on its own: BalancedAdam stores it in one word with the other moment; use state='fp32'."
    )


# ---- Stages 1 and 2, and BF16_Optimizer


def _refuse_elastic(original: Callable[..., None], self: Any) -> None:
    format = next((group["state"] for group in self.optimizer.param_groups if group["state"] != "fp32"), None)
    if self.elastic_checkpoint and format:
        raise ValueError(
            f"zero_optimization.elastic_checkpoint is true and state is {format!r}: such a checkpoint makes words "
            "floats; leave it out, and use universal checkpoints to change the number of ranks."
        )
    _say_moments_are_fp32(original, self)


def _say_moments_are_fp32(original: Callable[..., None], self: Any) -> None:
    if getattr(self, "bf16_optimizer_states", False):
        warn_once(
            "bf16.bf16_optimizer_states is true, and changes nothing for BalancedAdam, whose moments are float32, or "
            "packed: set "
            '"state" to "packed32" or "packed16" in the optimizer\'s params instead.'
        )
    original(self)


def _link_again_1(original: Callable[..., None], self: Any) -> None:
    _link_again(original, self, self.bit16_groups, self.single_partition_of_fp32_groups)


def _link_again_bf16(original: Callable[..., None], self: Any) -> None:
    _link_again(original, self, self.bf16_groups, self.fp32_groups_flat_partition)


def _link_again(original: Callable[..., None], self: Any, groups: Any, masters: Any) -> None:
    """DeepSpeed links the fragments to the state once. A step may have made other state since: packed what was
    loaded."""
    for params, master in zip(groups, masters, strict=True):
        mapping = next((p._hp_mapping for p in params if p._hp_mapping is not None), None)
        if mapping is not None:
            linked = (mapping.optim_fragment or {}).get(PACKED)
            if _memory(linked) != _memory(self.optimizer.state[master].get(PACKED)):
                self._hp_optimizer_states_linked = False
    original(self)


def _memory(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.untyped_storage().data_ptr()


# ---- Stage 3


def _decoded_3(
    original: Callable[..., Any], self: Any, param: Any, release_swap_buffers: bool, optim_state_key: str | None = None
) -> Any:
    if optim_state_key is None or not _is_packed(_state_3(self, param), optim_state_key):
        return original(self, param, release_swap_buffers, optim_state_key)
    words, group = original(self, param, release_swap_buffers, PACKED)
    return _decoded({PACKED: words}, optim_state_key), group


def _refuse_3(
    original: Callable[..., None], self: Any, value: Tensor, param: Any, optim_state_key: str | None = None
) -> None:
    if param.requires_grad and _is_packed(_state_3(self, param), optim_state_key):
        _refuse(optim_state_key)
    original(self, value, param, optim_state_key)


def _state_3(self: Any, param: Any) -> dict[str, Any]:
    group = self.grad_position[self.get_param_id(param)][0]
    state: dict[str, Any] = self.optimizer.state[self.fp32_partitioned_groups_flat[group]]
    return state
