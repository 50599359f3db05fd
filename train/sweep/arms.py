"""The arms of a comparison: the optimizer, betas or a rule that chooses them, and the storage format of the state."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from train.common.errors import ConfigError, require
from train.run.config import Optimizer
from train.run.optimizers import FOREIGN, OWN


class Arm(NamedTuple):
    """What distinguishes the runs of a comparison, besides lr and seed."""

    betas: tuple[float, ...] | str
    """beta1 and beta2, or one number if they are equal, or the rule that chooses it."""
    state: str
    """Storage format of the optimizer's state, such as "fp32"."""
    optimizer: str = "adam"
    """As --optimizer of train.pretrain."""

    @property
    def words(self) -> list[str]:
        """The values of --betas on a command line."""
        return [self.betas] if isinstance(self.betas, str) else list(map(repr, self.betas))

    def __str__(self) -> str:
        name = f"{self.optimizer}:" if self.optimizer != "adam" else ""
        return name + ",".join(self.words) + (f":{self.state}" if self.state != "fp32" else "")

    @staticmethod
    def of(optimizer: Optimizer) -> Arm:
        """Return the arm of a run with these optimizer options."""
        betas = (optimizer.betas,) if isinstance(optimizer.betas, float) else optimizer.betas
        return Arm.shortened(betas, optimizer.state, optimizer.optimizer)

    @staticmethod
    def shortened(betas: tuple[float, ...] | str, state: str, optimizer: str) -> Arm:
        """Return the arm, with one number if both betas are equal."""
        return Arm(betas[:1] if isinstance(betas, tuple) and betas[0] == betas[-1] else betas, state, optimizer)

    @staticmethod
    def parse(text: str) -> Arm:
        """Parse an arm from the command line.

        Raises:
            ConfigError: if the text is not an arm.
        """
        from balanced_adam import beta_schedule
        from balanced_adam.state import FORMATS

        optimizer, _, rest = text.partition(":")
        if optimizer in FOREIGN:
            of_theirs, _, rest = rest.partition(":")
            optimizer = f"{optimizer}:{of_theirs}"
        elif optimizer not in OWN:
            optimizer, rest = "adam", text
        setting, _, state = rest.rpartition(":")
        if state not in FORMATS:
            setting, state = rest, "fp32"
        if beta_schedule.is_rule(setting):
            with suppress(ValueError):  # a bad number is rejected with the run's settings
                name, _, number = setting.rpartition(":")
                setting = f"{name}:{repr(float(number)).removesuffix('.0')}"
            return Arm(setting, state, optimizer)
        try:
            betas = tuple(float(part) for part in setting.split(","))
            if len(betas) not in (1, 2) or not all(0.0 <= beta < 1.0 for beta in betas):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"arms has {text!r}; an arm is one beta or beta1,beta2, each in [0, 1), or a rule such as "
                f"refresh:1000, optionally followed by a colon and one of {', '.join(FORMATS)}, and after one of "
                f"{', '.join(OWN)}, torch:NAME and deepspeed:NAME and a colon."
            ) from None
        arm = Arm.shortened(betas, state, optimizer)
        require(
            state == "fp32" or len(arm.betas) == 1,
            f"arms has {text!r}; packed moments need equal betas (docs/packed-state.md).",
        )
        return arm
