"""Registration with DeepSpeed: what it rests on, that it is safe to repeat, and that it fails in words."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import tensor_fragment

from balanced_adam import BalancedAdam, register
from balanced_adam.warn import _warned
from balanced_adam.zero import packed_state, patches
from tests.parity.cases import PHANTOM, Case, advance, of_the_wrong, read, start
from tests.parity.changed_deepspeed import gone
from tests.parity.control import TENSORS
from tests.parity.test_one_pass import FP16
from tests.parity.test_patches import UNIVERSAL_LOAD
from tests.parity.versions import possible, since, why_not
from tests.ranks import spawn

PATCHED = [(cls, name) for cls, name, _ in patches.overrides()]


def test_deepspeed_looks_names_up_in_torch_optim() -> None:
    assert torch.optim.BalancedAdam is BalancedAdam  # type: ignore[attr-defined]
    assert DeepSpeedEngine._is_supported_optimizer(None, "BalancedAdam")
    source = inspect.getsource(DeepSpeedEngine._configure_basic_optimizer)
    assert "getattr(torch.optim, self.optimizer_name())" in source


def named(name: str) -> str:
    """Job: the class of the optimizer that an engine has by that name."""
    case = Case(1, "bf16")
    optimizer = {"type": name, "params": case.config(1)["optimizer"]["params"]}
    engine = start(case, optimizer=optimizer)
    return type(engine.basic_optimizer).__name__


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["BalancedAdam", "balancedadam"])
def test_the_name_may_be_in_lower_case_as_deepspeeds_own(name: str) -> None:
    assert spawn(named, 1, name) == ["BalancedAdam"]


def test_zero_asks_for_the_exact_type() -> None:
    assert BalancedAdam in zero_utils.ZERO_SUPPORTED_OPTIMIZERS
    assert "type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS" in inspect.getsource(zero_utils.is_zero_supported_optimizer)
    assert engine_module.is_zero_supported_optimizer is zero_utils.is_zero_supported_optimizer


@pytest.mark.parametrize(
    ("defect", "method"),
    [
        ("self.optimizer.step()", PATCHED[0]),
        ('["param_groups"][0]', (DeepSpeedZeroOptimizer_Stage3, UNIVERSAL_LOAD)),
    ],
)
def test_the_mended_methods_still_have_their_defects(defect: str, method: tuple[type, str]) -> None:
    """When this fails DeepSpeed has changed them: see whether the patch is still needed."""
    wrapped = getattr(*method)
    if method[1] == UNIVERSAL_LOAD and not since("0.18"):
        pytest.skip("DeepSpeed before 0.18 has another: it loads the first sub-group alone, which is refused")
    assert defect in inspect.getsource(wrapped.__wrapped__)
    assert not hasattr(wrapped.__wrapped__, "__wrapped__")


def test_registering_again_changes_nothing() -> None:
    before = [getattr(*method) for method in PATCHED], list(zero_utils.ZERO_SUPPORTED_OPTIMIZERS)
    register()
    register()
    assert ([getattr(*method) for method in PATCHED], list(zero_utils.ZERO_SUPPORTED_OPTIMIZERS)) == before
    assert zero_utils.ZERO_SUPPORTED_OPTIMIZERS.count(BalancedAdam) == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (zero_utils, "ZERO_SUPPORTED_OPTIMIZERS"),
        (DeepSpeedEngine, "_is_supported_optimizer"),
        (DeepSpeedEngine, "_configure_zero_optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_moved_hook_point_is_an_error_that_names_the_version(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=r"can't register with DeepSpeed .*tested with DeepSpeed 0\.19\.8"):
        register()


def test_a_hook_point_that_means_something_else_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    others = tuple(cls for cls in zero_utils.ZERO_SUPPORTED_OPTIMIZERS if cls is not BalancedAdam)
    for owner, name, other in (
        (zero_utils, "ZERO_SUPPORTED_OPTIMIZERS", others),
        (DeepSpeedEngine, "_is_supported_optimizer", lambda self, name, more: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            with pytest.raises(RuntimeError, match=r"can't register with DeepSpeed .*tested with DeepSpeed 0\.19\.8"):
                register()


def test_names_that_no_longer_resolve_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedEngine, "_is_supported_optimizer", lambda self, name: False)
    with pytest.raises(RuntimeError, match=r"no longer resolves.*0\.19\.8"):
        register()


def test_another_class_of_that_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "BalancedAdam", torch.optim.SGD)
    with pytest.raises(RuntimeError, match="another class"):
        register()
    assert torch.optim.BalancedAdam is torch.optim.SGD  # type: ignore[attr-defined]


def test_other_optimizers_are_left_as_they_were() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.zeros(1)
    other = torch.optim.AdamW([weight])
    wrapper = SimpleNamespace(optimizer=other, fp16_groups=[], fp32_groups=[])  # what DeepSpeed's method reads
    FP16_UnfusedOptimizer.initialize_optimizer_states(wrapper)
    assert int(other.state[weight]["step"]) == 1  # the phantom step


@pytest.mark.ranks
def test_without_the_mend_stage_0_in_16_bits_is_one_step_ahead() -> None:
    if reason := why_not(PHANTOM):
        pytest.skip(reason)
    assert of_the_wrong()[PHANTOM]["weights"] > 0  # with the patch: test_exact.py


def refusal(job: tuple[Case, dict[str, Any]]) -> str:
    """Job: what an engine says to a config with these entries."""
    case, entries = job
    try:
        start(case, **entries)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.ranks
@pytest.mark.skipif(not FP16, reason="DeepSpeed refuses fp16 on this processor before we can")
def test_an_engine_in_fp16_at_stage_0_is_refused() -> None:
    (said,) = spawn(refusal, 1, (Case(0, "fp16"), {"fp16": {"enabled": True}}))
    assert said.startswith("zero_optimization.stage is 0 with fp16.enabled") and said.endswith(
        "use bf16, or stage 1, 2 or 3."
    )
    assert "\n" not in said


@pytest.mark.ranks
def test_an_elastic_checkpoint_with_a_packed_state_is_refused() -> None:
    case = Case(1, "bf16", state="packed16")
    elastic = {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}
    (said,) = spawn(refusal, 1, (case, elastic))
    assert said.startswith("zero_optimization.elastic_checkpoint is true and state is 'packed16'") and "\n" not in said
    assert spawn(refusal, 1, (case._replace(state="fp32"), elastic)) == ["accepted"]


def set_a_moment(cases: list[Case]) -> list[str]:
    """Job: what an engine says to whom sets one moment of a packed state."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    said = []
    for case in cases:
        engine = start(case)
        advance(engine, 0, 1)
        before = read(engine)
        param = next(p for p in engine.module.parameters() if p.requires_grad)
        for set_state in (safe_set_full_optimizer_state, safe_set_local_optimizer_state)[: case.stage - 1]:
            try:
                set_state(param, torch.zeros(getattr(param, "ds_shape", param.shape)), "exp_avg")
            except RuntimeError as error:
                said.append(str(error))
        after = read(engine)
        assert all(torch.equal(after[key][name], value) for key in TENSORS for name, value in before[key].items())
        engine.destroy()
    return said


@pytest.mark.ranks
def test_one_moment_of_a_packed_state_can_not_be_set() -> None:
    (said,) = spawn(set_a_moment, 1, [Case(2, "bf16", state="packed16"), Case(3, "bf16", state="packed16")])
    refusal = (
        "exp_avg can't be set on its own: BalancedAdam stores it in one word with the other moment; use state='fp32'."
    )
    assert said == [refusal] * 3


FOREIGN = [
    Case(1, "bf16"),
    Case(1, "bf16", grad_accum="fp32"),
    Case(2, "fp32"),
    Case(2, "bf16", offload=True),
    Case(3, "bf16"),
]


def go_on_with_adamw(folder: str) -> list[tuple[list[int], bool]]:
    """Job: torch's AdamW under DeepSpeed saves, BalancedAdam goes on; its step counts, and whether all is finite."""
    found = []
    for case in possible(FOREIGN):
        adamw = {"type": "AdamW", "params": {"lr": 0.5, "torch_adam": True}}
        zero = case.config(torch.distributed.get_world_size())["zero_optimization"]
        more = {"optimizer": adamw, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        engine = start(case, **more, zero_optimization=zero)
        advance(engine, 0, 2)
        engine.save_checkpoint(f"{folder}/{case}", tag="adamw")
        engine.destroy()
        engine = start(case)
        assert engine.load_checkpoint(f"{folder}/{case}", tag="adamw")[0]
        advance(engine, 2, 4)
        steps = [int(state["step"]) for state in engine.basic_optimizer.state.values()]
        found.append((steps, all(t.isfinite().all() for values in read(engine).values() for t in values.values())))
        engine.destroy()
    return found


@pytest.mark.ranks
def test_a_checkpoint_of_torchs_adamw_under_deepspeed_is_gone_on_with(tmp_path: Path) -> None:
    if since("0.18.9") and not since("0.19"):
        pytest.skip("DeepSpeed 0.18.9 fails on several CPU ranks with every optimizer but BalancedAdam")
    for found in spawn(go_on_with_adamw, 2, str(tmp_path)):
        assert all(set(steps) == {4} and finite for steps, finite in found) and len(found) == len(possible(FOREIGN))


def bf16_states(cases: list[Case]) -> list[str]:
    """Job: what is said where DeepSpeed is told to keep moments in bf16."""
    said = []
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in cases:
            _warned.clear()
            start(case, bf16=bf16).destroy()
            said += [str(each.message) for each in caught if "bf16_optimizer_states" in str(each.message)]
            caught.clear()
    return said


@pytest.mark.ranks
def test_bf16_optimizer_states_which_change_nothing_are_named() -> None:
    if not since("0.18"):
        pytest.skip("DeepSpeed before 0.18 has no bf16_optimizer_states")
    (said,) = spawn(bf16_states, 1, [Case(stage, "bf16") for stage in (1, 2, 3)])
    assert [each[:58] for each in said] == ["bf16.bf16_optimizer_states is true, and changes nothing fo"] * 3


def lacking(number: int) -> list[str]:
    """Job: what two engines say where DeepSpeed lacks one of the methods and functions that packed state needs."""
    from balanced_adam.zero import registration

    packed: list[tuple[Any, str]] = [(cls, name) for cls, name, _ in packed_state.overrides()]
    gone(*[*packed, (tensor_fragment, "get_optim_state_fragment")][number])
    register()
    register()
    assert registration.refusal() is None
    said = []
    for case in (Case(2, "bf16"), Case(2, "bf16", state="packed16")):
        try:
            start(case).destroy()
            said.append("accepted")
        except RuntimeError as error:
            said.append(str(error))
    return said


POINTS = [*(name for _, name, _ in packed_state.overrides()), "get_optim_state_fragment"]


@pytest.mark.ranks
@pytest.mark.parametrize("number", range(len(POINTS)), ids=lambda number: f"{number}-{POINTS[number]}")
def test_where_a_method_that_packed_state_needs_is_gone_only_packed_state_is_refused(number: int) -> None:
    (said,) = spawn(lacking, 1, number)
    assert said[0] == "accepted"
    assert POINTS[number] in said[1] and 'without which BalancedAdam takes no "state" but "fp32"' in said[1]
    assert "\n" not in said[1]


@pytest.mark.parametrize("how", ["renamed", "gone"])
def test_where_universal_checkpoints_can_not_be_told_from_others_registration_refuses(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_state_dict(
        self: Any, state_dict_list: Any, load_optimizer_states: bool = True, folder: Any = None
    ) -> None:
        pass

    if how == "renamed":
        monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "load_state_dict", load_state_dict)
    else:
        for cls in DeepSpeedZeroOptimizer_Stage3.__mro__:
            if "load_state_dict" in vars(cls):
                monkeypatch.delattr(cls, "load_state_dict")
    with pytest.raises(RuntimeError, match=r"can't register with DeepSpeed .*load_state_dict"):
        register()
