"""ZeRO's step in one pass against DeepSpeed's own passes: the same bits, in everything that a user can see."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from balanced_adam.zero.decision import decision
from tests.parity.cases import STEPS as EXACT_STEPS
from tests.parity.cases import Case, advance, read, start
from tests.parity.compare import EXACT, differences
from tests.parity.control import train
from tests.parity.model import SHAPES, TRAINED
from tests.parity.versions import possible, since
from tests.ranks import spawn
from tests.session import shared

pytestmark = pytest.mark.ranks

WORLD, STEPS, MICRO = 2, 10, 2
OVERFLOW_IN, ABSENT_IN = 4, 6
FP16 = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()) or torch.cuda.is_available()


class Observed(NamedTuple):
    """One engine after its steps."""

    state: dict[str, dict[str, Tensor]]
    norms: list[float]
    scales: list[float]
    skipped: int
    gradients: dict[str, Tensor]
    """What safe_get_full_grad showed before the last step."""
    ways: list[str]
    """How each step was taken: ``Check``, ``OnePass``, or ``DeepSpeed``."""
    handed: list[int]
    """By step: gradients that the engine's optimizer was handed instead of given."""


def dtypes() -> list[str]:
    return ["fp32", "bf16", *(["fp16"] if FP16 else [])]


def cases(path: str) -> list[Case]:
    """Every stage, dtype and accumulation; clipping that sets in now and then, and none."""
    found = []
    for stage, dtype, clip in product((1, 2, 3), dtypes(), (0.0, 7.2)):
        for offload in (False, True) if stage > 1 else (False,):
            for accum in (None, "fp32") if dtype == "bf16" else (None,):
                found.append(Case(stage, dtype, offload, accum, clip, path))
    for stage, state in product((1, 2, 3), ("packed16", "packed8")):
        for offload in (False, True) if stage > 1 else (False,):
            found.append(Case(stage, dtypes()[-1], offload, clip=7.2, path=path, state=state))
    return found


def inputs(step: int, micro: int, rank: int, dtype: torch.dtype, overflow: bool = True) -> dict[str, Tensor]:
    """Any numbers, unlike the exact ones of model.py; once an infinity on one rank, once a parameter left out."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if step == OVERFLOW_IN and rank == 1 and overflow:
        values["long"][3] = torch.inf
    if step == ABSENT_IN:
        del values["sometimes"]
    return {name: value.to(dtype) for name, value in values.items()}


def overflows(case: Case) -> bool:
    """Whether there is an infinity among the gradients, which DeepSpeed skips. Up to 0.19.7 it looks for one in fp16
    alone, and from 0.19.5 in bf16 at stages 1 and 2, where it was told to before (bf16.check_grad_overflow)."""
    looks = case.dtype == "fp16" or (case.dtype == "bf16" and case.stage < 3 and since("0.19.5"))
    return since("0.19.8") or (looks and not (case.stage == 1 and bool(case.grad_accum)))


def job(cases: list[Case]) -> dict[Case, Observed]:
    return {case: observe(case) for case in cases}


def observe(case: Case) -> Observed:
    from deepspeed.utils import safe_get_full_grad

    more: dict[str, Any] = {}
    if case.dtype == "fp16":  # the scale grows every second step, and shrinks at the overflow
        more = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}}
    engine = start(case, **more)
    taken, set_fused_grad = decision(engine.optimizer), engine.optimizer.optimizer.set_fused_grad
    ways: list[str] = []
    handed: list[int] = []
    end = taken.end

    def recorded() -> None:
        ways.append("DeepSpeed" if taken.way is None else type(taken.way).__name__)
        end()

    def counted(*arguments: Any, **more: Any) -> bool:
        done = bool(set_fused_grad(*arguments, **more))
        handed[-1] += done
        return done

    taken.end = recorded  # type: ignore[method-assign]
    engine.optimizer.optimizer.set_fused_grad = counted
    rank = torch.distributed.get_rank()
    norms, scales, gradients = [], [], {}
    dtype = next(engine.module.parameters()).dtype
    for step in range(STEPS):
        handed.append(0)
        for micro in range(MICRO):
            given = inputs(step, micro, rank, dtype, overflows(case))
            engine.backward(engine({name: value.to(engine.device) for name, value in given.items()}))
            if step == STEPS - 1 and micro == MICRO - 1:
                named = [(n, p) for n, p in engine.module.named_parameters() if n in TRAINED]
                full = {name: safe_get_full_grad(param) for name, param in named}
                gradients = {name: grad.detach().cpu().clone() for name, grad in full.items() if grad is not None}
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        scales.append(float(getattr(engine.optimizer, "loss_scale", 1.0)))
    observed = Observed(read(engine), norms, scales, engine.skipped_steps, gradients, ways, handed)
    engine.destroy()
    return observed


@shared
def observations(path: str) -> dict[Case, Observed]:
    return spawn(job, WORLD, possible(cases(path)))[0]


@pytest.mark.parametrize("case", cases("one_pass"), ids=str)
def test_weights_moments_norms_scales_and_gradients_are_those_of_deepspeeds_own_passes(case: Case) -> None:
    ours, theirs = observations("one_pass")[case], observations("torch")[case._replace(path="torch")]
    if case.stage == 3 and not case.offload:  # the one norm in double, and sums in another order
        assert ours.norms == pytest.approx(theirs.norms, rel=4e-16, abs=0.0)
    else:
        assert ours.norms == theirs.norms
    assert ours.scales == theirs.scales
    assert ours.skipped == theirs.skipped
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert torch.equal(ours.gradients[name], gradient), name
    for key, tensors in theirs.state.items():
        for name, value in tensors.items():
            assert torch.equal(ours.state[key][name], value), (key, name)
            assert value.isfinite().all() or case.dtype == "fp32"  # fp32 is not scanned for overflow


@pytest.mark.parametrize("case", cases("one_pass"), ids=str)
def test_every_step_that_is_not_skipped_is_handed_over(case: Case) -> None:
    """But those that are checked: the first, and where something comes up for the first time."""
    ours, theirs = observations("one_pass")[case], observations("torch")[case._replace(path="torch")]
    assert theirs.ways == ["DeepSpeed"] * STEPS and sum(theirs.handed) == 0
    if case.dtype != "fp32" and overflows(case):
        assert ours.skipped >= 1
    assert ours.ways[0] == "Check" and set(ours.ways) == {"Check", "OnePass"}
    news = 1 + bool(case.clip) + (case.dtype == "fp16") + 1  # first; clipped or not; loss scale; an absent gradient
    assert ours.ways.count("Check") <= news
    groups = 2 if case.stage < 3 else 4  # parameter groups, or sub-groups
    in_full = [n for n, way in zip(ours.handed, ours.ways, strict=True) if way == "OnePass" and n >= groups]
    assert len(in_full) >= ours.ways.count("OnePass") - ours.skipped
    assert len(in_full) >= STEPS - news - ours.skipped


def test_the_runs_clip_and_overflow_as_they_should() -> None:
    for case in possible(cases("torch")):
        norms = [norm for norm in observations("torch")[case].norms if norm != float("inf")]
        assert min(norms) < 7.2 < max(norms)
    if FP16:
        scales = observations("torch")[Case(2, "fp16", path="torch")].scales
        assert len(set(scales)) > 2 and scales[OVERFLOW_IN] < scales[OVERFLOW_IN - 1]


def obstacles(configurations: dict[str, tuple[Case, dict[str, Any]]]) -> dict[str, str | None]:
    """Job: why the step is not taken in one pass."""
    found = {}
    for name, (case, more) in configurations.items():
        engine = start(case, **more)
        found[name] = decision(engine.optimizer).obstacle
        engine.destroy()
    return found


def test_what_is_not_recognised_takes_deepspeeds_own_passes_and_says_why() -> None:
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    configurations = {
        "as it should be": (Case(2, "bf16"), {}),
        "turned off": (Case(2, "bf16", path="fused"), {}),
        "in plain torch": (Case(2, "bf16", path="torch"), {}),
        "bf16 master weights": (Case(2, "bf16"), {"bf16": bf16}),
    }
    expected = {
        "as it should be": None,
        "turned off": "fused or fused_zero is false",
        "in plain torch": "fused or fused_zero is false",
        "bf16 master weights": "the master weights are torch.bfloat16",
    }
    if not since("0.18"):  # which has no bf16 master weights
        del configurations["bf16 master weights"], expected["bf16 master weights"]
    (found,) = spawn(obstacles, 1, configurations)
    assert found == expected


def hooked(cases: list[Case]) -> list[tuple[bool, list[str]]]:
    """Job: with a hook on the optimizer's step, which wants to find gradients where they always are."""
    from balanced_adam.zero import decision

    found = []
    for case in cases:
        said: list[str] = []
        decision._log = said.append  # type: ignore[assignment]
        engine = start(case)
        engine.optimizer.optimizer.register_step_pre_hook(lambda *_: None)
        advance(engine, 0, EXACT_STEPS)
        found.append((differences([read(engine)], train(EXACT_STEPS, case.absent())) == EXACT, said))
        engine.destroy()
    return found


def test_a_gradient_that_cannot_be_handed_over_takes_deepspeeds_passes_and_the_log_says_so_once() -> None:
    (found,) = spawn(hooked, 1, possible([Case(2, "bf16"), Case(3, "bf16")]))
    for exact, said in found:
        assert exact
        assert len(said) == 1
        assert "could not be taken in one pass" in said[0] and "step hooks" in said[0]


def with_a_method_replaced(job: tuple[int, str]) -> tuple[str, bool, bool]:
    """Job: other code clips by value in a method of DeepSpeed's, since before our registration or after it. How the
    step is taken, whether the weights are those of DeepSpeed's own passes, and whether the clipping did anything."""
    from balanced_adam.zero import describe, partitions, register

    stage, order = job
    owner, name = partitions.classes()[stage == 3], "unscale_and_clip_grads"
    ours = vars(owner)[name]
    original = ours if order == "after" else ours.__wrapped__

    @functools.wraps(original)
    def by_value(self: Any, grads: Any, norm: Any) -> None:
        original(self, grads, norm)
        lists = grads if isinstance(grads, list) else [self.fp32_partitioned_groups_flat[grads].grad]
        for gradient in lists:
            gradient.clamp_(-(2.0**-6), 2.0**-6)

    def weights(path: str) -> tuple[str, dict[str, Tensor]]:
        engine = start(Case(stage, "bf16", clip=7.2, path=path))
        advance(engine, 0, 2)
        return describe(engine.optimizer), read(engine)["weights"]

    _, plain = weights("fused")
    setattr(owner, name, by_value)
    register()
    said, mine = weights("one_pass")
    _, theirs = weights("fused")
    same = all(torch.equal(mine[key], theirs[key]) for key in theirs)
    return said, same, all(torch.equal(plain[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_method_that_other_code_has_replaced_is_used_and_not_one_pass(stage: int, order: str) -> None:
    ((said, same, ineffective),) = spawn(with_a_method_replaced, 1, (stage, order))
    assert said == f"CPU fused, ZeRO-{stage} in several passes" and same and not ineffective


def norms_after_a_look(path: str) -> list[float]:
    """Job: the norms of two steps before which somebody scans for overflow, and then changes a gradient."""
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    engine = start(Case(2, "fp32", clip=7.2, path=path))
    norms = []
    for step in range(2):
        advance_without_a_step(engine, step)
        engine.optimizer.has_overflow()
        for param in engine.module.parameters():
            if (grad := safe_get_full_grad(param)) is not None:
                safe_set_full_grad(param, grad * 8.0)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def advance_without_a_step(engine: Any, step: int) -> None:
    """The micro-batches of a step, the last one without the step itself."""
    for micro in range(MICRO):
        engine.backward(engine(inputs(step, micro, 0, torch.float32)))
        if micro < MICRO - 1:
            engine.step()


def test_a_look_for_overflow_before_a_step_leaves_no_stale_norm() -> None:
    (ours,), (theirs,) = spawn(norms_after_a_look, 1, "one_pass"), spawn(norms_after_a_look, 1, "fused")
    assert ours == theirs
