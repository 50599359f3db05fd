"""How many bytes a rank holds in a step: weights, gradients, optimizer, activations and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from train.run import ds_schema
from train.run.config import Run
from train.run.loss import CHUNK, use_chunked
from train.run.optimizers import UNIVERSAL, is_foreign

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PER_LOGIT = 12
"""Bytes of a logit at the peak of forward and backward: its log-probability in float32, and two gradients of that
(measured on CPUs: 12.3 in bf16 and 12.5 in float32, ``python -m tests.perf loss``)."""
STATE = {"fp32": 8, "packed32": 4, "packed16": 2, "packed8": 1}
"""Bytes of two moments of a weight."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    dtype = DTYPES[ds_schema.dtype(ds_config)]
    zero = ds_config["zero_optimization"]
    stage, each = zero["stage"], dtype.itemsize
    weights, largest, rows, saved = _look(config, dtype, run.data.sequence_length, run.model.activation_checkpointing)
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


def _look(config: PretrainedConfig, dtype: torch.dtype, length: int, checkpointing: bool) -> tuple[int, int, int, int]:
    """Build the model of tensors without content, and run it on one sequence.

    Returns:
        Its weights, those of its largest module alone, rows of its output embedding, and bytes that the backward pass
        needs of a sequence, but for the logits.
    """
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

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = list(model.parameters())
        weights = {parameter.untyped_storage()._cdata for parameter in parameters}
        rows = model.get_output_embeddings().weight.shape[0]
        largest = max(sum(p.numel() for p in module.parameters(False)) for module in model.modules())
        use_chunked(model)
        tokens = torch.zeros((1, length), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens)
    return sum(p.numel() for p in parameters), largest, rows, sum(saved.values())


def described(memory: Memory) -> str:
    """Return the estimate as a line for the user, in GiB."""
    parts = [f"{name} {value / 2**30:.2f}" for name, value in memory._asdict().items() if value]
    return f"estimated memory of a rank: {memory.total / 2**30:.2f} GiB ({', '.join(parts)}), and buffers on top."
