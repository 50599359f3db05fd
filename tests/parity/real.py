"""A small Llama on real text, through an engine on several ranks and in one plain process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from balanced_adam import rule
from tests.parity.cases import Case, read
from tests.parity.control import State
from tests.parity.worker import ROOT

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
    text = torch.frombuffer(bytearray((ROOT / "LICENSE").read_bytes()), dtype=torch.uint8).long()
    first = torch.arange(SEQUENCES)[:, None] + SEQUENCES * (MICRO * step + micro)
    return text[(first * 61 + torch.arange(LENGTH)) % len(text)]


def llama() -> nn.Module:
    """A Llama of 24 thousand parameters, always with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=LENGTH, **sizes))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}]


def engine_run(cases: list[Case]) -> dict[Case, Trace]:
    """Job of one rank."""
    return {case: _engine_run(case) for case in cases}


def _engine_run(case: Case) -> Trace:
    import deepspeed
    from transformers import get_linear_schedule_with_warmup

    import balanced_adam  # noqa: F401

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = llama()
    settings = {"lr": PEAK, "betas": BETAS[0], "eps": EPS}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups(model),
        config=case.config(world) | {"optimizer": {"type": "BalancedAdam", "params": settings}},
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
        norm = engine.get_global_grad_norm()  # None at stage 0 in fp32
        norms.append(float("nan") if norm is None else float(norm))
    state = read(engine)
    engine.destroy()
    return Trace(losses, norms, state)


def plain_run() -> Trace:
    """One process, no DeepSpeed, no BalancedAdam: all sequences of a step in one batch, and the plain rule in float32."""
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
                p.detach(), p.grad * factor, m, v, step=step + 1, lr=lr(step), betas=BETAS, eps=EPS, weight_decay=decay[p]
            )
            for old, value in zip((p.data, m, v), new, strict=True):
                old.copy_(value)
            p.grad = None
    named = list(model.named_parameters())
    state: State = {"weights": {n: p.detach().clone() for n, p in named}}
    for number, key in enumerate(("exp_avg", "exp_avg_sq")):
        state[key] = {n: moments[p][number] for n, p in named}
    return Trace(losses, norms, state)
