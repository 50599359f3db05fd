"""The training loop of one run: steps, validation, divergence checks and saving."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from balanced_adam import UpdateSize
from train.common.progress import Progress
from train.data.blocks import Blocks
from train.data.mixture import Mixture
from train.data.prefetch import Prefetch
from train.data.sources import ValidationSet
from train.distributed.preemption import STOP_FILE, StopRequest
from train.distributed.ranks import Ranks
from train.run import documents, model, optimizers
from train.run.config import Run
from train.run.metrics import NAMED, TOKENS, Metrics

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Peak dense bf16 FLOP/s of a GPU, from data sheets, by words in its name. The first match counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


class Trainer:
    """The engine, the data and the loop of one run, on one rank."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        train: Mixture,
        validation: list[ValidationSet],
        engine: DeepSpeedEngine,
        layout: dict[str, Any],
        end: int | None,
        facts: dict[str, Any],
    ) -> None:
        self.run, self.ranks, self.train, self.validation, self.engine = run, ranks, train, validation, engine
        self.facts = facts
        """What run.json says beside the run's identity; see :class:`train.common.schemas.RunFile`."""
        self.end = end  # token that ends a document, if each is to see itself alone
        self.micro = engine.train_micro_batch_size_per_gpu()
        self.accumulation = engine.gradient_accumulation_steps()
        self.parameters = model.parameter_count(engine.module)
        self.multiplied = self.parameters - model.looked_up(engine.module)  # weights that each token is multiplied by
        self.step = 0  # optimizer steps taken
        self.branched_at = 0
        """Of these, how many the run took that this one branches from."""
        self.beta = run.moving_beta()
        self.layout = layout
        self.stop = StopRequest(run.out / STOP_FILE if ranks.is_main else None)
        self.stopping = False
        """Whether any rank has been asked to stop; the same on all ranks."""
        self.batches = Prefetch(self.batch_of)

    def batch_of(self, step: int) -> torch.Tensor:
        """Return this rank's sequences of a step, in memory from which GPUs copy by themselves.

        Returns:
            int64, [micro-batches, micro_batch, sequence_length].
        """
        indices = self.train.batch(step, self.run.parallelism.batch, self.run.seed)
        tokens = self.train.take(self.own_part(indices).ravel()).view(self.accumulation, self.micro, -1)
        return tokens.pin_memory() if self.ranks.device.type == "cuda" else tokens

    def own_part(self, batch: np.ndarray) -> np.ndarray:
        """Return this rank's part of a global batch of indices: [micro-batches, micro_batch]."""
        return batch.reshape(self.accumulation, self.ranks.world, self.micro)[:, self.ranks.rank]

    def inputs(self, tokens: torch.Tensor, predicted: float) -> dict[str, Any]:
        """Return what the model is given.

        Args:
            tokens: [micro_batch, sequence_length].
            predicted: with ``--document-mask``, by what the sum of the losses is divided. Otherwise it is a mean.
        """
        if self.end is None:
            return {"input_ids": tokens, "labels": tokens}
        return {**documents.inputs(tokens, self.end), "num_items_in_batch": predicted}

    def loss(self, tokens: torch.Tensor, predicted: float) -> torch.Tensor:
        """Run the model forward on a micro-batch, and return its loss; see :meth:`inputs`."""
        return self.engine(**self.inputs(tokens, predicted)).loss

    def predicted(self, tokens: torch.Tensor) -> float:
        """Return on how many of these tokens a loss is taken: NaN without ``--document-mask``, which doesn't ask."""
        return math.nan if self.end is None else float(max(1, documents.predicted(tokens, self.end)))

    def share(self, tokens: torch.Tensor) -> float:
        """Return the number of tokens on which a loss is taken, over all ranks, divided by the number of micro-batches.

        So the mean of the micro-batches' losses is that of the tokens', however documents lie in them.
        """
        if self.end is None:
            return math.nan
        total = self.ranks.sum([float(documents.predicted(tokens.flatten(0, 1), self.end))])[0]
        return max(total, 1.0) / (self.accumulation * self.ranks.world)

    def train_step(self) -> dict[str, float | None]:
        """Take one optimizer step and return its line for metrics.jsonl, equal on all ranks but for time."""
        began = time.perf_counter()
        run, engine = self.run, self.engine
        # Any randomness in the model (dropout) is a function of seed, step and rank, so that a resume needs no state.
        seed = hash((run.seed, self.step, self.ranks.rank))
        # Not torch.manual_seed, which also queries other devices and takes half a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        batch = self.batches.get(self.step)
        predicted = self.share(batch)
        lr = engine.get_lr()[0]
        if self.beta:
            for group in engine.optimizer.param_groups:
                group["betas"] = (self.beta(self.step),) * 2
        total = torch.zeros((), device=self.ranks.device)
        norm: float | None = None
        for part in range(self.accumulation):
            self.ranks.heartbeat(step=True)
            loss = self.loss(batch[part].to(self.ranks.device, non_blocking=True), predicted)
            engine.backward(loss)
            total += loss.detach().float() / self.accumulation
            if part == self.accumulation - 1 and not hasattr(engine.optimizer, "_global_grad_norm"):
                # At stage 0 in float32 DeepSpeed has no optimizer wrapper, and clips without reporting the norm.
                norm = self.norm_at_stage_0()
            with self.without_clipping() if norm is not None and not math.isfinite(norm) else nullcontext():
                engine.step()
        self.step += 1
        if norm is None:
            reported = engine.get_global_grad_norm()
            norm = None if reported is None else float(reported)
        foreign = optimizers.is_foreign(run.optimizer.optimizer)
        size = UpdateSize(math.nan, math.nan, 1) if foreign else engine.basic_optimizer.update_size()
        (loss_sum, squares, count), (greatest, stopping, memory) = self.ranks.sum_and_max(
            [float(total), size.sum_of_squares, size.numel], [size.greatest, float(bool(self.stop)), _memory()]
        )
        self.stopping = stopping > 0.0
        found, of = engine.basic_optimizer.projected() if hasattr(engine.basic_optimizer, "projected") else (0, 0)
        seconds = time.perf_counter() - began
        tokens_per_second = run.tokens_per_step / seconds
        return {
            "step": self.step,
            "loss": loss_sum / self.ranks.world,
            "lr": lr,
            "grad_norm": norm,
            "update_max": greatest,
            "update_rms": math.sqrt(squares / count) if count else 0.0,
            **self.tokens_by_source(),
            **({"projected": found / of} if of else {}),
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "skipped_steps": engine.skipped_steps,
            "memory_gib": memory / 2**30,
            **self._utilization(tokens_per_second),
        }

    def norm_at_stage_0(self) -> float:
        """Return the gradient norm. If it is not finite, drop the gradient, as DeepSpeed does at other stages."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.engine.skipped_steps += 1
            for parameter in self.engine.module.parameters():
                parameter.grad = None
        return norm

    @contextmanager
    def without_clipping(self) -> Iterator[None]:
        """Disable clipping during the block: DeepSpeed can't clip if there is no gradient."""
        settings = self.engine._config
        clip, settings.gradient_clipping = settings.gradient_clipping, 0.0
        try:
            yield
        finally:
            settings.gradient_clipping = clip

    def tokens_by_source(self) -> dict[str, int]:
        """Return how many tokens of each source this run has trained on, by the metric's name; nothing for one source.

        What was trained on before the run branched is not counted: that may have been other sources.
        """
        if len(self.train.sources) == 1:
            return {}
        batch, seed = self.run.parallelism.batch, self.run.seed
        drawn, before = (self.train.drawn(step * batch, seed) for step in (self.step, self.branched_at))
        return {f"{TOKENS}{name}": (drawn[name] - before[name]) * self.train.length for name in drawn}

    def validated(self, blocks: Blocks) -> np.ndarray:
        """Return which of a set's blocks one validation reads: a multiple of the batch, or all if they are fewer.

        They are spread evenly over the text. They are the same every time and for every number of ranks.
        """
        batch = self.run.parallelism.batch
        most = batch * min(len(blocks) // batch, self.run.logging.validation_batches or sys.maxsize)
        count = most or len(blocks)
        return np.arange(count) * len(blocks) // count

    def validate(self) -> dict[str, float]:
        """Return the mean losses on held-out text: validation_loss, and validation_loss/NAME for each set with a name.

        validation_loss is the mean over the sets by their weights.
        """
        losses = {held_out.name: self.loss_on(held_out.blocks) for held_out in self.validation}
        whole = sum(held_out.weight for held_out in self.validation)
        mean = sum(held_out.weight / whole * losses[held_out.name] for held_out in self.validation if held_out.weight)
        return {"validation_loss": mean, **{f"{NAMED}{name}": loss for name, loss in losses.items() if name}}

    @torch.no_grad()
    def loss_on(self, held_out: Blocks) -> float:
        """Return the mean loss on the blocks of :meth:`validated`."""
        chosen, world = self.validated(held_out), self.ranks.world
        weight = 1.0
        if len(chosen) >= self.run.parallelism.batch:
            batches = chosen.reshape(-1, self.run.parallelism.batch)
            mine = [part for rows in batches for part in self.own_part(rows)]
        else:  # one by one; a rank that has one less takes the last again, which doesn't count
            rounds = -(-len(chosen) // world)
            places = np.arange(rounds) * world + self.ranks.rank
            mine = list(chosen[np.minimum(places, len(chosen) - 1)][:, None])
            weight = float(places[-1] < len(chosen))
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        counted = 0.0
        self.engine.eval()
        for number, part in enumerate(mine, 1):
            self.ranks.heartbeat()
            tokens = held_out.take(part)
            counts = weight if number == len(mine) else 1.0
            loss = self.loss(tokens.to(self.ranks.device), 1.0)
            total += counts * loss.double()
            counted += counts * (1 if self.end is None else documents.predicted(tokens, self.end))
        self.engine.train()
        summed, number_of = self.ranks.sum([float(total), counted])
        return summed / max(number_of, 1.0)

    def fit(self, metrics: Metrics | None, progress: Progress, save: Callable[[], None]) -> dict[str, Any]:
        """Train to the last step, validating and saving on the way, and return the content of result.json.

        If asked to stop, save and return the status "stopped".

        Args:
            metrics: where each step is logged, on rank 0; None on the others.
            progress: where progress is shown.
            save: saves a checkpoint of the engine's current state; called on all ranks.

        Raises:
            ConfigError: if a checkpoint can't be written.
        """
        run, every = self.run, self.run.checkpoints.save_every
        nonfinite, spoiled = 0, ""
        validated = {"validation_loss": math.nan}
        while self.step < run.schedule.steps:
            line = self.train_step()
            if metrics:
                metrics.write(**line)
                self._monitor({k: v for k, v in line.items() if k != "step"})
            progress.show(self.step, f"loss {line['loss']:.4f}")
            nonfinite = 0 if self.is_finite(line) else nonfinite + 1
            if nonfinite == run.stop_after_nonfinite:
                reason = (
                    f"the loss or the gradient was not finite for {nonfinite} steps in a row, up to step {self.step}"
                )
                return self.diverged(reason)
            last = self.step == run.schedule.steps
            if last or (run.logging.validate_every and self.step % run.logging.validate_every == 0):
                validated = self.validate()
                if metrics:
                    metrics.write(step=self.step, **validated)
                    self._monitor(dict(validated))
            due = last or self.stopping or (every and self.step % every == 0)
            spoiled = self.nonfinite_weight() if due else ""
            if spoiled and self.ranks.is_main:
                print(f"No checkpoint is written at step {self.step}: weight {spoiled} is not finite.", flush=True)
            # A step that DeepSpeed skips leaves the weights unchanged, so the last one is saved even if it was skipped.
            if due and not spoiled and (last or not nonfinite):
                if metrics:
                    metrics.sync()
                save()
            if self.stopping and not last:
                return {"status": "stopped", "step": self.step}
        # All steps may have been done before, and the run cut before result.json.
        if not math.isfinite(validated["validation_loss"]):
            validated = self.validate()
        if spoiled or not math.isfinite(validated["validation_loss"]):
            what = f"weight {spoiled}" if spoiled else "validation loss"
            return self.diverged(f"its {what} is not finite at the end, at step {self.step}")
        return {"status": "finished", "step": self.step, **validated, **self.about()}

    def diverged(self, reason: str) -> dict[str, Any]:
        """Return the content of result.json of a run that has diverged."""
        return {"status": "diverged", "reason": reason, "step": self.step, "validation_loss": None, **self.about()}

    def about(self) -> dict[str, Any]:
        """Return the fields of result.json that do not depend on how the run ended."""
        return {
            "tokens": self.step * self.run.parallelism.batch * self.train.length,
            "parameters": self.parameters,
            **self.tokens_by_source(),
            "validation_blocks": sum(len(self.validated(held_out.blocks)) for held_out in self.validation),
            "world": self.ranks.world,
            "device": _device_name(self.ranks.device),
        }

    def is_finite(self, line: dict[str, Any]) -> bool:
        """Return whether loss and gradient norm of a step were finite.

        DeepSpeed silently skips steps whose gradient is not finite, without limit. In fp16 this is how the loss scale
        adjusts, so there only the loss counts.
        """
        norm = 0.0 if self.engine.fp16_enabled() or line["grad_norm"] is None else line["grad_norm"]
        return math.isfinite(line["loss"]) and math.isfinite(norm)

    def nonfinite_weight(self) -> str:
        """Return the name of a weight with an element that is not finite, on any rank; empty if there is none.

        One step can spoil a weight before any loss shows it.
        """
        named = self.engine.module.named_parameters()
        mine = next((name for name, p in named if not torch.isfinite(model.own_part(p)).all()), "")
        return next(filter(None, self.ranks.gather(mine)), "")

    def _monitor(self, values: dict[str, float | None]) -> None:
        if self.engine.monitor.enabled:
            # Counted in samples, like DeepSpeed's own events: W&B drops events with a smaller number than the last.
            at = self.engine.global_samples
            self.engine.monitor.write_events(
                [(f"train/{k}", v, at) for k, v in values.items() if v is not None and math.isfinite(v)]
            )

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        """Return the model FLOP/s utilization ("mfu") on known GPUs, else nothing.

        It counts 6 FLOP per token and weight, but for an input embedding that is only looked up, plus attention
        (arXiv 2204.02311, appendix B).
        """
        peak = peak_flops(_device_name(self.ranks.device))
        config = self.engine.module.config
        if peak is None or not hasattr(config, "num_hidden_layers"):
            return {}
        per_token = 6 * self.multiplied + 12 * config.num_hidden_layers * config.hidden_size * self.train.length
        return {"mfu": per_token * tokens_per_second / (peak * self.ranks.world)}


def peak_flops(gpu: str) -> float | None:
    """Return the peak FLOP/s of a GPU by its name, or None if it is unknown."""
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", gpu)), None)


def _memory() -> float:
    """Return the peak memory allocated on this GPU, or on CPU this process's resident memory, in bytes."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    import psutil

    return float(psutil.Process().memory_info().rss)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
