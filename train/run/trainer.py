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
from train.data.blocks import Blocks, Order, batch_indices
from train.distributed.preemption import STOP_FILE, StopRequest
from train.distributed.ranks import Ranks
from train.run import model, optimizers
from train.run.config import Run
from train.run.metrics import Metrics

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
        train: Blocks,
        validation: Blocks,
        engine: DeepSpeedEngine,
        tokens: str,
        layout: dict[str, Any],
        order: Order,
    ) -> None:
        self.run, self.ranks, self.train, self.validation, self.engine = run, ranks, train, validation, engine
        self.tokens = tokens  # name of the token folder, a fingerprint of text and tokenizer
        self.micro = engine.train_micro_batch_size_per_gpu()
        self.accumulation = engine.gradient_accumulation_steps()
        self.parameters = model.parameter_count(engine.module)
        self.step = 0  # optimizer steps taken
        self.beta = run.moving_beta()
        self.layout, self.order = layout, order
        self.stop = StopRequest(run.out / STOP_FILE if ranks.is_main else None)
        self.stopping = False
        """Whether any rank has been asked to stop; the same on all ranks."""

    def local_batch(self, indices: np.ndarray, part: int) -> torch.Tensor:
        """Return this rank's sequences of micro-batch ``part`` of a global batch: [micro_batch, sequence_length]."""
        rows = indices.reshape(self.accumulation, self.ranks.world, self.micro)[part, self.ranks.rank]
        blocks = self.train if self.engine.module.training else self.validation
        return blocks.take(rows).to(self.ranks.device)

    def train_step(self) -> dict[str, float | None]:
        """Take one optimizer step and return its line for metrics.jsonl, equal on all ranks but for time and memory."""
        began = time.perf_counter()
        run, engine = self.run, self.engine
        # Any randomness in the model (dropout) is a function of seed, step and rank, so that a resume needs no state.
        seed = hash((run.seed, self.step, self.ranks.rank))
        # Not torch.manual_seed, which also queries other devices and takes half a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        indices = batch_indices(self.step, run.parallelism.batch, len(self.train), run.seed, self.order)
        lr = engine.get_lr()[0]
        if self.beta:
            for group in engine.optimizer.param_groups:
                group["betas"] = (self.beta(self.step),) * 2
        total = torch.zeros((), device=self.ranks.device)
        norm: float | None = None
        for part in range(self.accumulation):
            self.ranks.heartbeat(step=True)
            tokens = self.local_batch(indices, part)
            loss = engine(input_ids=tokens, labels=tokens).loss
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
        (loss_sum, squares, count), (greatest, stopping) = self.ranks.sum_and_max(
            [float(total), size.sum_of_squares, size.numel], [size.greatest, float(bool(self.stop))]
        )
        self.stopping = stopping > 0.0
        found, of = engine.basic_optimizer.projected() if hasattr(engine.basic_optimizer, "projected") else (0, 0)
        seconds = time.perf_counter() - began
        tokens_per_second = indices.size * self.train.length / seconds
        return {
            "step": self.step,
            "loss": loss_sum / self.ranks.world,
            "lr": lr,
            "grad_norm": norm,
            "update_max": greatest,
            "update_rms": math.sqrt(squares / count) if count else 0.0,
            **({"projected": found / of} if of else {}),
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "skipped_steps": engine.skipped_steps,
            "memory_gib": _memory() / 2**30,
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

    @property
    def validation_blocks(self) -> int:
        """Number of held-out blocks that one validation reads; a multiple of the batch."""
        batch = self.run.parallelism.batch
        return batch * min(len(self.validation) // batch, self.run.logging.validation_batches or sys.maxsize)

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss on held-out text.

        The blocks are spread evenly over the text. They are the same every time and for every number of ranks.
        """
        batch, count = self.run.parallelism.batch, self.validation_blocks
        batches, blocks = count // batch, np.arange(count) * len(self.validation) // count
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        self.engine.eval()
        for number in range(batches):
            for part in range(self.accumulation):
                self.ranks.heartbeat()
                tokens = self.local_batch(blocks[number * batch : (number + 1) * batch], part)
                total += self.engine(input_ids=tokens, labels=tokens).loss.double()
        self.engine.train()
        return self.ranks.sum([float(total)])[0] / (batches * self.accumulation * self.ranks.world)

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
        validation_loss = math.nan
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
                validation_loss = self.validate()
                if metrics:
                    metrics.write(step=self.step, validation_loss=validation_loss)
                    self._monitor({"validation_loss": validation_loss})
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
        if not math.isfinite(validation_loss):  # all steps were done before, but the run was cut before result.json
            validation_loss = self.validate()
        if spoiled or not math.isfinite(validation_loss):
            what = f"weight {spoiled}" if spoiled else "validation loss"
            return self.diverged(f"its {what} is not finite at the end, at step {self.step}")
        return {"status": "finished", "step": self.step, "validation_loss": validation_loss, **self.about()}

    def diverged(self, reason: str) -> dict[str, Any]:
        """Return the content of result.json of a run that has diverged."""
        return {"status": "diverged", "reason": reason, "step": self.step, "validation_loss": None, **self.about()}

    def about(self) -> dict[str, Any]:
        """Return the fields of result.json that do not depend on how the run ended."""
        return {
            "tokens": self.step * self.run.parallelism.batch * self.train.length,
            "parameters": self.parameters,
            "validation_blocks": self.validation_blocks,
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

        It counts 6 FLOP per weight and token, plus attention (arXiv 2204.02311, appendix B).
        """
        peak = peak_flops(_device_name(self.ranks.device))
        config = self.engine.module.config
        if peak is None or not hasattr(config, "num_hidden_layers"):
            return {}
        per_token = 6 * self.parameters + 12 * config.num_hidden_layers * config.hidden_size * self.train.length
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
