"""Two defects of DeepSpeed's that change what *any* optimizer computes, mended for BalancedAdam alone.

* Stage 0 in 16 bits: ``FP16_UnfusedOptimizer.initialize_optimizer_states`` takes a step with zero gradients at
  start-up, so that the step count is one too high for ever and weight decay is applied once too often. We skip it: our
  state is made at the first real step. In fp16 the same wrapper divides the gradient by a loss scale that the loss was
  never multiplied by, which nothing after it can repair: refused.
* Universal checkpoints at stage 3 give every parameter group the settings of group 0. We read them again, per group.

Whether a patch has done its work is seen by what comes out of DeepSpeed's ``__init__`` and ``load_state_dict``, not by
a version: a DeepSpeed that has mended its defect needs no patch, and one that has moved it is refused.

Others are known and not patched (docs/deepspeed-defects.md); one of them: a parameter without a gradient in some step
is given its last gradient again at stage 3, and with offload at stage 2 (tests/parity/cases.py says where).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from balanced_adam import bias_correction
from balanced_adam.zero import packed_state
from balanced_adam.zero.wrappers import Override


def overrides() -> Sequence[Override]:
    """Methods of DeepSpeed's, with the wrappers that run for BalancedAdam."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return [
        (FP16_UnfusedOptimizer, "initialize_optimizer_states", _no_initialization_step),
        (FP16_UnfusedOptimizer, "__init__", _check_start),
        (DeepSpeedZeroOptimizer_Stage3, "load_hp_checkpoint_state_from_checkpoint_dir_stage3", _settings_per_group),
        (DeepSpeedZeroOptimizer_Stage3, "load_state_dict", _check_universal),
    ]


# ---- Stage 0 in 16 bits


def _no_initialization_step(original: Callable[..., None], self: Any) -> None:
    pass


def _check_start(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    optimizer = args[0] if args else kwargs["init_optimizer"]
    before = _steps(optimizer)
    original(self, *args, **kwargs)
    # Up to DeepSpeed 0.18 the wrapper doesn't know its dtype.
    if getattr(self, "low_precision_dtype", self.fp16_groups[0][0].dtype) == torch.float16:
        raise ValueError(
            "zero_optimization.stage is 0 with fp16.enabled: DeepSpeed divides these gradients by a loss scale that it "
            "never multiplied the loss by; use bf16, or stage 1, 2 or 3."
        )
    if _steps(optimizer) != before:
        raise RuntimeError(
            f"zero_optimization.stage is 0 in 16 bits, and DeepSpeed {_version()} takes a step before the first "
            "gradient, in a way that BalancedAdam can't prevent; use stage 1, 2 or 3."
        )


def _steps(optimizer: torch.optim.Optimizer) -> int:
    return sum(int(state.get("step", 0)) for state in optimizer.state.values())


# ---- Universal checkpoints at stage 3


def _settings_per_group(original: Callable[..., None], self: Any, checkpoint_dir: str, *shapes: Any) -> None:
    if shapes and len(self.fp32_partitioned_groups_flat) > 1:  # up to DeepSpeed 0.17 it asks for the shapes
        raise RuntimeError(
            f"DeepSpeed {_version()} loads a universal checkpoint at stage 3 into a single sub-group, and this model "
            f"has {len(self.fp32_partitioned_groups_flat)}; use DeepSpeed 0.18 or later, or stage 1 or 2."
        )

    def load(self: Any, checkpoint_dir: str) -> None:
        original(self, checkpoint_dir, *shapes)
        for group, settings in zip(self.optimizer.param_groups, _saved_settings(checkpoint_dir), strict=True):
            group.pop(bias_correction.GROUP_KEY, None)  # of the first group
            group.update(settings)

    packed_state.keep_formats(load, self, checkpoint_dir)


def _check_universal(
    original: Callable[..., None],
    self: Any,
    state_dict_list: Any,
    load_optimizer_states: bool = True,
    *args: Any,
    checkpoint_folder: Any = None,
    **kwargs: Any,
) -> None:
    original(self, state_dict_list, load_optimizer_states, *args, checkpoint_folder=checkpoint_folder, **kwargs)
    if checkpoint_folder and load_optimizer_states:
        groups = zip(self.optimizer.param_groups, _saved_settings(checkpoint_folder), strict=True)
        for number, (group, saved) in enumerate(groups):
            _check_settings(number, group, {name: saved[name] for name in self.optimizer.defaults.keys() & saved})
        masters = [] if self.swap_optimizer else self.fp32_partitioned_groups_flat
        for number, master in enumerate(masters):
            if master.numel() and not self.optimizer.state.get(master):
                raise RuntimeError(
                    f"DeepSpeed {_version()} has loaded no moments into sub-group {number} of {len(masters)} from a "
                    "universal checkpoint at stage 3; use stage 1 or 2."
                )


def _check_settings(number: int, group: dict[str, Any], saved: dict[str, Any]) -> None:
    own = {"state"}  # what loading leaves as this run has it: BalancedAdam.keeping_own
    if saved["betas"][0] != saved["betas"][1]:
        own.add("betas")
    for name, value in saved.items():
        if name not in own and group[name] != value:
            raise RuntimeError(
                f"DeepSpeed {_version()} loads a universal checkpoint at stage 3 in a way that BalancedAdam does not "
                f"know: {name} of parameter group {number} is {group[name]} and was saved as {value}; use stage 1 or 2."
            )


def _saved_settings(checkpoint_dir: str) -> list[dict[str, Any]]:
    """Of each parameter group, but for its parameters."""
    # The file that DeepSpeed itself has just unpickled; it holds settings and step counts, no moments.
    saved = torch.load(Path(checkpoint_dir) / "zero" / "optimizer_state.pt", weights_only=False)
    groups = saved["optimizer_state_dict"]["param_groups"]
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _version() -> str:
    return str(sys.modules["deepspeed"].__version__)
