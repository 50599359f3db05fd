"""The options of a run, one dataclass per concern, each with its checks. The command line is built from them.

A check raises :class:`ConfigError` with one sentence: the field, its value, and what it must be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from train.common.errors import ConfigError, require, shown
from train.common.files import REPOSITORY
from train.data.config import Data
from train.run import optimizers
from train.run.presets import LARGE

ARM = ("optimizer", "lr", "betas", "state", "allow_unbalanced")
"""The optimizer options in which the arms of a comparison may differ."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model."""

    model: str = "tiny"
    """A preset (tiny, small, 124m, 350m, 1.3b, 3b or 7b), or the path or hub name of a causal model's configuration."""
    init_from: Path | None = None
    """Begin with the weights of this Hugging Face checkpoint, a folder, and a new optimizer.
    The model is the folder's, so leave out --model. Default: weights drawn by the seed."""
    attention: str = "auto"
    """transformers' name of the implementation of attention: eager, sdpa, flash_attention_2, flex_attention and others.
    Default: transformers' choice."""
    compile: bool = False
    """Compile the model by torch.compile. The first steps take longer, and the numbers agree to rounding."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass. This saves memory and costs about a third more compute."""
    loss: Literal["auto", "full", "chunked"] = "auto"
    """Take the loss from all logits at once, or from a few tokens' at a time, which saves 12 bytes a logit.
    "auto" is chunked from 2^26 logits a sequence on."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a contradiction."""
        require(
            self.init_from is None or self.init_from.is_dir(),
            f"init_from is {self.init_from}, which is not a folder; give one that holds a Hugging Face checkpoint.",
        )
        require(
            self.init_from is None or self.model in ("tiny", str(self.init_from)),  # tiny is the default
            f"model is {shown(self.model)}, and init_from is {self.init_from}, which has a model; leave out --model.",
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer with its parameters, and gradient clipping."""

    optimizer: str = "adam"
    """adam is BalancedAdam. adamd, adamprox, adamp, l1, l1.5, l3, l6, amsgrad and adamnc: docs/relatives.md.
    Or torch:NAME, a class of torch.optim that takes betas, or deepspeed:NAME, one that DeepSpeed knows by name."""
    lr: float = 1e-3
    """Peak learning rate; above 0."""
    betas: float | tuple[float, float] | str = 0.95
    """One number in [0, 1) for beta1 = beta2. Or two numbers; if they differ, --allow-unbalanced is needed.
    Or a rule for one number: refresh:R (1 - beta = R / steps), half_life:STEPS, half_life_tokens:TOKENS, horizon:STEPS.
    Or from:A:to:B, a beta that moves from A to B during the run."""
    eps: float = 1e-8
    """Added to the root of the second moment; at least 0, and with packed16 and packed8 1e-9 or more."""
    weight_decay: float = 0.1
    """Each step shrinks a weight by lr x weight_decay of itself. At least 0.
    It applies to parameters of two or more dimensions."""
    state: Literal["fp32", "packed32", "packed16", "packed8"] = "fp32"
    """Storage format of the optimizer's two moments: together 8, 4, 2 or 1 bytes per weight (docs/packed-state.md)."""
    allow_unbalanced: bool = False
    """Allow beta1 and beta2 to differ: plain AdamW, the baseline of a comparison."""
    clip: float = 1.0
    """Global L2 norm above which the gradient is clipped; at least 0, and 0 disables clipping."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range. :meth:`Run.parameters` checks the rest."""
        optimizers.check_name(self.optimizer)
        require(self.lr > 0.0, f"lr is {self.lr}; it must be above 0.")
        require(self.clip >= 0.0, f"clip is {self.clip}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of the run and the learning-rate schedule."""

    steps: int = 300
    """Number of optimizer steps; at least 1."""
    tokens: float | None = None
    """Instead of steps: training tokens, such as 2.5e9, rounded up to a whole step."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Shape of the decay from lr to final_lr x lr.
    wsd (warm-up, stable, decay) decays over the last steps. Until then a run may be made longer by more --steps."""
    decay: int | None = None
    """Number of steps in which wsd decays. Default: a fifth of all steps."""
    warmup: int = 30
    """Steps in which the learning rate rises linearly from 0, so that the first step moves nothing; fewer than steps.
    With wsd it rises from final_lr x lr, as in transformers."""
    final_lr: float = 0.1
    """Learning rate at the end, as a fraction of the peak, in [0, 1]."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.tokens is None or self.tokens > 0, f"tokens is {self.tokens}; it must be above 0.")
        require(self.steps >= 1, f"steps is {self.steps}; it must be at least 1.")
        require(
            0 <= self.warmup < self.steps,
            f"warmup is {self.warmup}; it must lie in [0, steps), and steps is {self.steps}.",
        )
        require(0.0 <= self.final_lr <= 1.0, f"final_lr is {self.final_lr}; it is a fraction of lr, in [0, 1].")
        if self.decay is not None:
            require(self.schedule == "wsd", f"decay is {self.decay}, and schedule is {self.schedule}; only wsd has it.")
            most = self.steps - self.warmup
            require(
                1 <= self.decay <= most,
                f"decay is {self.decay}; it must lie between 1 and steps - warmup, which is {most}.",
            )

    @property
    def decay_steps(self) -> int:
        """Number of steps in which wsd decays."""
        return self.decay or max(1, self.steps // 5)


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """The batch size, and how the work is split over ranks. The split does not change the batches."""

    ds_config: Path = REPOSITORY / "ds_configs" / "zero1.json"
    """A DeepSpeed configuration file, which sets the ZeRO stage, offload and communication."""
    batch: int = 16
    """Sequences in one optimizer step, over all ranks. A multiple of ranks x micro_batch."""
    micro_batch: int | None = None
    """Sequences in one forward pass on one rank. If ranks x micro_batch is less than batch, gradients are accumulated.
    Default: as many as memory allows by the estimate of --dry-run, and at most batch / ranks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the forward and backward passes; master weights are float32.
    "auto" takes it from the ds_config; if that says "auto" too, it is bf16 on GPUs and fp32 on CPU."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.batch >= 1, f"batch is {self.batch}; it must be at least 1.")
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"micro_batch is {self.micro_batch}; it must be at least 1.",
        )

    def micro_batch_on(self, world: int) -> int:
        """Return the micro-batch size on ``world`` ranks.

        Raises:
            ConfigError: if the batch is not a multiple of ranks x micro-batch.
        """
        micro = self.micro_batch or max(self.batch // world, 1)
        require(
            self.batch % (micro * world) == 0,
            f"batch is {self.batch}; it must be a multiple of ranks x micro_batch = "
            f"{world} x {micro} = {world * micro}.",
        )
        return micro


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints and resuming."""

    save_every: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Number of checkpoints to keep, at least 1. The oldest are removed first."""
    keep_every: int = 0
    """Keep the checkpoints whose step is a multiple of this for good; a multiple of save_every. 0 keeps none so."""
    resume: bool = True
    """Resume from the newest complete checkpoint in the output folder, if there is one.
    With --no-resume a folder that holds a run is an error."""
    branch_from: Path | None = None
    """Begin with the state of another run: its weights, its optimizer's state, its step and its place in the data.
    A run's folder, of which the newest checkpoint is taken, or FOLDER/checkpoints/step-N. Schedule, lr, clip, data and
    seed are this run's; --steps counts those of the other run, too."""

    @property
    def parent(self) -> Path | None:
        """Folder of the run that this one branches from."""
        if self.branch_from is None:
            return None
        path = self.branch_from.resolve()
        return path.parent.parent if path.name.startswith("step-") else path

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.save_every >= 0, f"save_every is {self.save_every}; it must be at least 0.")
        require(self.keep >= 1, f"keep is {self.keep}; it must be at least 1, or there is nothing to resume from.")
        multiple = self.save_every > 0 and self.keep_every % self.save_every == 0
        require(
            self.keep_every == 0 or (self.keep_every > 0 and multiple),
            f"keep_every is {self.keep_every}; it must be 0 or a multiple of save_every, which is {self.save_every}.",
        )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Validation, and where metrics are logged. metrics.jsonl is always written."""

    validate_every: int = 100
    """Steps between validations; 0 validates only at the end."""
    validation_batches: int = 8
    """Batches of held-out text in one validation; 0 for all of them.
    They are spread evenly over the text and always the same."""
    tensorboard: bool = False
    """Also write TensorBoard files, through DeepSpeed's monitor."""
    csv: bool = False
    """Also write CSV files, through DeepSpeed's monitor."""
    wandb: str = ""
    """Name of a Weights & Biases project to log to as well, through DeepSpeed's monitor. Default: none."""

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

    ALTERNATIVES: ClassVar = ("steps", "tokens")
    """Where one of these is on the command line, the other in a file of options doesn't count."""
    out: Path
    """Folder of this run alone, for its settings, metrics, checkpoints and result."""
    config: Path | None = None
    """A YAML file of these options by name, such as recipes/124m.yaml; those on the command line win.
    Paths in it begin where you are."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data; at least 0."""
    dry_run: bool = False
    """Check everything, estimate memory and run one batch. Nothing is written to the run's folder."""
    stop_after_nonfinite: int = 3
    """Stop when the loss or the gradient was NaN or infinite for this many steps in a row; at least 1.
    The last good checkpoint is kept."""
    timeout: float = 600.0
    """Seconds without progress (a rank is stuck, a host is gone, the network is cut) after which the run is aborted.
    At least 5.
    It must exceed the time of the slowest step, validation batch or checkpoint file."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)

    def __post_init__(self) -> None:
        """Turn tokens into steps."""
        tokens = self.schedule.tokens
        if tokens is not None and 0 < tokens < math.inf and self.tokens_per_step > 0:
            steps = math.ceil(tokens / self.tokens_per_step)
            object.__setattr__(self, "schedule", dataclasses.replace(self.schedule, steps=steps))

    def check_given(self, names: set[str]) -> None:
        """Check what an option's value can't tell: whether it was given, or is the default.

        Raises:
            ConfigError: if two options are given of which one is meant, or a large preset is left with what only suits
                small ones.
        """
        require(not names >= {"steps", "tokens"}, "steps and tokens are both given; give one of them.")
        toys = {"data", "tokenizer", "sequence_length", *(() if "tokens" in names else ("steps",))} - names
        require(
            self.model.model not in LARGE or not toys,
            f"model is {self.model.model}, and {', '.join(sorted(toys))} would be the default, which suits models of a "
            "few million weights; give it (recipes/ has examples).",
        )

    def check(self) -> None:
        """Check everything that needs neither ranks nor data.

        Raises:
            ConfigError: on the first value that is out of range.
        """
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must be at least 0 and below 2^63.")
        require(
            self.stop_after_nonfinite >= 1,
            f"stop_after_nonfinite is {self.stop_after_nonfinite}; it must be at least 1.",
        )
        require(5.0 <= self.timeout < 1e6, f"timeout is {self.timeout}; it is in seconds, from 5 to a million.")
        concerns = [value for each in dataclasses.fields(self) if hasattr(value := getattr(self, each.name), "check")]
        for concern in concerns:
            for name, value in dataclasses.asdict(concern).items():
                if isinstance(value, float):
                    require(math.isfinite(value), f"{name} is {value}; it must be a finite number.")
            concern.check()
        self.parameters()

    def parameters(self) -> dict[str, Any]:
        """Return ``optimizer.params`` of the ds_config, with betas as a list of two numbers.

        Raises:
            ConfigError: if the optimizer rejects them, or betas is a rule that yields no valid beta for this run.
        """
        options = self.optimizer
        params = {name: getattr(options, name) for name in ("lr", "betas", "eps", "weight_decay", "state")}
        try:
            if beta := self.moving_beta():
                params["betas"] = beta(0)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if isinstance(params["betas"], float):
            params["betas"] = (params["betas"],) * 2
        require(
            not (optimizers.is_foreign(options.optimizer) and str(options.betas).startswith("from:")),
            f"betas is {options.betas!r} and optimizer is {options.optimizer!r}, whose bias correction takes betas for "
            "constant; give numbers.",
        )
        params = optimizers.settings_of(options.optimizer, params, options.allow_unbalanced)
        return {**params, "betas": list(params["betas"])}

    def moving_beta(self) -> Callable[[float], float] | None:
        """Return the beta as a function of the step (counted from 0) if betas is a rule, else None.

        Raises:
            ValueError: if the rule yields no valid beta for this run.
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
        """Return what makes two runs the same run: everything that decides the weights, as plain data for JSON.

        The location of files, the split over ranks, the checkpoint interval and logging are not part of it.
        """
        options = dataclasses.asdict(self)
        for name in ("data_cache", "verify_data"):
            options["data"].pop(name)
        for name, default in (("token_dtype", "auto"), ("eos_id", None), ("document_mask", False), ("validation", ())):
            if options["data"][name] == default:  # so that runs older than this option can be resumed
                del options["data"][name]
        if self.model.loss == "auto":
            del options["model"]["loss"]
        for name in ("attention", "compile"):  # how the same numbers are computed
            del options["model"][name]
        if self.model.init_from is None:
            del options["model"]["init_from"]
        else:
            options["model"]["init_from"] = str(self.model.init_from.resolve())
        if self.data.validation:  # wherever they are; their content identifies them
            options["data"]["validation"] = [each.partition("=")[0] for each in self.data.validation]
        if (path := Path(self.data.data)).exists():  # one spelling for one file
            options["data"]["data"] = str(path.resolve())
        del options["schedule"]["tokens"]
        if self.schedule.decay is None:
            del options["schedule"]["decay"]
        kept = {key: options[key] for key in ("seed", "model", "data", "optimizer", "schedule")}
        if self.checkpoints.branch_from:
            kept["branch_from"] = str(self.checkpoints.branch_from.resolve())
        if self.optimizer.state == "fp32":  # so that runs older than this option can be resumed
            del options["optimizer"]["state"]
        if self.optimizer.optimizer == "adam":
            del options["optimizer"]["optimizer"]
        parallelism = options["parallelism"]
        kept["parallelism"] = {key: parallelism[key] for key in ("batch", "precision")}
        return kept


@dataclass(frozen=True, kw_only=True)
class Preflight(Run):
    """The options of train.pretrain, and the number of ranks to check them for."""

    ranks: int | None = None
    """Check only settings, data and model, for a run on this many ranks.
    Default: check all hosts, on the ranks that the launcher has started."""

    def check(self) -> None:
        """As of :class:`Run`."""
        super().check()
        require(self.ranks is None or self.ranks >= 1, f"ranks is {self.ranks}; it must be at least 1.")
