"""The patches of DeepSpeed's defects, where DeepSpeed has moved a defect or mended it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from balanced_adam.state import MOMENTS
from tests.parity import test_resume as resume
from tests.parity.cases import PHANTOM, STEPS, Case, advance, read, start
from tests.parity.changed_deepspeed import gone
from tests.parity.compare import EXACT, differences
from tests.parity.control import State, train
from tests.parity.versions import since, why_not, why_not_universal
from tests.ranks import device, spawn

UNIVERSAL_LOAD = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"


def start_without(instead: Callable[..., Any] | None) -> State | str:
    """Job: the state after some steps at stage 0 in bf16 where the method that takes a step at the start has moved, or
    is another; or what was said."""
    gone(FP16_UnfusedOptimizer, "initialize_optimizer_states", instead)
    case = Case(0, "bf16", path="fused")
    try:
        engine = start(case)
    except RuntimeError as error:
        return str(error)
    advance(engine, 0, STEPS)
    return read(engine)


def nothing(_: Any) -> None:
    pass


@pytest.mark.ranks
def test_a_step_before_the_first_gradient_is_refused_wherever_deepspeed_takes_it() -> None:
    if reason := why_not(PHANTOM):
        pytest.skip(reason)
    (said,) = spawn(start_without, 1, None)
    assert isinstance(said, str) and said.startswith("DeepSpeed ")
    assert "takes a step before the first gradient" in said and "\n" not in said


@pytest.mark.ranks
def test_a_deepspeed_that_takes_no_step_before_the_first_gradient_needs_no_patch() -> None:
    case = Case(0, "bf16", path="fused")
    if reason := why_not(case):
        pytest.skip(reason)
    (state,) = spawn(start_without, 1, nothing)
    assert differences([state], train(STEPS, case.absent(), device=device(1))) == EXACT


def load_without(how: str) -> list[tuple[State, State] | str]:
    """Job: the states after loading a universal checkpoint at stage 3, and at the end, where DeepSpeed's method that
    loads it has moved, or is another; or what was said. With fp32 and with packed state, after other steps."""
    original: Any = inspect.unwrap(getattr(DeepSpeedZeroOptimizer_Stage3, UNIVERSAL_LOAD))

    def mended(self: Any, folder: str) -> None:
        original(self, folder)
        saved = torch.load(Path(folder) / "zero" / "optimizer_state.pt", weights_only=False)
        for group, settings in zip(
            self.optimizer.param_groups, saved["optimizer_state_dict"]["param_groups"], strict=True
        ):
            group.update({**settings, "params": group["params"]})

    def kept(self: Any, folder: str) -> None:
        state = self.optimizer.state[self.fp32_partitioned_groups_flat[-1]]
        old = dict(state)
        mended(self, folder)
        state.clear()
        state.update(old)

    def without(self: Any, folder: str) -> None:
        mended(self, folder)
        state = self.optimizer.state[self.fp32_partitioned_groups_flat[-1]]
        for moment in MOMENTS:
            del state[moment]

    others = {"moved": None, "mended": mended, "kept": kept, "without": without}
    gone(DeepSpeedZeroOptimizer_Stage3, UNIVERSAL_LOAD, others[how])
    found: list[tuple[State, State] | str] = []
    for case in (SAVED, SAVED._replace(state="packed16")):
        engine = start(case, checkpoint={"load_universal": True})
        advance(engine, 0, 2)
        try:
            engine.load_checkpoint(f"{resume.place()}/{SAVED}", tag="universal")
        except RuntimeError as error:
            found.append(str(error))
            continue
        loaded = read(engine)
        advance(engine, resume.CUT, resume.END)
        found.append((loaded, read(engine)))
    return found


SAVED = Case(3, "bf16")


def loaded_where(how: str) -> list[Any]:
    """What :func:`load_without` found on one rank."""
    if reason := why_not_universal(SAVED):
        pytest.skip(reason)
    resume.convert()
    (found,) = spawn(load_without, 1, how)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["moved", "mended"])
def test_a_universal_checkpoint_at_stage_3_is_loaded_right_by_whichever_method_deepspeed_does_it(how: str) -> None:
    for (loaded, end), later in zip(loaded_where(how), ((), ((resume.CUT, "packed16"),)), strict=True):
        assert differences([loaded], train(resume.CUT, SAVED.absent(), device=device(1))) == EXACT
        assert differences([end], train(resume.END, SAVED.absent(), device=device(1), later=later)) == EXACT


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["kept", "without"])
def test_moments_that_a_universal_checkpoint_at_stage_3_did_not_bring_are_missed(how: str) -> None:
    for said in loaded_where(how):
        assert isinstance(said, str) and "has loaded no moments into sub-group " in said and "\n" not in said


FEATURES: list[tuple[str, dict[str, Any], str]] = [
    (
        "0.17.6",
        {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {"topk_ratio": 0.1, "overlap_step": False}},
        "zero_optimization.zenflow is given, and ZenFlow steps the weights that it selects with an AdamW of its own, "
        "not with BalancedAdam; remove it.",
    ),
    (
        "0.18.4",
        {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
        "zero_optimization.offload_optimizer.super_offload is True, and SuperOffload steps in a process of its own",
    ),
    (
        "0.16.9",
        {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}},
        "zero_optimization.offload_optimizer.ratio is 0.3, and DeepSpeed steps what it doesn't offload with torch's",
    ),
]
"""The DeepSpeed that has it, a section, and what is said."""


def refused(section: dict[str, Any]) -> str:
    """Job: what an engine with this section says."""
    try:
        start(Case(section["stage"], "bf16"), zero_optimization=section)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize(("version", "section", "sentence"), FEATURES, ids=["zenflow", "super_offload", "ratio"])
def test_a_feature_that_steps_with_another_optimizer_is_refused(
    version: str, section: dict[str, Any], sentence: str
) -> None:
    if not since(version):
        pytest.skip("this DeepSpeed has no such feature")
    (said,) = spawn(refused, 1, section)
    assert said.startswith(sentence)
