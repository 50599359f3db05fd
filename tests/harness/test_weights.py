"""Weights are put together from the parts of ranks, in checkpoints made by hand as DeepSpeed lays them out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint.weights import Weights
from train.common.errors import ConfigError

SHAPES = [{"a": torch.Size([3, 7]), "b": torch.Size([5, 4])}, {"c": torch.Size([13]), "d": torch.Size([2])}]
NUMEL = sum(shape.numel() for group in SHAPES for shape in group.values())
WHOLE = dict(
    zip(
        [name for group in SHAPES for name in group],
        torch.arange(float(NUMEL)).split([shape.numel() for group in SHAPES for shape in group.values()]),
        strict=True,
    )
)
BUFFER = torch.tensor([True, False])


def save(folder: Path, world: int, stage: int, module: dict[str, Any], parts: list[list[torch.Tensor]]) -> list[str]:
    """Write the files of all ranks; ``parts`` is, for each rank, what it holds of the master weights."""
    state = {"module": module | {"mask": BUFFER}, "buffer_names": ["mask"], "param_shapes": SHAPES}
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    paddings = {"param_alignment_paddings": [[3, 0], [0, 1]]} if stage < 3 else {}
    for rank in range(world):
        frozen = {"frozen_param_shapes": {"f": torch.Size([world, 2])}, "frozen_param_fragments": {"f": BUFFER + rank}}
        if stage == 3:
            torch.save(state | frozen, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"optimizer_state_dict": {key: parts[rank], **paddings}}
        torch.save(optimizer, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if stage < 3:
        torch.save(state, folder / "mp_rank_00_model_states.pt")
    return sorted(file.name for file in folder.iterdir())  # rank 10 before rank 2


def expect(weights: Weights) -> None:
    for group in SHAPES:
        for name, shape in group.items():
            assert torch.equal(weights.read([name]), WHOLE[name].view(shape)) and weights.shapes[name] == shape
    assert torch.equal(weights.read(["mask"]), BUFFER)


@pytest.mark.parametrize("world", [1, 2, 5, 11])
def test_at_stages_1_and_2_a_group_is_cut_wherever_it_is_and_may_be_padded_after_each_weight(
    world: int, tmp_path: Path
) -> None:
    nothing = torch.full((3,), torch.nan)
    groups = [torch.cat([WHOLE["a"], nothing, WHOLE["b"]]), torch.cat([WHOLE["c"], WHOLE["d"], nothing[:1]])]
    parts = [list(cut) for cut in zip(*(group.tensor_split(world) for group in groups), strict=True)]
    parts = [[part.clone() for part in rank] for rank in parts]
    expect(Weights(tmp_path, save(tmp_path, world, 2, {}, parts), 2, {}))


@pytest.mark.parametrize("world", [1, 2, 5, 11])
@pytest.mark.parametrize("sizes", [[4], [2, 2], [1, 3]], ids=str)
def test_at_stage_3_each_rank_has_a_part_of_each_weight_in_groups_of_any_size(
    world: int, sizes: list[int], tmp_path: Path
) -> None:
    parts = []
    for rank in range(world):
        own = []
        for weight in WHOLE.values():
            count = -(-len(weight) // world)
            padded = torch.cat([weight, torch.full((count * world - len(weight),), torch.nan)])
            own.append(padded[rank * count : (rank + 1) * count])
        left = iter(own)
        parts.append([torch.cat(list(islice(left, size))) for size in sizes])
    weights = Weights(tmp_path, save(tmp_path, world, 3, {"a": torch.empty(0)}, parts), 3, {})
    expect(weights)
    assert torch.equal(weights.read(["f"]), torch.stack([BUFFER + rank for rank in range(world)]))


def test_at_stage_0_in_16_bits_masters_are_matrices_first_and_an_order_that_is_another_is_seen(tmp_path: Path) -> None:
    shapes = {"c": torch.Size([13]), "a": torch.Size([3, 7]), "d": torch.Size([13]), "b": torch.Size([3, 7])}
    masters = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}
    masters = {name: tensor + number for number, (name, tensor) in enumerate(masters.items())}
    module = {name: tensor.bfloat16() for name, tensor in masters.items()}
    for order, right in ((("a", "b", "c", "d"), True), (("b", "a", "c", "d"), False)):
        groups = [[masters[name] for name in order[:2]], [masters[name] for name in order[2:]]]
        torch.save({"module": module, "optimizer": {"fp32_groups": groups}}, tmp_path / "mp_rank_00_model_states.pt")
        weights = Weights(tmp_path, ["mp_rank_00_model_states.pt"], 0, shapes)
        if right:
            assert all(torch.equal(weights.read([name]), masters[name]) for name in shapes)
        else:
            with pytest.raises(ConfigError, match="has the weight a, which is one in the model and another one in"):
                weights.read(["a"])
