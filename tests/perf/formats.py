"""Formats of the packed state against fp32 moments, on the gradients of a real run; ``python -m tests.perf formats``.

A run of ``tiny`` is recorded: the clipped gradients of some thousand elements. On these each format takes the same
steps, and its updates are compared with those of fp32 moments. How well a format trains is another question, which
train.compare answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_adam import packed, rule
from balanced_adam.packed import FORMATS, Format
from tests.perf.measure import machine
from tests.perf.ratio_state import RatioState
from tests.ranks import spawn
from train.analysis.plots import markdown_table
from train.common.command_line import parse
from train.common.files import REPOSITORY
from train.distributed.launch import join
from train.run import deepspeed_config
from train.run.config import Run
from train.run.engine import initialize

STEPS, EACH, SKIPPED = 400, 256, 100
LR, EPS = 1e-3, 1e-8
Numbers = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Recording(NamedTuple):
    """Weights and gradients of EACH elements of every tensor."""

    weights: Tensor
    """Before the first step."""
    gradients: Tensor
    """(STEPS, elements)."""


def record(place: str) -> Recording:
    """Job of one rank."""
    config = str(REPOSITORY / "ds_configs" / "zero0.json")
    arguments = ["--out", place, "--ds-config", config, "--steps", str(STEPS), "--lr", str(LR), "--batch", "16"]
    settings = parse(Run, arguments, "train.pretrain", None)
    ranks = join(settings.timeout)
    trainer = initialize(settings, ranks, deepspeed_config.resolve(settings, ranks.world, False))
    optimizer = trainer.engine.basic_optimizer
    generator = torch.Generator().manual_seed(0)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    chosen = [torch.randperm(param.numel(), generator=generator)[:EACH] for param in params]
    seen: list[Tensor] = []

    def see(*_: Any) -> None:
        seen.append(torch.cat([param.grad.flatten()[index] for param, index in zip(params, chosen, strict=True)]))

    weights = torch.cat([param.detach().flatten()[index] for param, index in zip(params, chosen, strict=True)])
    optimizer.register_step_pre_hook(see)
    for _ in range(STEPS):
        trainer.train_step()
    ranks.watchdog.end()
    return Recording(weights.clone(), torch.stack(seen))


def by_hash_alone(param: Tensor, grad: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Both numbers from hashes."""
    return packed.dither(param, grad, step)[0], packed.dither(param, grad, step + 10**6)[0]


SIXTEEN, EIGHT = FORMATS["packed16"], FORMATS["packed8"]
COARSE = EIGHT._replace(w_bits=5, w_shift=24, r_bits=3, r_shift=23, r_floor=1 / 8)
LOW, HIGH = EIGHT._replace(r_floor=1 / 16), EIGHT._replace(r_floor=1 / 8)
TRAINED: list[tuple[str, Format, Numbers]] = [
    ("packed16-hash", SIXTEEN, by_hash_alone),
    ("packed8-hash", EIGHT, by_hash_alone),
    ("packed8-0.69", LOW, packed.dither),
    ("packed8-1.38", HIGH, packed.dither),
    ("packed8-5+3", COARSE, packed.dither),
]
"""Those that were trained, too (tests.perf.baselines), with their names there."""


def candidates() -> list[tuple[str, Format, Numbers | None]]:
    return [
        ("packed32", FORMATS["packed32"], packed.dither),
        ("packed16: 9 + 7 bits", SIXTEEN, packed.dither),
        ("both by a hash", SIXTEEN, by_hash_alone),
        ("to nearest", SIXTEEN, None),
        ("8 + 8 bits", SIXTEEN._replace(w_bits=8, w_shift=21, r_bits=8, r_shift=18), packed.dither),
        ("10 + 6 bits", SIXTEEN._replace(w_bits=10, w_shift=19, r_bits=6, r_shift=20, r_floor=7 / 64), packed.dither),
        ("packed8: 4 + 4 bits, r to 0.91", EIGHT, packed.dither),
        ("both by a hash", EIGHT, by_hash_alone),
        ("r to 0.69", LOW, packed.dither),
        ("r to 1.38", HIGH, packed.dither),
        ("5 + 3 bits, octaves of sqrt(v)", COARSE, packed.dither),
        (
            "6 + 2 bits, half octaves",
            EIGHT._replace(w_bits=6, w_shift=23, r_bits=2, r_shift=22, r_floor=1.0),
            packed.dither,
        ),
        ("4 bits: 2 + 2", EIGHT._replace(w_bits=2, w_shift=27, r_bits=2, r_shift=23, r_floor=0.5), packed.dither),
    ]  # fmt: skip


Store = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Moments, weights before the step, gradient, number of the step -> the moments that the next step reads."""


def packed_in(fmt: Format, numbers: Numbers | None) -> Store:
    """Stored in a packed format."""

    def store(m: Tensor, v: Tensor, before: Tensor, grad: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return packed.unpack(packed.pack(fmt, m, v, None if numbers is None else numbers(before, grad, step)), fmt)

    return store


def tr_adam(beta: float) -> Store:
    """Stored as TR-Adam does."""
    return lambda m, v, before, grad, step: RatioState.of(m, v, beta).moments(beta)


def follow(found: Recording, beta: float, store: Store | None, eps: float = EPS) -> Tensor:
    """The updates (step / lr) of all elements in all steps but the first SKIPPED; unless stored, of fp32 moments."""
    weights, m = found.weights.clone(), torch.zeros_like(found.weights)
    v, moves = m.clone(), []
    settings: dict[str, Any] = {"lr": LR, "betas": (beta, beta), "eps": eps, "weight_decay": 0.0}
    for step, grad in enumerate(found.gradients, 1):
        before = weights
        weights, m, v = rule.update(weights, grad, m, v, step=step, bounded=store is not None, **settings)
        if step > SKIPPED:
            moves.append((before.double() - weights.double()) / LR)
        if store is not None:
            m, v = store(m, v, before, grad, step)
    return torch.stack(moves)


class Hardship(NamedTuple):
    """Something that may be hard for a format: other gradients, or another setting."""

    name: str
    gradients: Callable[[Tensor], Tensor] = lambda gradients: gradients
    beta: float = 0.95
    eps: float = EPS


def seen_once_in(steps: int) -> Callable[[Tensor], Tensor]:
    """Rows of an embedding: the gradient is zero but for one step in so many, at a time of each element's own."""

    def sparse(gradients: Tensor) -> Tensor:
        step, element = torch.arange(len(gradients))[:, None], torch.arange(gradients.shape[1])
        return torch.where((step + element) % steps == 0, gradients, 0.0)

    return sparse


def silent_after(step: int) -> Callable[[Tensor], Tensor]:
    return lambda gradients: torch.cat([gradients[:step], torch.zeros_like(gradients[step:])])


def fading(gradients: Tensor) -> Tensor:
    """By a factor of a million over the recording."""
    return gradients * torch.logspace(0, -6, len(gradients))[:, None]


def spiked(gradients: Tensor) -> Tensor:
    """Once, a thousand times as large."""
    return torch.cat([gradients[:150], gradients[150:151] * 1000.0, gradients[151:]])


def signs_by_chance(gradients: Tensor) -> Tensor:
    """The sizes that were recorded, with signs from a coin."""
    return gradients.abs() * (torch.rand(gradients.shape, generator=torch.Generator().manual_seed(0)) - 0.5).sign()


HARDSHIPS = [
    Hardship("as recorded"),
    *(Hardship(f"β = {beta}", beta=beta) for beta in (0.8, 0.9, 0.99, 0.999)),
    Hardship("2^-10 of the gradients", lambda gradients: gradients * 2.0**-10),
    Hardship("2^-10 of the gradients, eps = 1e-12", lambda gradients: gradients * 2.0**-10, eps=1e-12),
    Hardship("2^-20 of the gradients, eps = 1e-15", lambda gradients: gradients * 2.0**-20, eps=1e-15),
    Hardship("2^16 times the gradients (a loss scale left in)", lambda gradients: gradients * 2.0**16),
    Hardship("eps = 1e-4", eps=1e-4),
    Hardship("a gradient in one step of 30", seen_once_in(30)),
    Hardship("a gradient in one step of 200", seen_once_in(200)),
    Hardship("no gradient from step 200 on", silent_after(200)),
    Hardship("fading to a millionth", fading),
    Hardship("one step's gradient 1000 times as large", spiked),
    Hardship("no noise: one gradient for ever", lambda gradients: gradients[200:201].expand_as(gradients)),
    Hardship("noise alone: signs by chance", signs_by_chance),
]  # fmt: skip


def error(ours: Tensor, right: Tensor) -> float:
    """Root mean square, relative to that of the right updates."""
    return float(((ours - right) ** 2).mean().sqrt() / (right**2).mean().sqrt())


def cosine(ours: Tensor, right: Tensor) -> float:
    return float((ours * right).sum() / (ours.norm() * right.norm()))


def stores(beta: float) -> dict[str, Store]:
    """The formats that are offered, and TR-Adam's."""
    return {name: packed_in(fmt, packed.dither) for name, fmt in FORMATS.items()} | {"TR-Adam": tr_adam(beta)}


def where_m_changes_sign(found: Recording) -> list[dict[str, str]]:
    """Table: the error in steps in which m has another sign than before, and in the others; and how long steps are."""
    rows = []
    for beta in (0.9, 0.95):
        right = follow(found, beta, None)
        changed = torch.zeros_like(right, dtype=torch.bool)
        changed[1:] = right[1:].sign() != right[:-1].sign()
        after = torch.zeros_like(changed)
        after[1:] = changed[:-1] & ~changed[1:]
        steady = found._replace(gradients=torch.ones_like(found.gradients))
        for name, store in stores(beta).items():
            ours = follow(found, beta, store)
            rows.append(
                {
                    "format": name,
                    "β": f"{beta}",
                    "error": f"{error(ours, right):.3f}",
                    "steps in which m changes its sign": f"{changed.double().mean():.1%}",
                    **{
                        name: f"{((ours - right)[where].square().mean() / (right**2).mean()).sqrt():.3f}"
                        for name, where in (("error in them", changed), ("in the steps after", after))
                    },
                    "greatest step / lr": f"{ours.abs().max():.2f}",
                    "of one gradient for ever": f"{follow(steady, beta, store)[-1].abs().max():.2f}",
                }
            )
    return rows


def splits(found: Recording) -> list[dict[str, str]]:
    """Table: every candidate at three betas."""
    rows = []
    exact = {beta: follow(found, beta, None) for beta in (0.9, 0.95, 0.99)}
    named = [(name, dict.fromkeys(exact, packed_in(fmt, numbers))) for name, fmt, numbers in candidates()]
    named.append(("TR-Adam: 8 + 4 bits", {beta: tr_adam(beta) for beta in exact}))
    for name, by_beta in named:
        row = {"format": name}
        for beta, right in exact.items():
            ours = follow(found, beta, by_beta[beta])
            row |= {f"error, {beta}": f"{error(ours, right):.3f}", f"cosine, {beta}": f"{cosine(ours, right):.3f}"}
        rows.append(row)
    return rows


def hardships(found: Recording) -> list[dict[str, str]]:
    """Table: every format's error, and how large its updates are in comparison (their projection on the right ones)."""
    rows = []
    for hardship in HARDSHIPS:
        changed = found._replace(gradients=hardship.gradients(found.gradients))
        right = follow(changed, hardship.beta, None, eps=hardship.eps)
        row = {"β = 0.95, eps = 1e-8, but": hardship.name}
        for name, store in stores(hardship.beta).items():
            ours = follow(changed, hardship.beta, store, hardship.eps)
            row[f"{name}: error"] = f"{error(ours, right):.3f}"
            row["size" + " " * (len(row) // 2)] = f"{float((ours * right).sum() / (right * right).sum()):.2f}"
        rows.append(row)
    return rows


def nearest(found: Recording) -> list[dict[str, str]]:
    """Table: which beta of fp32 moments makes the updates most like those of a format."""
    others = {beta / 100: follow(found, beta / 100, None) for beta in range(70, 98)}
    rows = []
    for fmt in FORMATS.values():
        for beta in (0.9, 0.95):
            ours = follow(found, beta, packed_in(fmt, packed.dither))
            alike = {other: cosine(ours, update) for other, update in others.items()}
            best = max(alike, key=lambda other: alike[other])
            size = float(ours.norm() / others[beta].norm())
            rows.append(
                {
                    "format": fmt.name,
                    "beta": f"{beta}",
                    "most like fp32 at beta": f"{best} (cosine {alike[best]:.3f})",
                    "cosine at its own": f"{alike[beta]:.3f}",
                    "norm of its updates, over that at its own": f"{size:.2f}",
                }
            )
    return rows


def sensitivity(found: Recording) -> list[dict[str, str]]:
    """Table: how far runs come apart whose gradients differ in the last bit, relative to the way they have gone."""
    changed = found._replace(gradients=torch.nextafter(found.gradients, torch.tensor(torch.inf)))
    rows = []
    for fmt in (None, *FORMATS.values()):
        store = packed_in(fmt, packed.dither) if fmt else None
        ours, other = (follow(each, 0.95, store).sum(dim=0) for each in (found, changed))
        apart = float((ours - other).norm() / ours.norm())
        rows.append({"format": fmt.name if fmt else "fp32", "apart": f"{apart:.1e}"})
    return rows


def main() -> None:
    print(f"{machine()}\n\n`tiny`, {STEPS} steps recorded, the first {SKIPPED} not counted.\n")
    with TemporaryDirectory() as place:
        (Path(place) / "run").mkdir()
        (found,) = spawn(record, 1, f"{place}/run", seconds=600, fresh=True)
    print(markdown_table(splits(found)) + "\n", flush=True)
    print(markdown_table(nearest(found)) + "\n", flush=True)
    print(markdown_table(hardships(found)) + "\n", flush=True)
    print(markdown_table(sensitivity(found)) + "\n", flush=True)
    print(markdown_table(where_m_changes_sign(found)) + "\n")
