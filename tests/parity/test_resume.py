"""A run that is cut at step 10 and goes on is the uncut run, to the last bit; also on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from balanced_adam.zero.decision import Plan, decision
from tests import session
from tests.parity.cases import Case, advance, read, start
from tests.parity.compare import EXACT, differences
from tests.parity.control import State, train
from tests.parity.mutants import wrong
from tests.parity.versions import possible, since, why_not, why_not_universal
from tests.ranks import Program, device, environment, spawn
from tests.ranks import start as start_program
from tests.session import shared

pytestmark = pytest.mark.ranks

# The parameter "sometimes" has a gradient in steps 10 and 11, and none in step 12: DeepSpeed's checkpoints do not hold
# the stale gradients of ``Case.absent``, so that a run cut just before such a step could not be resumed exactly.
CUT, END = 10, 20
SAVED_BY, MORE = 2, 4
ZERO = [
    Case(1, "fp32"),
    Case(1, "bf16"),
    Case(1, "bf16", grad_accum="fp32"),
    Case(2, "bf16"),
    Case(2, "bf16", offload=True),
    Case(3, "fp32"),
    Case(3, "bf16"),
    Case(3, "bf16", offload=True),
    *(Case(stage, "bf16", path="torch", variant=variant) for stage in (1, 2, 3) for variant in ("adamp", "l3")),
    Case(3, "fp32", path="torch", variant="adamnc"),
]
PACKED = [  # which DeepSpeed's own converter doesn't know; test_elastic.py has the harness's
    Case(0, "fp32", path="fused", state="packed8"),
    Case(1, "bf16", state="packed16"),
    Case(1, "bf16", grad_accum="fp32", state="packed8"),
    Case(2, "bf16", offload=True, state="packed8"),
    Case(3, "bf16", state="packed16"),
    Case(3, "fp32", offload=True, state="packed32"),
    Case(2, "bf16", path="torch", variant="l3", state="packed16"),
    Case(3, "bf16", path="torch", variant="adamp", state="packed16"),
    *(Case(stage, "bf16", path="torch", variant="amsgrad") for stage in range(4)),
]
RIGID = [Case(0, "fp32"), Case(0, "bf16"), *ZERO, *PACKED]
SWITCHES = [
    (Case(1, "bf16"), "packed16"),
    (Case(1, "bf16", state="packed16"), "packed8"),
    (Case(1, "bf16", grad_accum="fp32", state="packed8"), "packed32"),
    (Case(2, "bf16", offload=True, state="packed8"), "fp32"),
    (Case(3, "bf16"), "packed8"),
    (Case(3, "bf16", state="packed16"), "fp32"),
    (Case(3, "fp32", offload=True, state="packed32"), "packed16"),
    (Case(0, "fp32", path="fused", state="packed8"), "packed16"),
]
"""A run that was saved, and the format it goes on in."""
SETTINGS_OF_GROUP_0 = Case(3, "bf16", mutant="settings_of_group_0")


class Load(NamedTuple):
    """What a rank needs to go on from a checkpoint."""

    folder: str
    cases: list[Case]
    universal: bool


Resumed = tuple[State, State]
"""The state just after loading, and at the end."""


def save(what: tuple[str, list[Case]]) -> dict[Case, Resumed]:
    """Job: run to the end, with a checkpoint in the folder at the cut; the state at the cut and at the end."""
    folder, cases = what
    results = {}
    for case in possible(cases):
        engine = start(case)
        advance(engine, 0, CUT)
        engine.save_checkpoint(f"{folder}/{case}", tag="cut")
        at_cut = read(engine)
        advance(engine, CUT, END)
        results[case] = at_cut, read(engine)
        engine.destroy()
    return results


def load(what: Load) -> dict[Case, Resumed]:
    """Job: start anew, load, run to the end."""
    results = {}
    for case in convertible(what.cases) if what.universal else possible(what.cases):
        with wrong(case.mutant):
            engine = start(case, checkpoint={"load_universal": what.universal})
            path, _ = engine.load_checkpoint(f"{what.folder}/{case}", tag="universal" if what.universal else "cut")
            assert path is not None, f"{case}: nothing loaded"
            loaded = read(engine)
            advance(engine, CUT, END)
            if case.stage and case.path == "one_pass" and case.mutant is None:
                assert decision(engine.optimizer).plan is Plan.ONE_PASS, decision(engine.optimizer).obstacle
            results[case] = loaded, read(engine)
            engine.destroy()
    return results


def convertible(cases: list[Case]) -> list[Case]:
    return [case for case in cases if why_not_universal(case) is None]


def possible_switches() -> list[tuple[Case, str]]:
    return [(case, state) for case, state in SWITCHES if why_not(case) is None]


def switch(folder: str) -> list[State]:
    """Job: load what was saved in one format into a run with another, and run to the end."""
    results = []
    for case, state in possible_switches():
        engine = start(case._replace(state=state))
        path, _ = engine.load_checkpoint(f"{folder}/{case}", tag="cut")
        assert path is not None, f"{case}: nothing loaded"
        advance(engine, CUT, END)
        results.append(read(engine))
        engine.destroy()
    return results


MOVED = [
    case for case in RIGID if case.stage in (1, 2) and not case.offload and not (case.stage == 1 and case.grad_accum)
]
"""The others can't: BF16_Optimizer and stage 0 have no offload_states, stage 3's takes DeepSpeed's FusedAdam alone."""


def move(_: str) -> dict[Case, State]:
    """Job: run to the cut, move all state to the host and back, run to the end."""
    results = {}
    for case in possible(MOVED):
        engine = start(case)
        advance(engine, 0, CUT)
        engine.offload_states(pin_memory=False)
        for state in engine.basic_optimizer.state.values():  # on a CPU they are where they were; let them be elsewhere
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)})
        engine.reload_states()
        advance(engine, CUT, END)
        results[case] = read(engine)
        engine.destroy()
    return results


FOREIGN = [
    (Case(stage, "bf16", path="torch", variant=saved), Case(stage, "bf16", path="torch", variant=variant))
    for stage in (1, 3)
    for saved, variant in (("adam", "l3"), ("l3", "adam"), ("l3", "l1"), ("amsgrad", "amsgrad"))
]
"""Universal checkpoints whose second moment is another than that of who loads it."""


def refuse(folder: str) -> list[str]:
    """Job: what is said where one of these is loaded, and a step is taken."""
    said = []
    for saved, case in FOREIGN:
        engine = start(case, checkpoint={"load_universal": True})
        try:
            engine.load_checkpoint(f"{folder}/{saved._replace(path=PATH[saved.variant])}", tag="universal")
            advance(engine, CUT, CUT + 1)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("")
        engine.destroy()
    return said


PATH = {"adam": "one_pass", "l3": "torch", "amsgrad": "torch"}


def place() -> Path:
    """Where the checkpoints are, each in the folder of its case."""
    return session.folder() / "checkpoints-of-resume"


@shared
def uncut() -> list[dict[Case, Resumed]]:
    """The uncut runs, which leave the checkpoints."""
    place().mkdir()
    return spawn(save, SAVED_BY, (str(place()), RIGID))


@shared
def moved() -> list[dict[Case, State]]:
    return spawn(move, SAVED_BY, "")


@shared
def switched() -> list[list[State]]:
    uncut()
    return spawn(switch, SAVED_BY, str(place()))


@shared
def convert() -> None:
    """DeepSpeed's own converter makes a universal checkpoint of each."""
    uncut()
    for number, case in enumerate(convertible([*ZERO, *(saved for saved, _ in FOREIGN if saved.variant == "amsgrad")])):
        to_universal(place() / str(case), fresh=number == 0)  # one as users start it


def to_universal(here: Path, *, fresh: bool) -> None:
    """Convert the checkpoint "cut" of this folder."""
    arguments = ["--input_folder", f"{here}/cut", "--output_folder", f"{here}/universal"]
    arguments += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    settings = environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    program = Program("deepspeed.checkpoint.ds_to_universal", arguments, settings, here / "log", None)
    converter = start_program(program, fresh=fresh)
    assert converter.wait() == 0, f"{here.name}: {converter.said()[-2000:]}"


@shared
def resumed(world: int, universal: bool) -> list[dict[Case, Resumed]]:
    """The runs that went on from the checkpoints."""
    uncut()
    if universal:
        convert()
    cases = [*ZERO, SETTINGS_OF_GROUP_0] if universal else RIGID
    return spawn(load, world, Load(str(place()), cases, universal))


def check(world: int, universal: bool, case: Case) -> None:
    """The state after loading is that of the cut, and the state at the end is that of the uncut run."""
    saved, ranks = uncut()[0][case], [rank[case] for rank in resumed(world, universal)]
    assert differences([loaded for loaded, _ in ranks], saved[0]) == EXACT
    assert differences([end for _, end in ranks], saved[1]) == EXACT


@pytest.mark.parametrize("case", RIGID, ids=str)
def test_the_uncut_run_is_the_control(case: Case) -> None:
    for when, steps in enumerate((CUT, END)):
        states = [rank[case][when] for rank in uncut()]
        control = train(steps, case.absent(), device=device(SAVED_BY), stored=case.state, variant=case.variant)
        assert differences(states, control) == EXACT


@pytest.mark.parametrize("case", RIGID, ids=str)
def test_resumed_on_as_many_ranks(case: Case) -> None:
    check(SAVED_BY, False, case)


@pytest.mark.parametrize("case", MOVED, ids=str)
def test_state_that_went_to_the_host_and_back_goes_on_as_if_it_had_not(case: Case) -> None:
    if not since("0.17"):
        pytest.skip("DeepSpeed before 0.17 moves no state at stages 1 and 2")
    assert differences([rank[case] for rank in moved()], uncut()[0][case][1]) == EXACT


@pytest.mark.parametrize("number", range(len(SWITCHES)), ids=[f"{case}-to-{state}" for case, state in SWITCHES])
def test_a_run_goes_on_in_another_format_as_one_process_would(number: int) -> None:
    case, state = SWITCHES[number]
    if reason := why_not(case):
        pytest.skip(reason)
    control = train(END, case.absent(), device=device(SAVED_BY), stored=case.state, later=((CUT, state),))
    assert differences([rank[possible_switches().index((case, state))] for rank in switched()], control) == EXACT


@pytest.mark.parametrize("case", ZERO, ids=str)
def test_resumed_on_more_ranks_through_a_universal_checkpoint(case: Case) -> None:
    if reason := why_not_universal(case):
        pytest.skip(reason)
    check(MORE, True, case)  # fewer, and other stages: test_elastic.py


def test_without_the_mend_a_universal_checkpoint_at_stage_3_mixes_up_the_groups() -> None:
    if reason := why_not_universal(SETTINGS_OF_GROUP_0):
        pytest.skip(reason)
    right = uncut()[0][Case(3, "bf16")]
    loaded, end = resumed(MORE, True)[0][SETTINGS_OF_GROUP_0]
    assert differences([loaded], right[0]) == EXACT
    spoilt = {key for key, ulp in differences([end], right[1]).items() if ulp}
    assert spoilt == {"weights", "exp_avg_sq", "model"}  # lr, weight_decay and beta2 differ, beta1 doesn't


def test_a_universal_checkpoint_with_another_second_moment_is_refused() -> None:
    if reason := why_not_universal(Case(3, "bf16")):
        pytest.skip(reason)
    convert()
    for (saved, case), said in zip(FOREIGN, spawn(refuse, SAVED_BY, str(place()))[0], strict=True):
        if saved.variant == "amsgrad":
            assert "no max_exp_avg_sq, which DeepSpeed's universal checkpoints leave out" in said
        else:
            power = {"adam": "2.0", "l1": "1", "l3": "3.0"}
            assert f"in the loaded state, p is {power[saved.variant]}, and this optimizer takes" in said, (saved, case)
