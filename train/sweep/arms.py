"""The arms of a comparison: betas, or a rule that chooses them, and how the optimizer's state is stored."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from train.common.errors import ConfigError
from train.run.config import Optimizer


class Arm(NamedTuple):
    """What the runs of a comparison differ in, but for lr and seed."""

    betas: tuple[float, ...] | str
    """One number where both are equal; or the rule that chooses it."""
    state: str

    @property
    def words(self) -> list[str]:
        """The betas, for a command line."""
        return [self.betas] if isinstance(self.betas, str) else list(map(repr, self.betas))

    def __str__(self) -> str:
        return ",".join(self.words) + (f":{self.state}" if self.state != "fp32" else "")

    @staticmethod
    def of(optimizer: Optimizer) -> Arm:
        """That of a run."""
        betas = (optimizer.betas,) if isinstance(optimizer.betas, float) else optimizer.betas
        return Arm.shortened(betas, optimizer.state)

    @staticmethod
    def shortened(betas: tuple[float, ...] | str, state: str) -> Arm:
        """With one beta where both are equal."""
        return Arm(betas[:1] if isinstance(betas, tuple) and betas[0] == betas[-1] else betas, state)

    @staticmethod
    def parse(text: str) -> Arm:
        """From the command line; raises :class:`ConfigError`."""
        from balanced_adam import beta_schedule
        from balanced_adam.state import FORMATS

        said, _, state = text.rpartition(":")
        if state not in FORMATS:
            said, state = text, "fp32"
        if beta_schedule.is_rule(said):
            with suppress(ValueError):  # what is no number is refused with the run's settings
                name, _, number = said.rpartition(":")
                said = f"{name}:{repr(float(number)).removesuffix('.0')}"
            return Arm(said, state)
        try:
            betas = tuple(float(part) for part in said.split(","))
            if len(betas) not in (1, 2) or not all(0.0 <= beta < 1.0 for beta in betas):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"arms has {text!r}; an arm is one beta or beta1,beta2, each in [0, 1), or a rule such as refresh:1000; and then, after a "
                f"colon, one of {', '.join(FORMATS)}."
            ) from None
        return Arm.shortened(betas, state)
