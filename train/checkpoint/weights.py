"""The weights of a checkpoint of any ZeRO stage, by name, put together from the parts that the ranks hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from train.checkpoint.load import only_known_classes
from train.checkpoint.manifest import CheckpointInfo
from train.common.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Weight(NamedTuple):
    """Where a weight lies."""

    name: str
    shape: torch.Size
    parts: list[torch.Tensor]
    """Its elements, and perhaps padding after them, if one is put after the other."""


class Weights:
    """The weights and persistent buffers of a checkpoint, in memory-mapped files.

    Weights that were trained are the optimizer's float32 master weights. Others have the dtype of the run's passes.
    Pages that were read stay in memory until this object is gone.
    """

    def __init__(self, checkpoint: Path, files: Iterable[str], stage: int, trained: dict[str, torch.Size]) -> None:
        """Map the files of a checkpoint. No weight is read.

        Args:
            checkpoint: its folder.
            files: the names of its files.
            stage: the ZeRO stage that made it.
            trained: names and shapes of the weights that the optimizer has; see :func:`trained_in`. (Stage 0 doesn't
                record them.)

        Raises:
            OSError: if a file can't be read.
            Exception: of any class, if a file is not what DeepSpeed writes.
        """
        states = [_mapped(file) for file in _by_rank(checkpoint, files, "model_states.pt")]
        optimizers = [_mapped(file)["optimizer_state_dict"] for file in _by_rank(checkpoint, files, "optim_states.pt")]
        module: dict[str, torch.Tensor] = states[0]["module"]
        if stage == 3:  # where parameters are placeholders
            module = {name: module[name] for name in states[0]["buffer_names"]}
            masters = _of_stage_3(states, optimizers)
        elif stage:
            masters = _of_stages_1_and_2(states[0]["param_shapes"], optimizers)
        else:
            masters = _of_stage_0(states[0]["optimizer"], trained)
        self.checkpoint, self.module = checkpoint, module
        self.masters = {weight.name: weight for weight in masters}
        self.shapes = {name: tensor.shape for name, tensor in module.items()}
        self.shapes |= {name: weight.shape for name, weight in self.masters.items()}

    def read(self, names: list[str]) -> torch.Tensor:
        """Return the weight of these names; tied weights have several. It may be mapped memory: don't change it.

        Raises:
            ConfigError: if a number in it is not finite, or the model itself has another weight at one of the names.
        """
        name = next((name for name in names if name in self.masters), names[0])
        if name in self.masters:
            _, shape, parts = self.masters[name]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            weight = flat[: shape.numel()].view(shape)
        else:
            weight = self.module[name]
        require(
            bool(torch.isfinite(weight).all()),
            f"checkpoint {self.checkpoint} has the weight {name}, which holds numbers that are not finite; "
            "give an older checkpoint.",
        )
        # What a checkpoint does not record, such as the order of the optimizer's weights, would show here.
        for other in names:
            own = self.module.get(other, weight)
            require(
                torch.equal(weight.to(own.dtype), own),
                f"checkpoint {self.checkpoint} has the weight {other}, which is one in the model and another one in "
                "the optimizer; give another checkpoint.",
            )
        return weight


def trained_in(network: PreTrainedModel) -> dict[str, torch.Size]:
    """Return names and shapes of the weights that are trained, each once, in the model's order."""
    return {name: p.shape for name, p in network.named_parameters() if p.requires_grad}


def names_in(network: PreTrainedModel) -> dict[str, list[str]]:
    """Return all names of each weight and persistent buffer, by the name under which transformers stores it.

    Tied weights have several names.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    tied = network.all_tied_weights_keys
    names = {next((name for name in group if name not in tied), group[0]): group for group in groups.values()}
    return {name: group for name, group in names.items() if name not in (network._keys_to_ignore_on_save or ())}


@torch.no_grad()
def load_weights(engine: Any, checkpoint: CheckpointInfo) -> None:
    """Load only the weights of a checkpoint of any ZeRO stage, into an engine at stage 0 on one rank.

    Raises:
        Exception: of any class, if the weights are another model's or a file is damaged.
    """
    network = engine.module
    files = [file.name for file in checkpoint.path.glob("*.pt")]
    weights = Weights(checkpoint.path, files, checkpoint.layout["stage"], trained_in(network))
    state = network.state_dict(keep_vars=True)
    for name, group in names_in(network).items():
        state[name].copy_(weights.read(group))
    if hasattr(engine.optimizer, "refresh_fp32_params"):  # the masters of an engine in 16 bits
        engine.optimizer.refresh_fp32_params()


@only_known_classes()
def _mapped(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True)
    return content


def _by_rank(folder: Path, files: Iterable[str], end: str) -> list[Path]:
    """Return the files whose names end so, in the order of the ranks that wrote them."""

    def rank(name: str) -> int:
        return int((re.search(r"zero_pp_rank_(\d+)_", name) or [0, 0])[1])

    return [folder / name for name in sorted((name for name in files if name.endswith(end)), key=rank)]


def _of_stage_0(optimizer: dict[str, Any], trained: dict[str, torch.Size]) -> Iterator[Weight]:
    """Yield the master weights at stage 0, where in float32 there are none beside the model's own."""
    if "fp32_groups" not in optimizer:
        return
    tensors = [tensor for group in optimizer["fp32_groups"] for tensor in group]
    ordered = sorted(trained, key=lambda name: len(trained[name]) < 2)  # matrices first: train.run.engine
    for name, tensor in zip(ordered, tensors, strict=True):
        yield Weight(name, tensor.shape, [tensor.flatten()])


def _of_stages_1_and_2(groups: list[dict[str, torch.Size]], optimizers: list[dict[str, Any]]) -> Iterator[Weight]:
    """Yield the master weights at stages 1 and 2: the ranks' parts of a group, put together, hold one after another."""
    paddings = optimizers[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    for number, (shapes, after) in enumerate(zip(groups, paddings, strict=True)):
        parts = [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
        place = 0
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            yield Weight(name, shape, list(_cut(parts, place, shape.numel())))
            place += shape.numel() + padding


def _of_stage_3(states: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Iterator[Weight]:
    """Yield the master weights at stage 3, where each rank holds as large a part of each; and those not trained."""
    place = 0
    for name, shape in (item for shapes in states[0]["param_shapes"] for item in shapes.items()):
        count = -(-shape.numel() // len(optimizers))
        held = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
        yield Weight(name, shape, [part for groups in held for part in _cut(groups, place, count)])
        place += count
    for name, shape in states[0]["frozen_param_shapes"].items():
        yield Weight(name, shape, [state["frozen_param_fragments"][name].flatten() for state in states])


def _cut(parts: list[torch.Tensor], start: int, count: int) -> Iterator[torch.Tensor]:
    """Yield the pieces that hold ``count`` elements from ``start`` on, in one-dimensional tensors put together."""
    for part in parts:
        piece = part[max(start, 0) : max(start + count, 0)]
        if len(piece):
            yield piece
        start -= len(part)
