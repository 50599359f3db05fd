"""Record gradients during training: of a run of train.pretrain, or of a small vision model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from train.analysis.scale_response import Recording
from train.common.errors import require
from train.common.progress import Progress
from train.probe.grad_recorder import Recorder
from train.probe.options import Response
from train.probe.single_rank import single_rank_run


def of_language(response: Response) -> Iterator[tuple[int, Recording]]:
    """Train a run of train.pretrain on one rank, and yield each step of ``at`` with the gradients recorded before it.

    Raises:
        ConfigError: if the options are invalid, or a step of ``at`` is out of range.
    """
    end = max(response.at)
    with single_rank_run("train.response", response.out, end + 1, response.rest, response.checkpoint) as trainer:
        require(
            not trainer.step or trainer.step + response.window <= min(response.at),
            f"at is {min(response.at)}, less than the checkpoint's {trainer.step} steps "
            f"and a window of {response.window}.",
        )
        steps = trainer.run.schedule.steps
        require(end <= steps, f"at is {end}, which is beyond the {steps} steps of the run.")
        recorder = Recorder(trainer.engine.module.named_parameters(), response.window, response.elements)
        step = trainer.engine.step

        def recorded(*arguments: Any, **more: Any) -> Any:
            recorder.see()
            return step(*arguments, **more)

        trainer.engine.step = recorded
        with Progress(end, trainer.step, "response") as progress:
            while trainer.step < end:
                line = trainer.train_step()
                progress.show(trainer.step, f"loss {line['loss']:.4f}")
                if trainer.step in response.at:
                    yield trainer.step, recorder.recording()


def of_vision(response: Response) -> Iterator[tuple[int, Recording]]:
    """Train a small vision model, and yield each step of ``at`` with the gradients recorded before it.

    Raises:
        ConfigError: if options of a run are given.
    """
    from train.probe import vision

    require(
        not response.rest and response.checkpoint is None,
        f"task is {response.task!r}, which takes no options of a run.",
    )
    run = vision.Classifier(response.task)
    recorder = Recorder(run.model.named_parameters(), response.window, response.elements)
    with Progress(max(response.at), 0, "response") as progress:
        for step in range(1, max(response.at) + 1):
            loss = run.train_step(recorder.see)
            progress.show(step, f"loss {loss:.4f}")
            if step in response.at:
                yield step, recorder.recording()
