"""One training run: what ``deepspeed``, ``torchrun``, ``accelerate launch``, ``srun`` and plain ``python`` start.

The loop talks to BalancedAdam through the DeepSpeed engine, by its name in the ds_config.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from train import checkpoints, data, deepspeed_config, folder, model
from train.progress import Progress
from train.ranks import Ranks, leave, prepare_environment, start
from train.settings import RankError, Run, Schedule, SettingsError, TryAgain, parse, require
from train.watch import AGAIN, Lost, StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.optim.lr_scheduler import LRScheduler

# Peak dense bf16 FLOP/s of a GPU, from the makers' data sheets, by words in its name; the first that matches.
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


STOP = "STOP"  # a file in the run's folder that asks it to save and end


class Stopped(Exception):
    """A run that was asked to stop has saved and ended; it can go on."""


class Trainer:
    """The engine, the data and the loop of one run, on one rank."""

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        train: data.Blocks,
        validation: data.Blocks,
        engine: DeepSpeedEngine,
        tokens: str,
        layout: dict[str, Any],
    ) -> None:
        self.run, self.ranks, self.train, self.validation, self.engine = run, ranks, train, validation, engine
        self.tokens = tokens  # the fingerprint of text and tokenizer
        self.micro = engine.train_micro_batch_size_per_gpu()
        self.accumulation = engine.gradient_accumulation_steps()
        self.parameters = model.parameter_count(engine.module)
        self.step = 0  # optimizer steps taken
        self.beta = run.moving_beta()
        self.layout = layout
        self.stop = StopRequest(run.out / STOP if ranks.first else None)
        self.stopping = False
        """Whether some rank has been asked to stop; the same on all ranks."""

    def mine(self, indices: np.ndarray, part: int) -> torch.Tensor:
        """This rank's rows of micro-batch ``part`` of a global batch: [micro_batch, sequence_length]."""
        rows = indices.reshape(self.accumulation, self.ranks.world, self.micro)[part, self.ranks.rank]
        blocks = self.train if self.engine.module.training else self.validation
        return blocks.take(rows).to(self.ranks.device)

    def train_step(self) -> dict[str, float | None]:
        """One optimizer step; the line for metrics.jsonl, the same on all ranks."""
        began = time.perf_counter()
        run, engine = self.run, self.engine
        # Any randomness in the model (dropout) is a function of seed, step and rank, so that a resume needs no state.
        seed = hash((run.seed, self.step, self.ranks.rank))
        # (torch.manual_seed also asks for devices that aren't ours, for half a millisecond.)
        torch.default_generator.manual_seed(seed)
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        indices = data.batch_indices(self.step, run.parallelism.batch, len(self.train), run.seed)
        lr = engine.get_lr()[0]
        if self.beta:
            for group in engine.optimizer.param_groups:
                group["betas"] = (self.beta(self.step),) * 2
        total = torch.zeros((), device=self.ranks.device)
        norm: float | None = None
        for part in range(self.accumulation):
            self.ranks.alive(step=True)
            tokens = self.mine(indices, part)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            total += loss.detach().float() / self.accumulation
            if part == self.accumulation - 1 and not hasattr(engine.optimizer, "_global_grad_norm"):
                # Stage 0 in float32 runs BalancedAdam bare, and DeepSpeed clips without telling the norm.
                norm = self.norm_at_stage_0()
            with self.without_clipping() if norm is not None and not math.isfinite(norm) else nullcontext():
                engine.step()
        self.step += 1
        if norm is None:
            told = engine.get_global_grad_norm()
            norm = None if told is None else float(told)
        size = engine.basic_optimizer.update_size()
        (loss_sum, squares, count), (greatest, stopping) = self.ranks.sum_and_max(
            [float(total), size.sum_of_squares, size.numel], [size.greatest, float(bool(self.stop))]
        )
        self.stopping = stopping > 0.0
        seconds = time.perf_counter() - began
        tokens_per_second = indices.size * self.train.length / seconds
        return {
            "step": self.step,
            "loss": loss_sum / self.ranks.world,
            "lr": lr,
            "grad_norm": norm,
            "update_max": greatest,
            "update_rms": math.sqrt(squares / count) if count else 0.0,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "skipped_steps": engine.skipped_steps,
            "memory_gib": _memory() / 2**30,
            **self._utilization(tokens_per_second),
        }

    def norm_at_stage_0(self) -> float:
        """The norm of the gradient. If it isn't finite, the gradient is dropped, as DeepSpeed itself does at other stages."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.engine.skipped_steps += 1
            for parameter in self.engine.module.parameters():
                parameter.grad = None
        return norm

    @contextmanager
    def without_clipping(self) -> Iterator[None]:
        """DeepSpeed can't clip where there is no gradient."""
        settings = self.engine._config
        clip, settings.gradient_clipping = settings.gradient_clipping, 0.0
        try:
            yield
        finally:
            settings.gradient_clipping = clip

    @property
    def validation_blocks(self) -> int:
        """How many blocks of held-out text one validation reads, in whole batches."""
        batch = self.run.parallelism.batch
        return batch * min(len(self.validation) // batch, self.run.logging.validation_batches or sys.maxsize)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss on held-out text: blocks spread evenly over all of it, the same ones every time and for every number of ranks."""
        batch, count = self.run.parallelism.batch, self.validation_blocks
        batches, blocks = count // batch, np.arange(count) * len(self.validation) // count
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        self.engine.eval()
        for number in range(batches):
            for part in range(self.accumulation):
                self.ranks.alive()
                tokens = self.mine(blocks[number * batch : (number + 1) * batch], part)
                total += self.engine(input_ids=tokens, labels=tokens).loss.double()
        self.engine.train()
        return self.ranks.sum([float(total)])[0] / (batches * self.accumulation * self.ranks.world)

    def fit(self, metrics: folder.Metrics | None, progress: Progress) -> dict[str, Any]:
        """Train to the last step; validate and save on the way; return the content of result.json.

        Asked to stop, save and return with the status "stopped".

        Raises:
            SettingsError: if a checkpoint can't be written.
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
            if spoiled and self.ranks.first:
                print(f"No checkpoint is written at step {self.step}: weight {spoiled} is not finite.", flush=True)
            # A step that DeepSpeed has skipped leaves the weights as they were; the last one may be such a step.
            if due and not spoiled and (last or not nonfinite):
                if metrics:
                    metrics.sync()
                checkpoints.save(
                    self.engine,
                    self.ranks,
                    run.out / "checkpoints",
                    self.step,
                    run.checkpoints.keep,
                    self.parameters,
                    self.layout,
                    checkpoints.Origin(run.identity(), self.tokens),
                )
            if self.stopping and not last:
                return {"status": "stopped", "step": self.step}
        if not math.isfinite(validation_loss):  # finished before, but cut before result.json was written
            validation_loss = self.validate()
        if spoiled or not math.isfinite(validation_loss):
            what = f"weight {spoiled}" if spoiled else "validation loss"
            return self.diverged(f"its {what} is not finite at the end, at step {self.step}")
        return {"status": "finished", "step": self.step, "validation_loss": validation_loss, **self.about()}

    def diverged(self, reason: str) -> dict[str, Any]:
        """The content of result.json of a run that has."""
        return {"status": "diverged", "reason": reason, "step": self.step, "validation_loss": None, **self.about()}

    def about(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "tokens": self.step * self.run.parallelism.batch * self.train.length,
            "parameters": self.parameters,
            "validation_blocks": self.validation_blocks,
            "world": self.ranks.world,
            "device": _device_name(self.ranks.device),
        }

    def is_finite(self, line: dict[str, Any]) -> bool:
        """Whether loss and gradient norm were numbers.

        DeepSpeed skips a step with a gradient that isn't, silently and for ever; in fp16 that is how the loss scale finds
        its place, so there the loss alone counts.
        """
        norm = 0.0 if self.engine.fp16_enabled() or line["grad_norm"] is None else line["grad_norm"]
        return math.isfinite(line["loss"]) and math.isfinite(norm)

    def nonfinite_weight(self) -> str:
        """The name of a weight that holds a number that isn't finite, on any rank; one step can spoil it before any loss shows it."""
        named = self.engine.module.named_parameters()
        mine = next((name for name, p in named if not torch.isfinite(model.own_part(p)).all()), "")
        return next(filter(None, self.ranks.gather(mine)), "")

    def _monitor(self, values: dict[str, float | None]) -> None:
        if self.engine.monitor.enabled:
            # Counted in samples, as DeepSpeed's own events are: W&B drops what comes with a smaller number than the last.
            at = self.engine.global_samples
            self.engine.monitor.write_events(
                [(f"train/{k}", v, at) for k, v in values.items() if v is not None and math.isfinite(v)]
            )

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP/s utilization on GPUs we know: 6 FLOP per weight and token, and attention (arXiv 2204.02311, B)."""
        peak = peak_flops(_device_name(self.ranks.device))
        config = self.engine.module.config
        if peak is None or not hasattr(config, "num_hidden_layers"):
            return {}
        per_token = 6 * self.parameters + 12 * config.num_hidden_layers * config.hidden_size * self.train.length
        return {"mfu": per_token * tokens_per_second / (peak * self.ranks.world)}


def peak_flops(gpu: str) -> float | None:
    """FLOP/s of a GPU of that name, or None if we don't know it."""
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", gpu)), None)


def learning_rate(settings: Schedule, peak: float) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """The schedule, from transformers, as the callable that ``deepspeed.initialize`` takes."""
    from transformers import get_scheduler

    names = {"cosine": "cosine_with_min_lr", "linear": "polynomial", "wsd": "warmup_stable_decay"}
    extra: dict[str, dict[str, Any]] = {
        "cosine": {"min_lr_rate": settings.final_lr},
        "linear": {"lr_end": settings.final_lr * peak, "power": 1.0},
        "wsd": {"min_lr_ratio": settings.final_lr, "num_decay_steps": max(1, settings.steps // 5)},
    }
    return lambda optimizer: get_scheduler(
        names[settings.schedule],
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=settings.steps,
        scheduler_specific_kwargs=extra[settings.schedule],
    )


def initialize(run: Run, ranks: Ranks, ds_config: dict[str, Any]) -> Trainer:
    """Data, model and engine.

    Raises:
        SettingsError: on all ranks, if any of them can't be made.
    """
    import deepspeed

    from balanced_adam.zero import describe

    with ranks.together():
        tokenizer = data.load_tokenizer(run.data.tokenizer)
        config = model.configuration(run.model, len(tokenizer), run.data.sequence_length)
    with ranks.together():
        begun_on = folder.begun_on(run.out)
    prepared: list[Path] = []
    # One rank on each host; the others find it done.
    job = (lambda: prepared.append(data.prepare(run.data, tokenizer, begun_on))) if ranks.local_rank == 0 else None
    ranks.wait_for(job)
    # One look at the corpus is enough.
    name = ranks.from_first(prepared[0].name if ranks.first else "")
    with ranks.together():
        tokens = data.folder_of(run.data, name)
        train, validation = data.open_blocks(tokens, run.data.sequence_length)
        if ranks.first:
            print(data.told(tokens, run.data), file=sys.stderr, flush=True)
        batch = run.parallelism.batch
        for part, blocks in (("training", train), ("validation", validation)):
            require(
                len(blocks) >= batch,
                f"data is {run.data.data!r}, whose {part} text is {len(blocks)} sequences of {train.length} tokens, less than "
                f"one batch of {batch}; give more text, a shorter sequence_length or a smaller batch.",
            )
        network = model.build(config, run.model, run.seed, ds_config)
    trained = [p for p in network.parameters() if p.requires_grad]
    # Matrices decay; gains and biases don't.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]},
        {"params": [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=network,
        model_parameters=[group for group in groups if group["params"]],
        config=ds_config,
        lr_scheduler=learning_rate(run.schedule, run.optimizer.lr),
    )
    if ranks.first:
        print(f"BalancedAdam: {describe(engine.optimizer)}", file=sys.stderr, flush=True)
    return Trainer(run, ranks, train, validation, engine, tokens.name, checkpoints.layout(ds_config, ranks.world))


def dry_run(trainer: Trainer) -> None:
    """One training and one validation batch, and DeepSpeed's own estimate of what each ZeRO stage would need."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    line = trainer.train_step()
    ranks, weights = trainer.ranks, trainer.parameters
    validation_loss = trainer.validate()
    if not ranks.first:
        return
    local = int(os.environ["LOCAL_SIZE"])
    hosts = max(1, ranks.world // local)
    largest = max(
        sum(getattr(p, "ds_numel", p.numel()) for p in m.parameters(False)) for m in trainer.engine.module.modules()
    )
    print(
        f"{weights / 1e6:.2f} M parameters on {ranks.world} ranks; model states by DeepSpeed's estimators, in GiB (host, per GPU):"
    )
    for offload in (False, True):
        host, gpu = estimate_zero2_model_states_mem_needs(weights, local, hosts, offload, 1.5)[:2]
        print(f"  ZeRO-2{' with offload' if offload else ''}: {host / 2**30:.2f}, {gpu / 2**30:.2f}")
        host, gpu = estimate_zero3_model_states_mem_needs(weights, largest, local, hosts, offload, offload, True, 1.5)[
            :2
        ]
        print(f"  ZeRO-3{' with offload' if offload else ''}: {host / 2**30:.2f}, {gpu / 2**30:.2f}")
    print(
        f"one batch: loss {line['loss']:.4f}, validation loss {validation_loss:.4f}, {line['step_seconds']:.2f} s, "
        f"{line['memory_gib']:.2f} GiB in use. Nothing was written to {trainer.run.out}."
    )


def pretrain(run: Run) -> None:
    """Train as ``run`` says, on this rank.

    Raises:
        SettingsError: on every rank, for whatever is wrong with the input.
    """
    run.check()
    gpus = torch.cuda.is_available()
    ds_config = deepspeed_config.resolve(run, int(os.environ["WORLD_SIZE"]), gpus)
    ranks = start(run.timeout)
    with ranks.watch.guard():
        if run.dry_run:
            with ranks.together():
                if ranks.first:
                    folder.check(run)
            dry_run(initialize(run, ranks, ds_config))
        else:
            _pretrain(run, ranks, ds_config)


def _pretrain(run: Run, ranks: Ranks, ds_config: dict[str, Any]) -> None:
    with ExitStack() as held:
        with ranks.together():
            if ranks.first:
                held.callback(folder.claim(run).release)
                (run.out / STOP).unlink(missing_ok=True)
        with ranks.together():
            ended = folder.result(run.out)
        if ended is not None:
            _tell(run, ended, "already ")
            return
        found = checkpoints.find(ranks, run.out / "checkpoints", run.identity())
        if found:
            found = checkpoints.fit(ranks, found, checkpoints.layout(ds_config, ranks.world))
            ds_config["checkpoint"] = {"load_universal": found.universal}
        trainer = initialize(run, ranks, ds_config)
        with ranks.together():
            if ranks.first:
                folder.describe(run, trainer.tokens, ds_config)
            if found:
                checkpoints.check_text(found, trainer.tokens)
        if found:
            trainer.step = checkpoints.load(trainer.engine, ranks, found)
        with ranks.together():
            metrics = folder.Metrics(run.out, trainer.step) if ranks.first else None
            if metrics:
                folder.note(run.out, "begins", step=trainer.step, ranks=ranks.world)
        ranks.watch.begin()
        with Progress(run.schedule.steps, trainer.step, run.out.name, enabled=ranks.first) as progress:
            ended = trainer.fit(metrics, progress)
        with ranks.together():
            if metrics:
                if ended["status"] != "stopped":
                    folder.write_json(run.out / "result.json", {**ended, "seconds": metrics.seconds})
                folder.note(run.out, ended["status"], step=ended["step"])
        ranks.watch.end()
    _tell(run, ended)


def _tell(run: Run, ended: dict[str, Any], already: str = "") -> None:
    """Say how a run has ended.

    Raises:
        Stopped: if it was asked to stop.
        SettingsError: if it diverged, now or earlier.
    """
    if ended["status"] == "stopped":
        saved = checkpoints.newest_step(run.out / "checkpoints")
        raise Stopped(
            f"Stopped at step {ended['step']} and saved up to step {saved}, as asked. The same command goes on from there."
        )
    if ended["status"] == "diverged":
        reason = ended.get("reason", f"a number was not finite at step {ended['step']}")  # older runs don't say
        raise SettingsError(
            f"the run in {run.out} has {already}diverged: {reason}. Its checkpoints from before are kept. Lower lr (it is "
            f"{run.optimizer.lr}) or clip (it is {run.optimizer.clip}) and give another folder."
        )
    if os.environ["RANK"] == "0":
        print(f"{run.out} is {already}finished, at validation loss {ended['validation_loss']:.4f}.", flush=True)


def _memory() -> float:
    """Bytes: the peak allocated on this GPU, or this process's resident memory on CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    import psutil

    return float(psutil.Process().memory_info().rss)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(arguments: list[str] | None = None) -> int:
    """Command line: ``python -m train.pretrain --help``; the exit code.

    0: finished. 2: refused or diverged, which starting it again won't mend. 75: stopped as asked, a rank was lost, or a
    checkpoint could not be read now; start it again. 130: Ctrl-C. 1: a fault of this program.
    """
    try:
        prepare_environment()
        pretrain(parse(Run, sys.argv[1:] if arguments is None else arguments, "train.pretrain", __doc__))
    except SettingsError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return AGAIN if isinstance(error, Lost | TryAgain) else 2
    except (Stopped, KeyboardInterrupt) as stopped:
        if os.environ.get("RANK", "0") == "0":
            sentence = str(stopped) or "\nStopped. The same command goes on from the newest checkpoint."
            print(sentence, file=sys.stderr, flush=True)
        return AGAIN if isinstance(stopped, Stopped) else 130
    return 0


if __name__ == "__main__":
    leave(main())
