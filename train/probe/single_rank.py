"""A run on one rank at ZeRO stage 0 that writes nothing, so that its gradients can be measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from train.checkpoint.load import check_text, find_checkpoint
from train.checkpoint.weights import load_weights
from train.common.command_line import parse
from train.common.errors import ConfigError, first_line, require
from train.common.files import REPOSITORY
from train.distributed.launch import join
from train.distributed.ranks import Ranks
from train.run import deepspeed_config, run_dir
from train.run.config import Run
from train.run.engine import initialize
from train.run.trainer import Trainer

DECIDED = {"--out", "--ds-config", "--micro-batch"}


@contextmanager
def single_rank_run(
    module: str, out: Path, steps: int, rest: tuple[str, ...], checkpoint: Path | None = None
) -> Iterator[Trainer]:
    """Set up a run of train.pretrain on one rank, and yield its trainer. Nothing is written.

    Args:
        module: name of the command, for messages.
        out: the run's folder is ``out / "run"``.
        steps: length of the run's schedule, unless the options have --steps.
        rest: the run's options.
        checkpoint: the folder of a run with these options. It is resumed from its newest weights, at their step and
            learning rate, with the moments at zero. None starts from initial weights.

    Raises:
        ConfigError: if an option is one that this function sets, several ranks were started, or the options or the
            checkpoint are invalid.
    """
    given = {option.split("=")[0].replace("_", "-") for option in rest}
    require(not given & DECIDED, f"{min(given & DECIDED, default='')} is given after --; {module} decides it.")
    length = [] if "--steps" in given else ["--steps", str(steps)]
    place = ["--out", str(checkpoint or out / "run"), "--ds-config", str(REPOSITORY / "ds_configs" / "zero0.json")]
    settings = parse(Run, [*place, *length, *rest], "train.pretrain", None)
    settings.check()
    if checkpoint is not None:
        require((checkpoint / "run.json").exists(), f"checkpoint is {checkpoint}, which is not the folder of a run.")
        run_dir.check(settings)
    ranks = join(settings.timeout)
    require(ranks.world == 1, f"{module} runs on one rank, and there are {ranks.world}; start it with plain python.")
    with ranks.watchdog.guard():
        trainer = initialize(
            settings, ranks, deepspeed_config.resolve(settings, 1, torch.cuda.is_available()), checkpoint is not None
        )
        if checkpoint is not None:
            _load_weights_of(trainer, ranks, checkpoint)
        ranks.watchdog.begin()
        yield trainer
        ranks.watchdog.end()


def _load_weights_of(trainer: Trainer, ranks: Ranks, run: Path) -> None:
    """Load the weights of a run's newest checkpoint, and continue at its step of the schedule.

    Raises:
        ConfigError: if there is no complete checkpoint, or it does not fit this run.
    """
    checkpoint = find_checkpoint(ranks, run / "checkpoints", trainer.run.identity())
    if checkpoint is None:
        raise ConfigError(f"checkpoint is {run}, which has no complete checkpoint; give the folder of a run.")
    check_text(checkpoint, trainer.facts["tokens"])
    try:
        load_weights(trainer.engine, checkpoint)
    except Exception as error:  # of any class, if the weights are another model's
        raise ConfigError(f"checkpoint is {run}, whose weights can't be loaded: {first_line(error)}") from None
    trainer.step = checkpoint.step
    for _ in range(checkpoint.step):
        trainer.engine.lr_scheduler.step()
