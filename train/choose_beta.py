"""A beta for your model and text, from a short pilot run: ``python -m train.choose_beta -- --data FOLDER``.

The pilot trains at beta = 0.95. At some of its steps it draws gradients of other batches, at fixed weights: how much they differ
among themselves is the noise V, and how fast their mean moves from one of these steps to the next is the drift D. An average
over a horizon of H = 1 / (1 - beta) steps has about V / 2H of noise left, and lags H steps behind, which costs D H^2; their sum
is least at H = (V / 4D)^(1/3). The formula and the pilot's sizes are those of arXiv 2610.08624; this derivation is ours, and so
are the estimators.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import Tensor

from balanced_adam import horizon
from train import data, probe
from train.pretrain import Trainer
from train.progress import Progress
from train.ranks import leave, prepare_environment
from train.settings import SettingsError, parse, require

PILOT_BETA = 0.95
BELOW = 10**6  # the probes' batches are those of steps that no run comes to


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """How much is measured."""

    steps: int = 200
    """Of the pilot."""
    probes: int = 16
    """Gradients at each of the checkpoints."""
    checkpoints: int = 4
    """At the ends of equal parts of the pilot."""
    planned_steps: int | None = None
    """Steps of the run that the beta is for, which the pilot's learning rate schedule counts on. Default: ten times the pilot."""
    rest: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After "--": options of the run that the beta is for, as train.pretrain takes them, such as -- --model small --data FOLDER."""


class Choice(NamedTuple):
    """What was found."""

    noise: float
    """V: the variance of a batch's gradient, summed over all weights, mean over the checkpoints."""
    drift: float
    """D: the squared distance that the mean gradient moves in a step, by its distance between neighbouring checkpoints. Its noise is taken
    out, so that it may come out below 0: then it can't be told from none."""
    horizon: float
    """(V / 4D)^(1/3) in steps, at least 1; infinite if D isn't above 0."""

    @property
    def beta(self) -> float:
        """Of this horizon, at most 0.999."""
        return min(horizon.of_horizon(min(self.horizon, 1e6)), 0.999)


def estimate(gradients: list[Tensor], gap: float) -> Choice:
    """From gradients at each checkpoint, each (probes, elements), ``gap`` steps apart.

    V is the unbiased sample variance. The squared distance of two means of n gradients has 2 V / n of noise in it, which is taken off.
    """
    gradients = [each.double() for each in gradients]
    variances = [float(each.var(dim=0).sum()) for each in gradients]
    means = [each.mean(dim=0) for each in gradients]
    probes = len(gradients[0])
    moved = [
        float(((b - a) ** 2).sum()) - (v + w) / probes
        for a, b, v, w in zip(means, means[1:], variances, variances[1:], strict=False)
    ]
    noise = sum(variances) / len(variances)
    drift = sum(moved) / len(moved) / gap**2
    best = max(1.0, (noise / (4.0 * drift)) ** (1.0 / 3.0)) if drift > 0.0 else float("inf")
    return Choice(noise, drift, best)


def draw(trainer: Trainer, count: int) -> Tensor:
    """Gradients of ``count`` batches that training doesn't see, at the weights of now: (count, weights), float32."""
    module, batch, drawn = trainer.engine.module, trainer.run.parallelism.batch, []
    parameters = [p for p in module.parameters() if p.requires_grad]
    for number in range(count):
        step = BELOW + trainer.step * count + number
        indices = data.batch_indices(step, batch, len(trainer.train), trainer.run.seed + 1)
        tokens = trainer.train.take(indices).to(trainer.ranks.device)
        gradients = torch.autograd.grad(module(input_ids=tokens, labels=tokens).loss, parameters)
        drawn.append(torch.cat([gradient.flatten().cpu() for gradient in gradients]))
    return torch.stack(drawn)


def choose(pilot: Pilot) -> tuple[Choice, dict[str, Any]]:
    """Run the pilot; what was found, and the run's settings that the rules in words need.

    Raises:
        SettingsError: if the run's options, or the pilot's sizes, are no good.
    """
    require(pilot.probes >= 2, f"probes is {pilot.probes}; it must be at least 2.")
    require(pilot.checkpoints >= 2, f"checkpoints is {pilot.checkpoints}; it must be at least 2.")
    gap = pilot.steps // pilot.checkpoints
    require(gap >= 1, f"steps is {pilot.steps}; it must be at least the number of checkpoints, {pilot.checkpoints}.")
    planned = pilot.planned_steps or 10 * pilot.steps
    require(planned >= pilot.steps, f"planned_steps is {planned}; it must be at least the pilot's {pilot.steps}.")
    options = {option.split("=")[0] for option in pilot.rest} & {"--betas", "--state", "--allow-unbalanced"}
    require(
        not options, f"{min(options, default='')} is given after --; the pilot runs at {PILOT_BETA} with fp32 state."
    )
    with TemporaryDirectory() as out:
        rest = ("--betas", repr(PILOT_BETA), *pilot.rest)
        with probe.alone("train.choose_beta", Path(out), planned, rest) as trainer:
            found = []
            with Progress(pilot.steps, 0, "pilot") as progress:
                while trainer.step < gap * pilot.checkpoints:
                    line = trainer.train_step()
                    progress.show(trainer.step, f"loss {line['loss']:.4f}")
                    if trainer.step % gap == 0:
                        found.append(draw(trainer, pilot.probes))
            run = trainer.run
            return estimate(found, gap), {
                "steps": planned,
                "tokens_per_step": run.parallelism.batch * run.data.sequence_length,
            }


def report(choice: Choice, plan: dict[str, Any]) -> str:
    """The recommendation with its inputs, and what the other rules would say."""
    lines = [
        f"noise V = {choice.noise:.4g}, drift D = {choice.drift:.4g} a step^2, horizon (V / 4D)^(1/3) = {choice.horizon:.1f} steps",
        f"beta = {choice.beta:.4f}",
    ]
    if choice.drift <= 0.0:
        lines.append("The drift can't be told from noise; more --probes would measure it. The beta is an upper bound.")
    others = ["0.95", "0.944", "refresh:1000"]
    for rule in others:
        try:
            lines.append(f"{rule}: {horizon.choose(rule, **plan):.4f}")
        except ValueError as error:
            lines.append(f"{rule}: none ({error})")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line: ``python -m train.choose_beta --help``; the exit code."""
    try:
        prepare_environment()
        pilot = parse(Pilot, sys.argv[1:] if arguments is None else arguments, "train.choose_beta", __doc__)
        print(report(*choose(pilot)))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
