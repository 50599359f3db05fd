"""A run that goes from 4 ranks to 2, 3 and 1, and from one ZeRO stage to another, has the bits of one process.

Through the harness's own checkpoints and conversion, with gradients whose sums are exact.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests import session
from tests.parity.cases import Case, advance, read, start
from tests.parity.compare import EXACT, differences
from tests.parity.control import State, train
from tests.parity.model import SHAPES
from tests.parity.versions import why_not_universal
from tests.ranks import device, spawn
from tests.session import shared
from train.checkpoint.convert import convert_layout
from train.checkpoint.load import find_checkpoint, restore_checkpoint
from train.checkpoint.save import save_checkpoint
from train.distributed.ranks import Ranks
from train.distributed.watchdog import Watchdog
from train.run import deepspeed_config

pytest.importorskip("torch", "2.5", reason="the harness, which converts checkpoints, needs torch 2.5")
pytestmark = pytest.mark.ranks

# The parameter "sometimes" has a gradient in each of the steps from 4 to 11; test_resume.py tells why that matters.
CUTS = (0, 5, 7, 9, 11)
WORLDS = (4, 2, 3, 1)
BF16, FP32 = Case(1, "bf16"), Case(1, "fp32")
CHAINS = {
    "stage_2_offload": [Case(2, "bf16", offload=True)] * 4,
    "stage_3_bf16": [Case(3, "bf16")] * 4,
    "stages_1_3_2_1_bf16": [BF16, Case(3, "bf16"), Case(2, "bf16"), BF16],
    "stages_1_3_offload_2_1_fp32": [FP32, Case(3, "fp32", offload=True), Case(2, "fp32"), FP32],
    "stages_3_1_3_2_bf16": [Case(3, "bf16"), BF16, Case(3, "bf16"), Case(2, "bf16")],
    "accumulation_and_offload_come_and_go": [
        BF16,
        Case(1, "bf16", grad_accum="fp32"),
        Case(2, "bf16", offload=True),
        BF16,
    ],
    "packed16_stages_1_3_2_offload_1": [
        BF16._replace(state="packed16"),
        Case(3, "bf16", state="packed16"),
        Case(2, "bf16", offload=True, state="packed16"),
        BF16._replace(state="packed16"),
    ],
    "packed8_stages_3_1_accumulation_2": [
        Case(3, "bf16", state="packed8"),
        BF16._replace(state="packed8"),
        BF16._replace(grad_accum="fp32", state="packed8"),
        Case(2, "bf16", state="packed8"),
    ],
}


CHAINS["formats_change_fp32_packed16_packed8_fp32"] = [
    BF16,
    Case(3, "bf16", state="packed16"),
    BF16._replace(state="packed8"),
    Case(2, "bf16"),
]
for name, variant, state in (
    ("adamp", "adamp", "fp32"),
    ("l3_packed16", "l3", "packed16"),
    ("adamnc", "adamnc", "fp32"),
):
    CHAINS[f"{name}_stages_1_3_2_offload_1"] = [
        case._replace(path="torch", variant=variant, state=state)
        for case in (BF16, Case(3, "bf16"), Case(2, "bf16", offload=True), BF16)
    ]
CHAINS["packed32_stages_2_3_1_3"] = [
    case._replace(state="packed32") for case in (Case(2, "bf16"), Case(3, "bf16"), BF16, Case(3, "bf16"))
]


class Leg(NamedTuple):
    """What one world does: for each chain a case, in a folder of the chain's."""

    folder: str
    number: int


def possible_chains() -> dict[str, list[Case]]:
    return {name: cases for name, cases in CHAINS.items() if not any(map(why_not_universal, cases))}


def go_on(leg: Leg) -> dict[str, tuple[State, State]]:
    """Job: resume each chain where the last world left it, go on, save; the state at the beginning and at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, int(os.environ["LOCAL_RANK"]), world, torch.device(device(world)), Watchdog(rank, world, 600.0))
    found_states = {}
    for name, cases in possible_chains().items():
        case, folder = cases[leg.number], Path(leg.folder) / name
        if ranks.is_main:
            folder.mkdir(exist_ok=True)
        layout = deepspeed_config.layout(case.config(world), world)
        found = find_checkpoint(ranks, folder)
        if found:
            found = convert_layout(ranks, found, layout, "adam")
        engine = start(case, checkpoint={"load_universal": bool(found and found.universal)})
        if found:
            assert restore_checkpoint(engine, ranks, found) == CUTS[leg.number]
        begin = read(engine) if found else {}
        advance(engine, CUTS[leg.number], CUTS[leg.number + 1])
        parameters = sum(math.prod(shape) for shape in SHAPES.values())
        save_checkpoint(engine, ranks, folder, CUTS[leg.number + 1], (2, 0), parameters, layout)
        found_states[name] = begin, read(engine)
        engine.destroy()
    ranks.watchdog.end()
    return found_states


@shared
def leg(number: int) -> list[dict[str, tuple[State, State]]]:
    """Rank, chain: the state at the beginning and at the end of a leg."""
    folder = session.folder() / "checkpoints-of-chains"
    if number:
        leg(number - 1)
    else:
        folder.mkdir()
    return spawn(go_on, WORLDS[number], Leg(str(folder), number))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("number", range(4), ids=lambda number: f"{WORLDS[number]}_ranks")
def test_each_leg_begins_where_the_last_one_ended_and_goes_on_as_one_process_would(number: int, chain: str) -> None:
    if chain not in possible_chains():
        pytest.skip(next(reason for case in CHAINS[chain] if (reason := why_not_universal(case))))
    ranks = [rank[chain] for rank in leg(number)]
    if number:
        before = leg(number - 1)[0][chain][1]
        assert differences([begin for begin, _ in ranks], before) == EXACT
    first, *others = CHAINS[chain]
    formats = [first.state, *(case.state for case in others)]
    later = tuple((CUTS[k], formats[k]) for k in range(1, 4) if formats[k] != formats[k - 1])
    control = train(CUTS[number + 1], first.absent(), stored=first.state, variant=first.variant, later=later)
    assert differences([end for _, end in ranks], control) == EXACT
