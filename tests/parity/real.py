"""A small Llama on real text, through an engine on several ranks and in one plain process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from balanced_adam import rule
from tests.parity.cases import PATHS, Case, read
from tests.parity.control import TENSORS, State
from tests.parity.mutants import wrong
from tests.parity.versions import possible
from tests.ranks import spawn
from tests.session import shared
from train.common.files import REPOSITORY

STEPS, WARMUP, PEAK = 20, 4, 4e-3
MICRO, SEQUENCES, LENGTH = 2, 12, 32  # micro-batches a step, sequences in each (of all ranks), tokens in each
BETAS, EPS, DECAY, CLIP = (0.95, 0.95), 1e-8, 0.1, 0.5  # the norm is above the limit in most steps


class Trace(NamedTuple):
    """What a run said at each step, and where it ended."""

    losses: list[float]
    norms: list[float]
    state: State


def lr(step: int) -> float:
    """Linear warm-up and linear decay, as ``transformers.get_linear_schedule_with_warmup``; steps count from 0."""
    return PEAK * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


def tokens(step: int, micro: int) -> Tensor:
    """One micro-batch of all ranks, [SEQUENCES, LENGTH]: bytes of the licence."""
    text = torch.frombuffer(bytearray((REPOSITORY / "LICENSE").read_bytes()), dtype=torch.uint8).long()
    first = torch.arange(SEQUENCES)[:, None] + SEQUENCES * (MICRO * step + micro)
    return text[(first * 61 + torch.arange(LENGTH)) % len(text)]


def llama() -> nn.Module:
    """A Llama of 24 thousand parameters, always with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=LENGTH, **sizes))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}]


FP32 = [Case(stage, "fp32", clip=CLIP) for stage in (0, 1)]
FP32 += [Case(stage, "fp32", offload, clip=CLIP) for stage in (2, 3) for offload in (False, True)]
MUTANTS = ("late_bias_correction_on_rank_1", "moments_lost_at_step_5", "decay_applied_twice", "shard_of_rank_1_shifted")
WRONG = [Case(1, "fp32", clip=CLIP, mutant=mutant) for mutant in MUTANTS]
BF16 = [Case(1, "bf16", grad_accum="fp32", clip=CLIP), Case(3, "bf16", clip=CLIP)]

HPZ = [Case(3, "fp32", offload, clip=CLIP, hpz=2) for offload in (False, True)]
STALE = HPZ[0]._replace(mutant="stale_secondary_partition")


@shared
def traces(world: int) -> dict[Case, Trace]:
    """All cases on ``world`` ranks, in one spawn, as rank 0 saw them."""
    cases = FP32 + BF16 + WRONG if world < 4 else [*FP32[4:], *HPZ, STALE]
    traces: dict[Case, Trace] = spawn(job, world, possible(cases))[0]
    return traces


def job(cases: list[Case]) -> dict[Case, Trace]:
    """All cases, on one rank."""
    traces = {}
    for case in cases:
        with wrong(case.mutant):
            traces[case] = _engine_run(case)
    return traces


def _engine_run(case: Case) -> Trace:
    import deepspeed
    from transformers import get_linear_schedule_with_warmup

    import balanced_adam  # noqa: F401

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = llama()
    config = case.config(world) | {
        "optimizer": {"type": "BalancedAdam", "params": {"lr": PEAK, "betas": BETAS[0], "eps": EPS, **PATHS[case.path]}}
    }
    config["zero_optimization"] |= {"reduce_bucket_size": 5000, "sub_group_size": 5000}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config=config,
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
    )
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(MICRO):
            mine = tokens(step, micro).chunk(world)[rank].to(engine.device)
            loss = engine(input_ids=mine, labels=mine).loss
            engine.backward(loss)
            total += loss.detach().float().cpu() / MICRO / world
            engine.step()
        torch.distributed.all_reduce(total)
        losses.append(float(total))
        norms.append(float(engine.get_global_grad_norm() or "nan"))  # stage 0 in fp32 tells none
    state = read(engine)
    del state["model"]
    engine.destroy()
    return Trace(losses, norms, state)


def greatest(ours: Trace, other: Trace) -> dict[str, float]:
    """The greatest differences, relative to the greatest value, in float32's ulp of 1 (2^-23).

    Losses and norms: of any step, relative to that step's. Weights and moments: of any tensor, relative to its greatest
    element; the ulp of each element would measure rounding in forward and backward passes, not the optimizer.
    """
    ulp = torch.finfo(torch.float32).eps
    found = {
        key: _greatest(abs(a / b - 1) for a, b in zip(x, y, strict=True)) / ulp
        for key, x, y in (("losses", ours.losses, other.losses), ("norms", ours.norms, other.norms))
    }
    for key, tensors in other.state.items():
        apart = ((ours.state[key][n] - value).abs().max() / value.abs().max() for n, value in tensors.items())
        found[key] = _greatest(apart) / ulp
    return found


def _greatest(values: Iterable[float | Tensor]) -> float:
    return float(torch.tensor([float(value) for value in values]).max())  # NaN if any is; Python's max may drop it


@cache
def plain_run() -> Trace:
    """One process, no DeepSpeed, no BalancedAdam: each step one batch of all sequences, the plain rule in float32."""
    model = llama()
    decay = {p: group["weight_decay"] for group in groups(model) for p in group["params"]}
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in decay}
    losses, norms = [], []
    for step in range(STEPS):
        batch = torch.cat([tokens(step, micro) for micro in range(MICRO)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in decay])).float()
        norms.append(float(norm))
        factor = 1.0 / max(1.0, (float(norm) + 1e-6) / CLIP)
        for p, (m, v) in moments.items():
            new = rule.update(
                p.detach(),
                p.grad * factor,
                m,
                v,
                step=step + 1,
                lr=lr(step),
                betas=BETAS,
                eps=EPS,
                weight_decay=decay[p],
            )
            for old, value in zip((p.data, m, v), new, strict=True):
                old.copy_(value)
            p.grad = None
    named = list(model.named_parameters())
    state: State = {"weights": {n: p.detach().clone() for n, p in named}}
    for number, key in enumerate(TENSORS[1:]):
        state[key] = {n: moments[p][number] for n, p in named}
    return Trace(losses, norms, state)
