"""The options of train.choose_beta and train.response."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """The size of the pilot run."""

    steps: int = 200
    """Optimizer steps of the pilot; at least the number of checkpoints."""
    probes: int = 16
    """Gradients drawn at each checkpoint, each of one batch; at least 2."""
    checkpoints: int = 4
    """Points at which gradients are drawn, at the ends of equal parts of the pilot; at least 3."""
    out: Path | None = None
    """Folder to write the result to, as pilot.json. Give a comparison's folder if train.regret is to use it.
    Default: none, the result is only printed."""
    planned_steps: int | None = None
    """Optimizer steps of the run that the beta is for; at least the pilot's.
    The pilot follows that run's learning-rate schedule. Default: ten times the pilot's steps."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": options of the run that the beta is for, as for train.pretrain, such as -- --model small.
    The pilot itself runs at beta = 0.95 with fp32 state on one rank."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """The run to record, and the betas to evaluate on it."""

    out: Path = Path("runs/response")
    """Folder for response.md, response.csv and the figures."""
    task: Literal["language", "vit", "resnet"] = "language"
    """The run: language (as train.pretrain), or a small vision transformer or ResNet on the digits of scikit-learn."""
    betas: tuple[str, ...] = ("0.95", "0.9,0.95", "0.9,0.999", "0.9,0.81")
    """Pairs of betas to evaluate, each one number or beta1,beta2. Or mean:STEPS, plain means over the last steps.
    They do not affect the run, whose betas are set by the options after "--"."""
    at: tuple[int, ...] = (200,)
    """Steps after which the response is measured; at least window."""
    window: int = 150
    """Steps whose gradients are recorded before each measurement; more than 10."""
    elements: int = 4096
    """Elements drawn from each tensor; at least 1.
    The recording takes 4 bytes x window x elements x tensors of memory."""
    checkpoint: Path | None = None
    """Folder of a run of train.pretrain with the options after "--".
    Its newest weights are resumed, with the moments at zero. Default: start from initial weights."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": options of the run, as for train.pretrain, such as -- --model small --lr 2e-3."""
