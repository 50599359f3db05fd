"""How many bytes a rank holds in a step: weights, gradients, optimizer, activations and logits."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from train.data.tokenization import load_tokenizer
from train.distributed.ranks import Ranks
from train.run import deepspeed_config, ds_schema
from train.run.config import Run
from train.run.loss import CHUNK, resolved, use_chunked
from train.run.model import DTYPES, configuration
from train.run.optimizers import UNIVERSAL, is_foreign

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PER_LOGIT = 12
"""Bytes of a logit at the peak of forward and backward: its log-probability in float32, and two gradients of that
(measured on CPUs: 12.3 in bf16 and 12.5 in float32, ``python -m tests.perf loss``)."""
STATE = {"fp32": 8, "packed32": 4, "packed16": 2, "packed8": 1}
"""Bytes of two moments of a weight."""


class Look(NamedTuple):
    """What of a model its memory depends on."""

    weights: int
    largest: int
    """Weights of its largest module alone."""
    rows: int
    """Of its output embedding."""
    saved: int
    """Bytes that the backward pass needs of a sequence, but for the logits."""


class Memory(NamedTuple):
    """Bytes on each rank."""

    weights: float
    """At stage 3 with the secondary partition of ZeRO++'s hpZ."""
    gradients: float
    master: float
    """Float32 weights beside those of 16 bits."""
    state: float
    """Of the optimizer."""
    layer: float
    """At stage 3 the largest layer, which is gathered."""
    activations: float
    """What the backward pass needs of one micro-batch."""
    logits: float
    offloaded: float
    """What lies on the host instead, of master and state."""

    @property
    def total(self) -> float:
        """All that is not on the host."""
        return sum(self) - self.offloaded


def estimate(run: Run, config: PretrainedConfig, ds_config: dict[str, Any], world: int, chunked: bool) -> Memory:
    """Estimate a run's memory from its settings; nothing of the model's size is allocated.

    Model states follow arXiv 1910.02054, section 3, with gradients in the weights' type, as in the step in one pass.
    Buckets, the allocator and the libraries come on top.

    Args:
        run: the options.
        config: the model's configuration.
        ds_config: resolved for these ranks.
        world: number of ranks.
        chunked: whether the loss is taken by chunks.
    """
    return _memory(run, _look(run, config, ds_config), ds_config, world, chunked)


def _memory(run: Run, look: Look, ds_config: dict[str, Any], world: int, chunked: bool) -> Memory:
    zero = ds_config["zero_optimization"]
    stage, each = zero["stage"], DTYPES[ds_schema.dtype(ds_config)].itemsize
    weights, largest, rows, saved = look
    micro = ds_config["train_micro_batch_size_per_gpu"]
    logits = micro * run.data.sequence_length * rows
    held = min(logits, max(CHUNK, rows)) if chunked else logits
    share = weights / world
    hpz = zero.get("zero_hpz_partition_size", 1)
    secondary = weights / hpz if hpz > 1 else 0.0
    own = weights if stage == 0 else share
    name = run.optimizer.optimizer
    moments = STATE[run.optimizer.state] + (0 if name in UNIVERSAL or is_foreign(name) else 4)
    master, state = 4.0 * own if each == 2 else 0.0, float(moments * own)
    away = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return Memory(
        weights=each * (share + secondary if stage == 3 else weights),
        gradients=each * (share if stage >= 2 else weights),
        master=0.0 if away else master,
        state=0.0 if away else state,
        layer=each * largest if stage == 3 else 0.0,
        activations=float(micro * saved),
        logits=float(PER_LOGIT * held),
        offloaded=master + state if away else 0.0,
    )


def _look(run: Run, config: PretrainedConfig, ds_config: dict[str, Any]) -> Look:
    """Build the model of tensors without content, and run it on one sequence."""
    from torch._subclasses import FakeTensorMode
    from transformers import AutoModelForCausalLM

    saved: dict[int, int] = {}
    kept: list[torch.UntypedStorage] = []  # so that no two storages have one address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    dtype, length = DTYPES[ds_schema.dtype(ds_config)], run.data.sequence_length
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).train()
        if run.model.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = list(model.parameters())
        weights = {parameter.untyped_storage()._cdata for parameter in parameters}
        rows = model.get_output_embeddings().weight.shape[0]
        largest = max(sum(p.numel() for p in module.parameters(False)) for module in model.modules())
        use_chunked(model)
        tokens = torch.zeros((1, length), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens)
    return Look(sum(p.numel() for p in parameters), largest, rows, sum(saved.values()))


def with_micro_batch(run: Run, ranks: Ranks, ds_config: dict[str, Any]) -> Run:
    """Return the options with the largest micro-batch for which there is memory, by the estimate.

    They are left as they are if they or the ds_config name a micro-batch. A fifth of the memory is left to buffers and
    libraries. On CPUs the ranks of a host share its memory.

    Args:
        run: the options.
        ranks: all ranks call this.
        ds_config: resolved for these ranks, for the default micro-batch.

    Raises:
        ConfigError: on all ranks, if there is no such tokenizer or model.
    """
    whole = run.parallelism.micro_batch_on(ranks.world)
    in_file = deepspeed_config.load(run.parallelism.ds_config).get("train_micro_batch_size_per_gpu", "auto")
    if run.parallelism.micro_batch or in_file != "auto" or whole == 1:
        return run
    there = -ranks.sum_and_max([], [-_memory_of(ranks.device)])[1][0]
    with ranks.collective_errors():
        config = configuration(run.model, len(load_tokenizer(run.data.tokenizer)), run.data.sequence_length)
        try:
            look = _look(run, config, ds_config)
        except Exception:  # of any class: not every model runs on tensors without content
            return run
    chunked = resolved(run.model.loss, run.data.sequence_length, look.rows, None) == "chunked"
    for micro in [each for each in range(whole, 0, -1) if whole % each == 0]:
        of_micro = {**ds_config, "train_micro_batch_size_per_gpu": micro}
        needed = _memory(run, look, of_micro, ranks.world, chunked).total
        if needed <= 0.8 * there:
            break
    if micro < whole or needed > 0.8 * there:
        if ranks.is_main:
            print(
                f"micro_batch is {micro}, not {whole}: by the estimate that takes {needed / 2**30:.1f} of "
                f"{there / 2**30:.1f} GiB.",
                file=sys.stderr,
                flush=True,
            )
        return dataclasses.replace(run, parallelism=dataclasses.replace(run.parallelism, micro_batch=micro))
    return run


def _memory_of(device: torch.device) -> float:
    """Return the bytes of memory that a rank on this device may use."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return psutil.virtual_memory().total / int(os.environ["LOCAL_SIZE"])


def described(memory: Memory) -> str:
    """Return the estimate as a line for the user, in GiB."""
    parts = [f"{name} {value / 2**30:.2f}" for name, value in memory._asdict().items() if value]
    return f"estimated memory of a rank: {memory.total / 2**30:.2f} GiB ({', '.join(parts)}), and buffers on top."
