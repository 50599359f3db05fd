"""Two defects of DeepSpeed's that change what *any* optimizer computes, mended for BalancedAdam alone.

* Stage 0 in 16 bits: ``FP16_UnfusedOptimizer.initialize_optimizer_states`` takes a step with zero gradients at
  start-up, so that the step count is one too high for ever and weight decay is applied once too often. We skip it: our
  state is made at the first real step. In fp16 the same wrapper divides the gradient by a loss scale that the loss was
  never multiplied by, which nothing after it can repair: refused.
* Universal checkpoints at stage 3 give every parameter group the settings of group 0. We read them again, per group.

Neither rests on a version, nor on the one method that has the defect: ``FP16_UnfusedOptimizer.__init__`` and
``load_state_dict`` are wrapped as well, and what they leave behind is looked at. Where DeepSpeed has mended its defect
all is well; where it has moved it, the run is right too, or refused.

What would step weights with another optimizer than ours, without a word, is refused (:data:`REPLACED`).

Others are known and not patched (docs/deepspeed-defects.md); one of them: a parameter without a gradient in some step
is given its last gradient again at stage 3, and with offload at stage 2 (tests/parity/cases.py says where).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from operator import eq
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balanced_adam import bias_correction
from balanced_adam.state import MOMENTS
from balanced_adam.zero import packed_state
from balanced_adam.zero.wrappers import Override


def overrides() -> Sequence[Override]:
    """Methods of DeepSpeed's, with the wrappers that run for BalancedAdam."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return [
        (FP16_UnfusedOptimizer, "initialize_optimizer_states", _no_initialization_step),
        (FP16_UnfusedOptimizer, "__init__", _check_start),
        (DeepSpeedZeroOptimizer_Stage3, "load_hp_checkpoint_state_from_checkpoint_dir_stage3", _settings_per_group),
        (DeepSpeedZeroOptimizer_Stage3, "load_state_dict", _load),
        (DeepSpeedEngine, "_configure_zero_optimizer", _check_features),
    ]


def deepspeed_version() -> str:
    """DeepSpeed's, also while it is being imported."""
    try:
        return str(getattr(sys.modules.get("deepspeed"), "__version__", None) or version("deepspeed")).strip()
    except PackageNotFoundError:
        return "of unknown version"


# ---- Features with optimizers of their own

REPLACED: dict[str, tuple[object, str]] = {
    "zenflow": (None, "ZenFlow steps the weights that it selects with an AdamW of its own"),
    "offload_optimizer.super_offload": (False, "SuperOffload steps in a process of its own, with DeepSpeedCPUAdam"),
    "offload_optimizer.ratio": (1.0, "DeepSpeed steps what it doesn't offload with torch's AdamW"),
}
"""Settings of zero_optimization: the value that leaves all weights to the optimizer that was given, and what others
do."""


def check_engine() -> None:
    """See that such settings can be looked at before there is a ZeRO optimizer.

    Raises:
        AttributeError: if they can't.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not hasattr(DeepSpeedEngine, "_configure_zero_optimizer"):
        raise AttributeError("DeepSpeedEngine has no _configure_zero_optimizer")


def _check_features(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    for key, (without, what) in REPLACED.items():
        value = self._config.zero_config
        for name in key.split("."):
            value = getattr(value, name, None)
        if value is not None and value != without:
            shown = value if isinstance(value, float | bool) else "given"
            raise ValueError(f"zero_optimization.{key} is {shown}, and {what}, not with BalancedAdam; remove it.")
    return original(self, *args, **kwargs)


# ---- Stage 0 in 16 bits


def _no_initialization_step(original: Callable[..., None], self: Any) -> None:
    pass


def _check_start(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    optimizer = next(value for value in chain(args, kwargs.values()) if isinstance(value, torch.optim.Optimizer))
    before = _steps(optimizer)
    original(self, *args, **kwargs)
    if any(param.dtype == torch.float16 for param in chain(*self.fp16_groups)):
        raise ValueError(
            "zero_optimization.stage is 0 with fp16.enabled: DeepSpeed divides these gradients by a loss scale that it "
            "never multiplied the loss by; use bf16, or stage 1, 2 or 3."
        )
    if _steps(optimizer) != before:
        raise RuntimeError(
            f"DeepSpeed {deepspeed_version()} takes a step before the first gradient in 16 bits without ZeRO, in a way "
            "that BalancedAdam can't prevent; use zero_optimization.stage 1, 2 or 3."
        )


def _steps(optimizer: torch.optim.Optimizer) -> int:
    return sum(int(state.get("step", 0)) for state in optimizer.state.values())


# ---- Universal checkpoints at stage 3


def _load(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    folder = packed_state.universal_folder(original, self, *args, **kwargs)
    if not folder:
        original(self, *args, **kwargs)
        return
    before = _moments(self)
    self.balanced_adam_loads = True
    try:
        _with_settings(lambda: original(self, *args, **kwargs), self, folder)
    finally:
        del self.balanced_adam_loads
    if self.swap_optimizer:  # they are on a disk
        return
    for number, (moments, old) in enumerate(zip(_moments(self), before, strict=True)):
        if moments is not None and (len(moments) < len(MOMENTS) or any(map(eq, moments, old or ()))):
            raise RuntimeError(
                f"DeepSpeed {deepspeed_version()} has loaded no moments into sub-group {number} of {len(before)} from "
                "a universal checkpoint at stage 3; use stage 1 or 2."
            )


def _settings_per_group(original: Callable[..., None], self: Any, checkpoint_dir: str, *shapes: Any) -> None:
    if shapes and len(self.fp32_partitioned_groups_flat) > 1:  # up to DeepSpeed 0.17 it asks for the shapes
        raise RuntimeError(
            f"DeepSpeed {deepspeed_version()} loads a universal checkpoint at stage 3 into a single sub-group, and "
            f"this model has {len(self.fp32_partitioned_groups_flat)}; use DeepSpeed 0.18 or later, or stage 1 or 2."
        )
    if hasattr(self, "balanced_adam_loads"):
        original(self, checkpoint_dir, *shapes)
    else:  # up to 0.19.0 DeepSpeed comes here where it was not to load the optimizer, too
        _with_settings(lambda: original(self, checkpoint_dir, *shapes), self, checkpoint_dir)


def _with_settings(load: Callable[[], None], self: Any, folder: str) -> None:
    """Load, and give each parameter group the settings that were saved of it."""

    def load_all(self: Any) -> None:
        load()
        # The file that DeepSpeed itself has just unpickled; it holds settings and step counts, no moments.
        saved = torch.load(Path(folder) / "zero" / "optimizer_state.pt", weights_only=False)
        groups = saved["optimizer_state_dict"]["param_groups"]
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.pop(bias_correction.GROUP_KEY, None)  # of the first group
            group.update({key: value for key, value in settings.items() if key != "params"})

    packed_state.keep_formats(load_all, self)


@dataclass(frozen=True)
class _Written:
    """A tensor, and how often it was written to. Equal to another only if nothing was loaded."""

    tensor: Tensor
    times: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Written) and self.tensor is other.tensor and self.times == other.times


def _moments(self: Any) -> list[list[_Written] | None]:
    """The moments of each sub-group; None where this rank has no part of it."""
    found: list[list[_Written] | None] = []
    for master in self.fp32_partitioned_groups_flat:
        state = self.optimizer.state.get(master, {})
        moments = [_Written(state[name], state[name]._version) for name in MOMENTS if name in state]
        found.append(moments if master.numel() else None)
    return found
