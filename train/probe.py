"""Runs that are looked into: on one rank, at ZeRO stage 0 in fp32, with the gradients of elements drawn from every tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train import checkpoints, deepspeed_config
from train.pretrain import Trainer, initialize
from train.ranks import Ranks, start
from train.settings import REPOSITORY, Run, SettingsError, first_line, parse, require

DECIDED = {"--out", "--ds-config", "--micro-batch", "--precision", "--steps"}


@contextmanager
def alone(
    module: str, out: Path, steps: int, rest: tuple[str, ...], checkpoint: Path | None = None
) -> Iterator[Trainer]:
    """A run of so many steps, made from options of train.pretrain; nothing is written.

    Args:
        module: whose run it is, for messages.
        out: its folder.
        steps: of the whole run, which its schedule counts on.
        rest: the options.
        checkpoint: a run's folder, whose newest weights are to be begun with, at their step; the moments begin anew.

    Raises:
        SettingsError: if an option is decided here, several ranks were started, or the run's settings or the checkpoint are no good.
    """
    given = {option.split("=")[0].replace("_", "-") for option in rest} & DECIDED
    require(not given, f"{min(given, default='')} is given after --; {module} decides it.")
    options = ["--out", str(out / "run"), "--ds-config", str(REPOSITORY / "ds_configs" / "zero0.json")]
    settings = parse(Run, [*options, "--steps", str(steps), "--precision", "fp32", *rest], "train.pretrain", None)
    settings.check()
    ranks = start(settings.timeout)
    require(ranks.world == 1, f"{module} runs on one rank, and there are {ranks.world}; start it with plain python.")
    with ranks.watch.guard():
        trainer = initialize(settings, ranks, deepspeed_config.resolve(settings, 1, torch.cuda.is_available()))
        if checkpoint is not None:
            trainer.step = _load_weights(trainer.engine.module, ranks, checkpoint)
        ranks.watch.begin()
        yield trainer
        ranks.watch.end()


def _load_weights(module: torch.nn.Module, ranks: Ranks, run: Path) -> int:
    """Those of a run's newest checkpoint; its step."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = checkpoints.find(ranks, run / "checkpoints")
    if found is None:
        raise SettingsError(f"checkpoint is {run}, which has no whole checkpoint; give the folder of a run.")
    try:
        module.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(found.path.parent), found.path.name))
    except Exception as error:  # whatever another model's weights run into
        raise SettingsError(f"checkpoint is {run}, whose weights can't be loaded: {first_line(error)}") from None
    return found.step


class Recording(NamedTuple):
    """Gradients of some elements."""

    gradients: Tensor
    """(steps, elements), float32, before clipping."""
    layers: dict[str, slice]
    """Tensor's name: its columns."""


class Recorder:
    """Keeps the last gradients of elements drawn from every tensor."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], window: int, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kept: deque[Tensor] = deque(maxlen=window)
        self.layers: dict[str, slice] = {}
        self.chosen: list[tuple[Tensor, Tensor]] = []
        for name, parameter in named:
            begin = sum(len(index) for _, index in self.chosen)
            index = torch.randperm(parameter.numel(), generator=generator)[:elements]
            self.layers[name] = slice(begin, begin + len(index))
            self.chosen.append((parameter, index.to(parameter.device)))

    def see(self) -> None:
        """The gradients of this step."""
        parts = [
            torch.zeros(len(index)) if p.grad is None else p.grad.flatten()[index].float().cpu()
            for p, index in self.chosen
        ]
        self.kept.append(torch.cat(parts))

    def recording(self) -> Recording:
        """What is kept now."""
        return Recording(torch.stack(list(self.kept)), self.layers)
