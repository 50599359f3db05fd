"""A training run that may be interrupted at any moment and resumes from its newest complete checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from train.checkpoint import branch
from train.checkpoint.convert import convert_layout
from train.checkpoint.load import check_text, find_checkpoint, restore_checkpoint
from train.checkpoint.manifest import Origin, newest_step
from train.checkpoint.save import save_checkpoint
from train.common.errors import ConfigError, Preempted, is_main_process, require
from train.common.files import write_json
from train.common.progress import Progress
from train.distributed.launch import join
from train.distributed.preemption import STOP_FILE
from train.distributed.ranks import Ranks
from train.run import deepspeed_config, initial_weights, run_dir
from train.run.config import Run
from train.run.dry_run import dry_run
from train.run.engine import initialize
from train.run.memory import with_micro_batch
from train.run.metrics import Metrics
from train.run.trainer import Trainer


def pretrain(run: Run) -> None:
    """Train as ``run`` says, on this rank.

    Raises:
        ConfigError: if the input is invalid or the run has diverged.
        Preempted: if the run was asked to stop.
    """
    run.check()
    gpus = torch.cuda.is_available()
    ds_config = deepspeed_config.resolve(run, int(os.environ["WORLD_SIZE"]), gpus)
    ranks = join(run.timeout)
    with ranks.watchdog.guard():
        fitted = with_micro_batch(run, ranks, ds_config)
        if fitted is not run:
            run, ds_config = fitted, deepspeed_config.resolve(fitted, ranks.world, gpus)
        ds_config = ranks.broadcast(ds_config)  # hosts may have other numbers of ranks, which is an "auto"
        if run.dry_run:
            with ranks.collective_errors():
                if ranks.is_main:
                    run_dir.check(run)
                    branch.check(run)
            dry_run(initialize(run, ranks, ds_config), ds_config)
        else:
            _pretrain(run, ranks, ds_config)


def _pretrain(run: Run, ranks: Ranks, ds_config: dict[str, Any]) -> None:
    with ExitStack() as held:
        with ranks.collective_errors():
            if ranks.is_main:
                held.callback(run_dir.claim(run).release)
                (run.out / STOP_FILE).unlink(missing_ok=True)
        with ranks.collective_errors():
            ended = run_dir.result(run.out)
            if ranks.is_main and ended is None and ds_config.get("wandb", {}).get("enabled"):
                run_dir.resume_in_wandb(run.out)
        if ended is not None:
            _report_end(run, ended, "already ")
            return
        with ranks.collective_errors():
            here = (run_dir.begun(run.out), branch.is_due(run)) if ranks.is_main else None
        begun, due = ranks.broadcast(here) or (None, False)
        taken: dict[str, Any] = {}
        if due:
            ranks.wait_for((lambda: taken.update(branch.take(run))) if ranks.is_main else None)
        checkpoint = find_checkpoint(ranks, run.out / "checkpoints", run.identity())
        if checkpoint:
            layout = deepspeed_config.layout(ds_config, ranks.world)
            checkpoint = convert_layout(ranks, checkpoint, layout, run.optimizer.optimizer)
            ds_config.setdefault("checkpoint", {})["load_universal"] = checkpoint.universal
        trainer = initialize(run, ranks, ds_config, resumes=checkpoint is not None)
        facts = {**trainer.facts, **({"parent": taken} if taken else {})}
        if run.model.init_from and checkpoint is None:
            read = run.model.init_from
            ranks.wait_for((lambda: facts.update(init_from=initial_weights.sums(read))) if ranks.is_main else None)
        with ranks.collective_errors():
            if ranks.is_main:
                require(
                    begun is None or facts.get("init_from") in (None, begun.init_from),
                    f"init_from is {run.model.init_from}, whose weights have changed since the run in {run.out} began; "
                    "restore them, or give another folder.",
                )
                run_dir.describe(run, facts, ds_config)
            if checkpoint:
                check_text(checkpoint, trainer.facts["tokens"])
        if checkpoint:
            trainer.step = restore_checkpoint(trainer.engine, ranks, checkpoint)
            follow_schedule(trainer.engine.lr_scheduler, run.optimizer.lr)
        with ranks.collective_errors():
            metrics = Metrics(run.out, trainer.step) if ranks.is_main else None
            if metrics:
                run_dir.note(run.out, "begins", step=trainer.step, ranks=ranks.world)
        parent = begun.parent.step if begun and begun.parent else 0
        trainer.branched_at = ranks.broadcast(taken["step"] if taken else parent)
        ranks.watchdog.begin()
        with Progress(run.schedule.steps, trainer.step, run.out.name, enabled=ranks.is_main) as progress:
            ended = trainer.fit(metrics, progress, saver(trainer))
        with ranks.collective_errors():
            if metrics:
                if ended["status"] != "stopped":
                    write_json(run.out / "result.json", {**ended, "seconds": metrics.seconds})
                run_dir.note(run.out, ended["status"], step=ended["step"])
        ranks.watchdog.end()
    _report_end(run, ended)


def follow_schedule(schedule: Any, lr: float) -> None:
    """Set the learning rate to that of the schedule with the peak ``lr``, at its step, whatever a checkpoint says."""
    schedule.base_lrs = [lr] * len(schedule.base_lrs)
    schedule.last_epoch -= 1
    schedule.step()


def saver(trainer: Trainer) -> Callable[[], None]:
    """Return a function that saves a checkpoint of the trainer's current state."""
    run = trainer.run
    origin = Origin(run.identity(), trainer.facts["tokens"])

    def save() -> None:
        save_checkpoint(
            trainer.engine,
            trainer.ranks,
            run.out / "checkpoints",
            trainer.step,
            (run.checkpoints.keep, run.checkpoints.keep_every),
            trainer.parameters,
            trainer.layout,
            origin,
        )

    return save


def _report_end(run: Run, ended: dict[str, Any], already: str = "") -> None:
    """Report how a run has ended.

    Raises:
        Preempted: if it was asked to stop.
        ConfigError: if it diverged, now or earlier.
    """
    if ended["status"] == "stopped":
        saved = newest_step(run.out / "checkpoints")
        raise Preempted(
            f"Stopped at step {ended['step']} and saved up to step {saved}, as asked. "
            "Run the same command again to resume from there."
        )
    if ended["status"] == "diverged":
        reason = ended.get("reason", f"a number was not finite at step {ended['step']}")  # older runs have no reason
        raise ConfigError(
            f"the run in {run.out} has {already}diverged: {reason}. Its checkpoints from before are kept. "
            f"Lower lr (it is {run.optimizer.lr}) or clip (it is {run.optimizer.clip}) and give another folder."
        )
    if is_main_process():
        print(f"{run.out} is {already}finished, at validation loss {ended['validation_loss']:.4f}.", flush=True)
