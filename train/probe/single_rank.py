"""A run on one rank at ZeRO stage 0, which nothing is written of, so that its gradients can be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from train.checkpoint.load import check_text, find_checkpoint, load_weights
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
    """A run of train.pretrain's; nothing is written.

    Args:
        module: whose it is, for messages.
        out: its folder.
        steps: of the whole run, which its schedule counts on, where the options don't say.
        rest: its options.
        checkpoint: the folder of a run with these options, which is gone on with from its newest weights, at their step and learning rate;
            the moments begin anew.

    Raises:
        ConfigError: if an option is decided here, several ranks were started, or the options or the checkpoint are no good.
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
        trainer = initialize(settings, ranks, deepspeed_config.resolve(settings, 1, torch.cuda.is_available()))
        if checkpoint is not None:
            _go_on(trainer, ranks, checkpoint)
        ranks.watchdog.begin()
        yield trainer
        ranks.watchdog.end()


def _go_on(trainer: Trainer, ranks: Ranks, run: Path) -> None:
    """Take the weights of a run's newest checkpoint, and its place in the schedule."""
    found = find_checkpoint(ranks, run / "checkpoints", trainer.run.identity())
    if found is None:
        raise ConfigError(f"checkpoint is {run}, which has no whole checkpoint; give the folder of a run.")
    check_text(found, trainer.tokens)
    try:
        load_weights(trainer.engine, found)
    except Exception as error:  # whatever another model's weights run into
        raise ConfigError(f"checkpoint is {run}, whose weights can't be loaded: {first_line(error)}") from None
    trainer.step = found.step
    for _ in range(found.step):
        trainer.engine.lr_scheduler.step()
