"""Every setting of a run, one dataclass per concern, each with its checks; the command line is made from them.

A check raises :class:`ConfigError` with one sentence: the field, its value, and what would be right.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.common.errors import ConfigError, require
from train.common.files import REPOSITORY
from train.data.config import Data

ARM = (
    "lr",
    "betas",
    "state",
    "allow_unbalanced",
)  # the settings of the optimizer that the arms of a comparison may differ in


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    model: str = "tiny"
    """A preset (tiny, small, 124m, 350m, 1.3b), or the path or hub name of any causal language model's configuration."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """BalancedAdam's parameters, and clipping."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: float | tuple[float, float] | str = 0.95
    """One number (beta1 = beta2), or two, which need --allow-unbalanced where they differ; or a rule that chooses one number: refresh:R
    (R / steps is 1 - beta), half_life:STEPS, half_life_tokens:TOKENS or horizon:STEPS; or from:A:to:B, which moves."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    state: Literal["fp32", "packed32", "packed16", "packed8"] = "fp32"
    """How both moments are stored: 8, 4, 2 or 1 bytes a weight (docs/packed-state.md)."""
    allow_unbalanced: bool = False
    """Permit unequal betas: plain AdamW, the baseline of a comparison."""
    clip: float = 1.0
    """Greatest norm of the gradient; 0 for no clipping."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range, but for betas (:meth:`Run.parameters`)."""
        require(self.lr > 0.0, f"lr is {self.lr}; it must be above 0.")
        require(self.clip >= 0.0, f"clip is {self.clip}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and the learning rate's course."""

    steps: int = 300
    """Optimizer steps."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Shape of the decay; wsd (warm-up, stable, decay) decays over the last fifth."""
    warmup: int = 30
    """Steps of linear warm-up, from 0 (wsd: from final_lr, as transformers does it)."""
    final_lr: float = 0.1
    """The learning rate at the end, as a fraction of the peak."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.steps >= 1, f"steps is {self.steps}; it must be at least 1.")
        require(
            0 <= self.warmup < self.steps,
            f"warmup is {self.warmup}; it must lie in [0, steps), and steps is {self.steps}.",
        )
        require(0.0 <= self.final_lr <= 1.0, f"final_lr is {self.final_lr}; it is a fraction of lr, in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How the work is split over ranks; changes no batch."""

    ds_config: Path = REPOSITORY / "ds_configs" / "zero1.json"
    """A DeepSpeed configuration file: ZeRO stage, offload, communication."""
    batch: int = 16
    """Sequences in one optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Sequences in one forward pass on one rank; what is left is accumulated. Default: batch / ranks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What forward and backward passes compute in (master weights are float32). "auto" is what the ds_config says, and
    where that too says "auto", bf16 on GPUs and fp32 on CPU."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.batch >= 1, f"batch is {self.batch}; it must be at least 1.")
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"micro_batch is {self.micro_batch}; it must be at least 1.",
        )

    def micro_batch_on(self, world: int) -> int:
        """The micro-batch on ``world`` ranks.

        Raises:
            ConfigError: if the batch doesn't divide.
        """
        micro = self.micro_batch or max(self.batch // world, 1)
        require(
            self.batch % (micro * world) == 0,
            f"batch is {self.batch}; it must be a multiple of ranks x micro_batch = {world} x {micro} = {world * micro}.",
        )
        return micro


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is kept on disk."""

    save_every: int = 100
    """Steps between checkpoints; 0 for one at the end only."""
    keep: int = 2
    """How many checkpoints are kept; the oldest go first."""
    resume: bool = True
    """Go on from the newest whole checkpoint in the output folder, if there is one."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.save_every >= 0, f"save_every is {self.save_every}; it must be at least 0.")
        require(self.keep >= 1, f"keep is {self.keep}; it must be at least 1, or there is nothing to resume from.")


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is measured beside the training loss, and where it goes; metrics.jsonl is always written."""

    validate_every: int = 100
    """Steps between validations; 0 for one at the end only."""
    validation_batches: int = 8
    """Batches of held-out text in one validation, spread evenly over it and always the same ones; 0 for all."""
    tensorboard: bool = False
    """Also write TensorBoard files, through DeepSpeed's monitor."""
    csv: bool = False
    """Also write CSV files, through DeepSpeed's monitor."""
    wandb: str = ""
    """Also log to this Weights & Biases project, through DeepSpeed's monitor."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.validate_every >= 0, f"validate_every is {self.validate_every}; it must be at least 0.")
        require(
            self.validation_batches >= 0, f"validation_batches is {self.validation_batches}; it must be at least 0."
        )
        if self.wandb:
            from importlib.util import find_spec

            require(
                find_spec("wandb") is not None,
                f"wandb is {self.wandb!r} but the package wandb is missing: pip install wandb.",
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    out: Path
    """The run's own folder: settings, metrics, checkpoints, result."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    dry_run: bool = False
    """Check everything, estimate memory, run one batch, write nothing."""
    stop_after_nonfinite: int = 3
    """Stop when the loss or the gradient was NaN or infinite for this many steps in a row; the last good checkpoint is kept."""
    timeout: float = 600.0
    """Seconds without progress after which a run is given up: a rank is stuck, a host is gone, the network is cut. Longer than the
    slowest step, validation batch or file of a checkpoint."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)

    def check(self) -> None:
        """Check everything that needs neither ranks nor data; raise :class:`ConfigError`."""
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be at least 0 and below 2^63.")
        require(
            self.stop_after_nonfinite >= 1,
            f"stop_after_nonfinite is {self.stop_after_nonfinite}; it must be at least 1.",
        )
        require(5.0 <= self.timeout < 1e6, f"timeout is {self.timeout}; it is in seconds, at least 5.")
        for concern in (self.data, self.optimizer, self.schedule, self.parallelism, self.checkpoints, self.logging):
            for name, value in dataclasses.asdict(concern).items():
                if isinstance(value, float):
                    require(math.isfinite(value), f"{name} is {value}; it must be a finite number.")
            concern.check()
        self.parameters()

    def parameters(self) -> dict[str, Any]:
        """``optimizer.params`` of the ds_config, betas being two numbers.

        Raises:
            ConfigError: if BalancedAdam would refuse them, or betas is a rule that comes to no number here.
        """
        import torch

        from balanced_adam import BalancedAdam

        params = {name: value for name, value in dataclasses.asdict(self.optimizer).items() if name != "clip"}
        try:
            if beta := self.moving_beta():
                params["betas"] = beta(0)
            if isinstance(params["betas"], float):
                params["betas"] = (params["betas"],) * 2
            BalancedAdam([torch.zeros(1)], **params)
        except ValueError as error:
            raise ConfigError(str(error).replace("allow_unbalanced=True", "--allow-unbalanced")) from None
        return {**params, "betas": list(params["betas"])}

    def moving_beta(self) -> Callable[[float], float] | None:
        """Where betas is a rule, the beta at each step, counted from 0.

        Raises:
            ValueError: if the rule comes to no number here.
        """
        if not isinstance(self.optimizer.betas, str):
            return None
        from balanced_adam import beta_schedule

        return beta_schedule.schedule(
            self.optimizer.betas, steps=self.schedule.steps, tokens_per_step=self.tokens_per_step
        )

    @property
    def tokens_per_step(self) -> int:
        """Training tokens in one optimizer step."""
        return self.parallelism.batch * self.data.sequence_length

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything that decides the weights, as plain data for JSON.

        Where things lie, how the work is split over ranks, how often it is saved and what is logged does not count.
        """
        whole = dataclasses.asdict(self)
        for name in ("data_cache", "verify_data"):
            whole["data"].pop(name)
        if (path := Path(self.data.data)).exists():  # however it is spelled
            whole["data"]["data"] = str(path.resolve())
        kept = {key: whole[key] for key in ("seed", "model", "data", "optimizer", "schedule")}
        if self.optimizer.state == "fp32":  # so that runs from before there were others go on
            del whole["optimizer"]["state"]
        parallelism = whole["parallelism"]
        kept["parallelism"] = {key: parallelism[key] for key in ("batch", "precision")}
        return kept


@dataclass(frozen=True, kw_only=True)
class Preflight(Run):
    """What train.pretrain will get, and on how many ranks."""

    ranks: int | None = None
    """Check settings, data and model alone, for a run on so many ranks."""
