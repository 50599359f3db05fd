"""What is measured on a probed run, as the user says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """How much is measured."""

    steps: int = 200
    """Of the pilot."""
    probes: int = 16
    """Gradients at each of the checkpoints."""
    checkpoints: int = 4
    """At the ends of equal parts of the pilot."""
    out: Path | None = None
    """A folder, such as that of a comparison, in which the result is kept as pilot.json; train.regret finds it there."""
    planned_steps: int | None = None
    """Steps of the run that the beta is for, which the pilot's learning rate schedule counts on. Default: ten times the pilot."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": options of the run that the beta is for, as train.pretrain takes them, such as -- --model small --data FOLDER."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is recorded, and what is asked of it."""

    out: Path = Path("runs/response")
    """The folder of response.md, response.csv and the figures."""
    task: Literal["language", "vit", "resnet"] = "language"
    """What is trained: a run of train.pretrain, or a small vision transformer or ResNet on scikit-learn's digits."""
    betas: tuple[str, ...] = ("0.95", "0.9,0.95", "0.9,0.999", "0.9,0.81")
    """Pairs to ask: one number, or beta1,beta2. The run itself is that of the options after "--", whatever is asked."""
    at: tuple[int, ...] = (200,)
    """Steps after which the response is measured."""
    window: int = 150
    """Gradients that are recorded before each."""
    elements: int = 4096
    """Of each tensor; the recording takes 4 bytes x window x elements x tensors of memory."""
    checkpoint: Path | None = None
    """A run of train.pretrain with the options after "--", which is gone on with from its newest weights; the moments begin anew."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": options of the run, as train.pretrain takes them, such as -- --model small --lr 2e-3."""
