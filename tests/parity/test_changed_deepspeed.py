"""Whatever DeepSpeed changes in its step, one pass is taken only where it has the bits of DeepSpeed's own passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.parity.cases import Case, advance, read, start
from tests.parity.changed_deepspeed import CHANGES, LATER, Change
from tests.parity.test_one_pass import FP16, MICRO, Observed, inputs, observe
from tests.parity.versions import why_not
from tests.ranks import spawn
from tests.session import shared

pytestmark = pytest.mark.ranks

STEPS = 3


class Found(NamedTuple):
    """One rank of an engine under a changed DeepSpeed."""

    taken: str
    reason: str | None
    reports: list[str]
    same: bool
    """Whether the weights and moments are those of DeepSpeed's own passes."""
    effective: bool
    """Whether they are not those of DeepSpeed as it is."""


def steps(case: Case) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    engine = start(case)
    advance(engine, 0, STEPS)
    state = read(engine)
    engine.destroy()
    return engine, state


def equal(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    return all(torch.equal(value, other[key][name]) for key, tensors in one.items() for name, value in tensors.items())


def job(numbers: list[int]) -> list[Found]:
    from balanced_adam.zero import decision, describe

    reports: list[str] = []
    decision._log = reports.append  # type: ignore[assignment]
    found = []
    for change in (CHANGES[number] for number in numbers):
        case = case_of(change)._replace(clip=1.0)
        _, unchanged = steps(case._replace(path="fused"))
        reports.clear()
        with change.made():
            engine, ours = steps(case)
            _, theirs = steps(case._replace(path="fused"))
        reason = decision.decision(engine.optimizer).obstacle
        same, effective = equal(ours, theirs), not equal(unchanged, theirs)
        found.append(Found(describe(engine.optimizer), reason, list(reports), same, effective))
    return found


def case_of(change: Change) -> Case:
    stage, accum = (1, "fp32") if change.stage == "bf16" else (int(change.stage), None)
    return Case(stage, "fp16" if "scale" in change.name else "bf16", change.offload, accum, clip=7.2)


def observe_later(numbers: list[int]) -> list[tuple[Observed, Observed, Observed]]:
    """Job: of each change the one pass, DeepSpeed's own passes, and these in DeepSpeed as it is."""
    found = []
    for change in (LATER[number] for number in numbers):
        case = case_of(change)
        unchanged = observe(case._replace(path="fused"))
        with change.made():
            found.append((observe(case), observe(case._replace(path="fused")), unchanged))
    return found


@shared
def later_outcomes() -> list[list[tuple[Observed, Observed, Observed]]]:
    """By rank, then by change that can be run here."""
    return spawn(observe_later, 2, [n for n, change in enumerate(LATER) if impossible(change) is None])


@shared
def outcomes() -> list[list[Found]]:
    """By rank, then by change."""
    return spawn(job, 2, [n for n, change in enumerate(CHANGES) if impossible(change) is None])


def impossible(change: Change) -> str | None:
    """Why it can't be made here."""
    if "scale" in change.name and not FP16:
        return "DeepSpeed refuses fp16 on this processor"
    return why_not(case_of(change))


def number_of(change: Change, among: list[Change]) -> int:
    """Its place among those that can be made."""
    if reason := impossible(change):
        pytest.skip(reason)
    return [each for each in among if impossible(each) is None].index(change)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_not_as_the_one_pass_needs_it_is_found_in_the_first_step(change: Change) -> None:
    number = number_of(change, CHANGES)
    ranks = [rank[number] for rank in outcomes()]
    for found in ranks:
        assert found.taken.endswith("in several passes") and found.reason
        assert found.same
    assert [len(found.reports) for found in ranks] in ([1, 0], [0, 1])  # by one rank, once
    (report,) = [each for found in ranks for each in found.reports]
    assert report.startswith("ZeRO's step is not taken in one pass: ")


def test_the_changes_change_something() -> None:
    """A change of the norm's kind, or of what is done in vain, does not; its reason says more than its weights."""
    harmless = {"flatten renamed", "gradients reused", "norm", "unscaled before it is flat", "copied before the step"}
    for number, change in enumerate(change for change in CHANGES if impossible(change) is None):
        effective = any(rank[number].effective for rank in outcomes())
        assert effective or change.name in harmless, str(change)


@pytest.mark.parametrize("change", LATER, ids=str)
def test_what_comes_up_later_is_checked_when_it_comes_up(change: Change) -> None:
    number = number_of(change, LATER)
    ranks = [rank[number] for rank in later_outcomes()]
    for ours, theirs, unchanged in ranks:
        assert equal(ours.state, theirs.state)
        assert not equal(ours.state, unchanged.state)
        assert ours.ways[0] == "Check" and ours.norms == pytest.approx(theirs.norms, rel=4e-16)
    by_own = [ours.ways[-1] != "OnePass" for ours, *_ in ranks]
    # The rank that holds the parameter decides alone where another has a gradient of all of its own.
    assert any(by_own) if change.name == "without a gradient" else all(by_own)


def differs_alone_then_together(path: str) -> tuple[list[str], str | None, dict[str, dict[str, Tensor]]]:
    """Job: a difference that the rank without a gradient sees alone; later all ranks clip for the first time."""
    from balanced_adam.zero import decision

    change = next(change for change in LATER if change.name == "without a gradient")
    with change.made():
        engine = start(case_of(change)._replace(clip=1e6, path=path))
        taken = decision.decision(engine.optimizer)
        plans = []
        for step in range(10):
            engine.optimizer.clip_grad = 1e6 if step < 8 else 1.0
            for micro in range(MICRO):
                engine.backward(engine(inputs(step, micro, torch.distributed.get_rank(), torch.bfloat16, False)))
                engine.step()
            plans.append("alone" if taken._differs_alone and taken.plan is decision.Plan.ONE_PASS else taken.plan.value)
        return plans, taken.obstacle, read(engine)


def test_a_rank_that_keeps_to_deepspeeds_passes_alone_still_decides_with_the_others() -> None:
    found, expected = spawn(differs_alone_then_together, 2, "one_pass"), spawn(differs_alone_then_together, 2, "fused")
    assert sorted(plans[7] for plans, *_ in found) == ["alone", "one pass"]
    assert [plans[8:] for plans, *_ in found] == [["in several passes"] * 2] * 2
    assert all(reason for _, reason, _ in found)
    assert all(equal(ours[2], theirs[2]) for ours, theirs in zip(found, expected, strict=True))
