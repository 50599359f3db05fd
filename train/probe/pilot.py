"""Choose a beta from a short pilot run, by the noise and the drift of the gradient; see train.choose_beta.

The pilot trains at beta = 0.95. At several checkpoints it draws gradients of other batches at the current weights.
Their variance is the noise V. The squared distance that their mean moves per step, from one checkpoint to the next, is
the drift D. An average over a horizon of H = 1 / (1 - beta) steps has about V / 2H of noise left, and lags H steps
behind, which costs D H^2. The sum is least at H = (V / 4D)^(1/3).

A mean that changes direction on its way moves further per step than its distance over many steps shows. So the gap
between checkpoints (a quarter of the pilot) is a choice too, and a longer gap gives a longer horizon. The formula and
the pilot's sizes are those of arXiv 2610.08624; the derivation and the estimators are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from balanced_adam import beta_schedule
from train.common.errors import require
from train.common.files import make_folder
from train.common.progress import Progress
from train.probe.options import Pilot
from train.probe.single_rank import single_rank_run
from train.run.trainer import Trainer

PILOT_BETA, MOST = 0.95, 0.999
"""The pilot's own beta, and the greatest beta that is recommended."""


class Probes(NamedTuple):
    """Gradients drawn at one checkpoint."""

    drawn: int
    mean: Tensor
    """Mean gradient, (weights,), float64."""
    noise: float
    """Unbiased sample variance of the gradients, summed over the weights."""


class Choice(NamedTuple):
    """The estimates of a pilot, and the beta that follows from them."""

    noise: float
    """V: the variance of a batch's gradient, summed over all weights; the mean over the checkpoints."""
    drift: float
    """D: the squared distance that the mean gradient moves per step, from its distance between neighbouring checkpoints
    minus the noise's share of it; the mean over these pairs. It may be negative."""
    error: float
    """Standard error of D over the pairs of neighbouring checkpoints, as if they were independent (they share one)."""

    @property
    def horizon(self) -> float:
        """(V / 4D)^(1/3) in steps, at least 1; infinite if D isn't above 0."""
        return horizon_of(self.noise, self.drift)

    @property
    def beta(self) -> float:
        """The beta of this horizon, at most MOST; NaN if D isn't above 0, since beta can't be determined then."""
        return beta_of(self.horizon) if self.drift > 0.0 else math.nan

    @property
    def range(self) -> tuple[float, float]:
        """The betas at D plus and minus twice its error."""
        return beta_of(horizon_of(self.noise, self.drift + 2 * self.error)), beta_of(
            horizon_of(self.noise, self.drift - 2 * self.error)
        )


def horizon_of(noise: float, drift: float) -> float:
    """Return the horizon in steps, at least 1, at which V / 2H + D H^2 is least; infinite without drift."""
    return max(1.0, (noise / (4.0 * drift)) ** (1.0 / 3.0)) if drift > 0.0 else math.inf


def beta_of(steps: float) -> float:
    """Return the beta of a horizon in steps, at most MOST."""
    return min(beta_schedule.of_horizon(min(steps, 1e6)), MOST)


def summarize(gradients: Iterable[Tensor]) -> Probes:
    """Return mean and variance of gradients, (weights,) each, in one pass (Welford 1962).

    Only two float64 tensors are kept.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for count, gradient in enumerate(gradients, 1):
        away = gradient.double() - mean
        mean = mean + away / count
        squares = squares + away * (gradient.double() - mean)
    return Probes(count, mean, float(squares.sum()) / (count - 1))


def estimate(probes: list[Probes], gap: float) -> Choice:
    """Estimate noise and drift from checkpoints ``gap`` steps apart.

    The squared distance of two means of n gradients contains 2 V / n of noise, which is subtracted.
    """
    moved = torch.tensor(
        [
            (float(((b.mean - a.mean) ** 2).sum()) - a.noise / a.drawn - b.noise / b.drawn) / gap**2
            for a, b in pairwise(probes)
        ],
        dtype=torch.float64,
    )
    error = float(moved.std()) / math.sqrt(len(moved))
    return Choice(sum(each.noise for each in probes) / len(probes), float(moved.mean()), error)


def draw(trainer: Trainer, count: int) -> Iterator[Tensor]:
    """Yield the gradients of ``count`` batches at the current weights, (weights,) each.

    Every sequence is drawn independently from the training text.
    """
    module, batch = trainer.engine.module, trainer.run.parallelism.batch
    parameters = [p for p in module.parameters() if p.requires_grad]
    generator = np.random.default_rng([trainer.run.seed, trainer.step])
    for _ in range(count):
        trainer.ranks.heartbeat()
        tokens = trainer.train.take(trainer.train.sample(generator, batch)).to(trainer.ranks.device)
        given = trainer.inputs(tokens, trainer.predicted(tokens))
        gradients = torch.autograd.grad(module(**given).loss, parameters)
        yield torch.cat([gradient.flatten().cpu() for gradient in gradients])


def choose(pilot: Pilot) -> tuple[Choice, dict[str, Any]]:
    """Run the pilot.

    Returns:
        The estimates; and the runs they are for (``steps``, ``tokens_per_step``, ``parameters``) with ``gap``, the
        steps between two checkpoints of the pilot, over which the drift was measured.

    Raises:
        ConfigError: if an option of the run or of the pilot is invalid.
    """
    require(pilot.probes >= 2, f"probes is {pilot.probes}; it must be at least 2.")
    require(
        pilot.checkpoints >= 3,
        f"checkpoints is {pilot.checkpoints}; it must be at least 3.",
    )
    gap = pilot.steps // pilot.checkpoints
    require(gap >= 1, f"steps is {pilot.steps}; it must be at least the number of checkpoints, {pilot.checkpoints}.")
    planned = 10 * pilot.steps if pilot.planned_steps is None else pilot.planned_steps
    require(planned >= pilot.steps, f"planned_steps is {planned}; it must be at least the pilot's {pilot.steps}.")
    options = {option.split("=")[0] for option in pilot.rest} & {"--betas", "--state", "--allow-unbalanced", "--steps"}
    require(
        not options,
        f"{min(options, default='')} is given after --; the pilot runs at {PILOT_BETA} with fp32 state, "
        "and --planned-steps sets the run's length.",
    )
    if pilot.out:
        make_folder(pilot.out, "out")
    with TemporaryDirectory() as out:
        rest = ("--betas", repr(PILOT_BETA), *pilot.rest)
        with single_rank_run("train.choose_beta", Path(out), planned, rest) as trainer:
            probes = []
            with Progress(pilot.steps, 0, "pilot") as progress:
                while trainer.step < gap * pilot.checkpoints:
                    line = trainer.train_step()
                    progress.show(trainer.step, f"loss {line['loss']:.4f}")
                    if trainer.step % gap == 0:
                        probes.append(summarize(draw(trainer, pilot.probes)))
            plan = {"steps": planned, "tokens_per_step": trainer.run.tokens_per_step}
            return estimate(probes, gap), {**plan, "parameters": trainer.parameters, "gap": gap}


def report(choice: Choice, plan: dict[str, Any]) -> str:
    """Return the recommendation with its inputs, and the betas of other rules, as text."""
    low, high = choice.range
    recommended = "none" if math.isnan(choice.beta) else f"{choice.beta:.4f}"
    lines = [
        f"noise V = {choice.noise:.4g}, drift D = {choice.drift:.3g} ± {choice.error:.2g} a step^2 over "
        f"{plan['gap']} steps, horizon (V / 4D)^(1/3) = {choice.horizon:.1f} steps",
        f"beta = {recommended} ({low:.4f} to {high:.4f} at D ± twice its error)",
    ]
    if not choice.drift > 2 * choice.error:
        lines.append("The drift is not distinguishable from noise; more --probes or --checkpoints would measure it.")
    others = ["0.95", "0.944", "refresh:1000"]
    for rule in others:
        try:
            beta = beta_schedule.resolve(rule, steps=plan["steps"], tokens_per_step=plan["tokens_per_step"])
            lines.append(f"{rule}: {beta:.4f}")
        except ValueError as error:
            lines.append(f"{rule}: none ({error})")
    return "\n".join(lines)
