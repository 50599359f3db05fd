"""Build the data, model, learning-rate schedule and DeepSpeed engine of one run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from train.common.errors import ConfigError, RankError, first_line, require
from train.data import tokenization
from train.data.mixture import PERIOD, Mixture
from train.data.sources import Sources
from train.distributed.ranks import Ranks
from train.run import deepspeed_config, documents, initial_weights, loss, model, optimizers, run_dir
from train.run.config import Run, Schedule
from train.run.trainer import Trainer

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler


def lr_scheduler(settings: Schedule, peak: float) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """Return the learning-rate schedule, from transformers, as the callable that ``deepspeed.initialize`` takes."""
    from transformers import get_scheduler

    names = {"cosine": "cosine_with_min_lr", "linear": "polynomial", "wsd": "warmup_stable_decay"}
    extra: dict[str, dict[str, Any]] = {
        "cosine": {"min_lr_rate": settings.final_lr},
        "linear": {"lr_end": settings.final_lr * peak, "power": 1.0},
        "wsd": {"min_lr_ratio": settings.final_lr, "num_decay_steps": settings.decay_steps},
    }
    return lambda optimizer: get_scheduler(
        names[settings.schedule],
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=settings.steps,
        scheduler_specific_kwargs=extra[settings.schedule],
    )


def initialize(run: Run, ranks: Ranks, ds_config: dict[str, Any], resumes: bool = False) -> Trainer:
    """Prepare the data, and build the model, the engine and the trainer.

    Args:
        run: the options.
        ranks: all ranks call this.
        ds_config: resolved for these ranks.
        resumes: whether a checkpoint will be loaded, so that ``--init-from`` need not be.

    Raises:
        ConfigError: on all ranks, if data or model is unsuitable.
    """
    import deepspeed

    from balanced_adam.zero import describe

    with ranks.collective_errors():
        begun = run_dir.begun(run.out)
        parent = run.checkpoints.parent
        earlier = begun or (run_dir.begun(parent) if parent else None)
        tokenizer = tokenization.load_tokenizer(run.data.tokenizer)
        rows = (earlier.rows or len(tokenizer)) if earlier else None
        config = model.configuration(run.model, len(tokenizer), run.data.sequence_length, rows)
        digest = tokenization.digest(tokenizer)
        require(
            begun is not None or earlier is None or earlier.tokenizer in (None, digest),
            f"branch_from is {run.checkpoints.branch_from}, whose run had another tokenizer; give it.",
        )
        if run.model.init_from:
            initial_weights.check_tokenizer(run.model.init_from, tokenizer)
            if not resumes and ranks.is_main:  # by itself, since at stage 3 all ranks read the weights together
                initial_weights.check_names(run.model.init_from, config)
        end = documents.end_of(run.data, tokenizer)
    with ranks.collective_errors():
        sources = Sources.of(run.data)
    prepared: list[list[str]] = []

    def prepare() -> None:
        prepared.append(sources.prepare(tokenizer, begun.tokens if begun else ""))

    # One rank on each host prepares the tokens; the other ranks use them.
    ranks.wait_for(prepare if ranks.local_rank == 0 else None)
    # Rank 0's token folders count: the corpus is examined once.
    folders = ranks.broadcast(prepared[0] if ranks.is_main else [])
    with ranks.collective_errors():
        tokens = sources.name(folders)  # stands for those of all sources
        same_text = earlier is not None and earlier.tokens == tokens
        train, validation = sources.open(folders, len(tokenizer), earlier.order if earlier and same_text else None)
        if ranks.is_main:
            print(sources.summary(folders), file=sys.stderr, flush=True)
            if len(train.sources) > 1:
                print(_mixed(run, train), file=sys.stderr, flush=True)
        batch = run.parallelism.batch
        require(
            len(train) >= batch,
            f"data is {run.data.data!r}, whose training text is {len(train)} sequences of {train.length} tokens, "
            f"less than one batch of {batch}; give more text, a shorter sequence_length or a smaller batch.",
        )
        for each in validation:
            require(
                len(each.blocks) > 0,
                f"data is {run.data.data!r}, whose validation text{f' ({each.name})' if each.name else ''} is less "
                f"than one sequence of {train.length} tokens; give more text, or a shorter sequence_length.",
            )
        if end is not None:
            texts = dict(zip((f"{name} training".strip() for name in train.names), train.sources, strict=True))
            texts |= {f"{each.name} validation".strip(): each.blocks for each in validation}
            documents.check_ends(texts, end)
        load = run.model.init_from is not None and not resumes
        network = model.build(config, run.model, run.seed, ds_config, ranks, load)
        embedded = getattr(config, "vocab_size", len(tokenizer))
        kind = loss.resolved(run.model.loss, run.data.sequence_length, embedded, earlier.loss if earlier else None)
        if kind == "chunked":
            loss.use_chunked(network)
    trained = [p for p in network.parameters() if p.requires_grad]
    # Weight decay applies to matrices, not to gains and biases.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]},
        {"params": [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2], "weight_decay": 0.0},
    ]
    try:
        engine, *_ = deepspeed.initialize(
            model=network,
            model_parameters=[group for group in groups if group["params"]],
            config=ds_config,
            optimizer=optimizers.build(run.optimizer.optimizer, ds_config["optimizer"]["params"]),
            lr_scheduler=lr_scheduler(run.schedule, run.optimizer.lr),
        )
    except (AssertionError, ValueError, NotImplementedError) as error:
        # How DeepSpeed refuses a configuration, or we refuse it there; from other code it is a bug.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        package = frame.f_globals["__name__"].partition(".")[0]
        if package not in ("deepspeed", "balanced_adam") or not str(error):
            raise
        sentence = f"ds_config {run.parallelism.ds_config} is refused by DeepSpeed: {first_line(error)}"
        raise (ConfigError if ranks.is_main else RankError)(sentence) from error  # it may be of one rank alone
    if ranks.is_main:
        name = ds_config["optimizer"]["type"]
        how = "by its own step" if optimizers.is_foreign(run.optimizer.optimizer) else describe(engine.optimizer)
        print(f"{name}: {how}", file=sys.stderr, flush=True)
    layout = deepspeed_config.layout(ds_config, ranks.world)
    facts = {"tokens": tokens, "order": train.order, "loss": kind, "rows": embedded, "tokenizer": digest}
    trainer = Trainer(run, ranks, train, validation, engine, layout, end, facts)
    if load and (spoiled := trainer.nonfinite_weight()):
        raise ConfigError(f"init_from is {run.model.init_from}, whose weight {spoiled} is not finite.")
    loss.check(engine, kind, run.model.model, len(tokenizer), run.data.sequence_length)
    if end is not None:
        documents.check_model(engine, run.model.model, end, len(tokenizer), run.data.sequence_length)
    if run.model.compile:
        with ranks.collective_errors():
            _check_compiler(ranks.device)
        engine.compile()
    return trainer


def _check_compiler(device: torch.device) -> None:
    """Check that torch.compile works here, by the smallest function.

    Raises:
        ConfigError: if it doesn't, for want of a compiler, say.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of any class, depending on what is missing
        raise ConfigError(
            f"compile is true, and torch.compile does not work here ({first_line(error)}); leave --compile out."
        ) from None


def _mixed(run: Run, train: Mixture) -> str:
    """Describe what share of the sequences comes from each source, and how often each is run through."""
    drawn = train.drawn(run.schedule.steps * run.parallelism.batch, run.seed)
    shares = zip(train.names, train.shares, train.sources, strict=True)
    each = [
        f"{name} {100 * share / PERIOD:.5g} % ({drawn[name] / len(source):.2g} epochs)"
        for name, share, source in shares
    ]
    return f"mixture: {', '.join(each)}."
