"""Runs that are looked into: on one rank, at ZeRO stage 0, with the gradients of elements drawn from every tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train import checkpoints, deepspeed_config, folder
from train.pretrain import Trainer, initialize
from train.ranks import Ranks, start
from train.settings import REPOSITORY, Run, SettingsError, first_line, parse, require

DECIDED = {"--out", "--ds-config", "--micro-batch"}


@contextmanager
def alone(
    module: str, out: Path, steps: int, rest: tuple[str, ...], checkpoint: Path | None = None
) -> Iterator[Trainer]:
    """A run of train.pretrain's; nothing is written.

    Args:
        module: whose it is, for messages.
        out: its folder.
        steps: of the whole run, which its schedule counts on, where the options don't say.
        rest: its options.
        checkpoint: the folder of a run with these options, which is gone on with from its newest weights, at their step and learning rate;
            the moments begin anew.

    Raises:
        SettingsError: if an option is decided here, several ranks were started, or the options or the checkpoint are no good.
    """
    given = {option.split("=")[0].replace("_", "-") for option in rest}
    require(not given & DECIDED, f"{min(given & DECIDED, default='')} is given after --; {module} decides it.")
    length = [] if "--steps" in given else ["--steps", str(steps)]
    place = ["--out", str(checkpoint or out / "run"), "--ds-config", str(REPOSITORY / "ds_configs" / "zero0.json")]
    settings = parse(Run, [*place, *length, *rest], "train.pretrain", None)
    settings.check()
    if checkpoint is not None:
        require((checkpoint / "run.json").exists(), f"checkpoint is {checkpoint}, which is not the folder of a run.")
        folder.check(settings)
    ranks = start(settings.timeout)
    require(ranks.world == 1, f"{module} runs on one rank, and there are {ranks.world}; start it with plain python.")
    with ranks.watch.guard():
        trainer = initialize(settings, ranks, deepspeed_config.resolve(settings, 1, torch.cuda.is_available()))
        if checkpoint is not None:
            _go_on(trainer, ranks, checkpoint)
        ranks.watch.begin()
        yield trainer
        ranks.watch.end()


def _go_on(trainer: Trainer, ranks: Ranks, run: Path) -> None:
    """Take the weights of a run's newest checkpoint, and its place in the schedule."""
    found = checkpoints.find(ranks, run / "checkpoints", trainer.run.identity())
    if found is None:
        raise SettingsError(f"checkpoint is {run}, which has no whole checkpoint; give the folder of a run.")
    checkpoints.check_text(found, trainer.tokens)
    try:
        checkpoints.load_weights(trainer.engine, found)
    except Exception as error:  # whatever another model's weights run into
        raise SettingsError(f"checkpoint is {run}, whose weights can't be loaded: {first_line(error)}") from None
    trainer.step = found.step
    for _ in range(found.step):
        trainer.engine.lr_scheduler.step()


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
