"""Deliberately wrong optimizers, made by wrapping ``BalancedAdam.step``; they touch nothing but its public state.

And DeepSpeed as it is without the patches of :mod:`balanced_adam.zero`, which is wrong too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from balanced_adam import BalancedAdam, power_mean
from balanced_adam.tensor_rows import Layout, Piece
from balanced_adam.zero import fragments
from balanced_adam.zero.fragments import layouts
from tests.parity.model import GROUPS

Wrong = Callable[[BalancedAdam, dict[str, Any], torch.nn.Parameter], None]


def late_bias_correction_on_rank_1(optimizer: BalancedAdam, group: dict[str, Any], param: torch.nn.Parameter) -> None:
    """Bias correction off by one: the state starts at step 1."""
    if torch.distributed.get_rank() == 1 and "step" not in optimizer.state[param]:
        zeros = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param].update(step=torch.ones(()), **zeros)


def moments_lost_at_step_5(optimizer: BalancedAdam, group: dict[str, Any], param: torch.nn.Parameter) -> None:
    state = optimizer.state[param]
    if state and int(state["step"]) == 4:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def decay_applied_twice(optimizer: BalancedAdam, group: dict[str, Any], param: torch.nn.Parameter) -> None:
    param.mul_(1 - float(group["lr"]) * group["weight_decay"])


def shard_of_rank_1_shifted(optimizer: BalancedAdam, group: dict[str, Any], param: torch.nn.Parameter) -> None:
    """The gradient of one shard is shifted by one element."""
    if torch.distributed.get_rank() == 1:
        handed = optimizer.fused_grads.get(param)
        if handed is None:
            assert param.grad is not None
            param.grad.copy_(param.grad.flatten().roll(1).view_as(param))
        else:  # ZeRO's step in one pass
            optimizer.fused_grads[param] = handed._replace(shards=[torch.cat(handed.shards).roll(1)])


def settings_of_the_first_group(optimizer: BalancedAdam, group: dict[str, Any], param: torch.nn.Parameter) -> None:
    group.update(GROUPS[0].settings())


def eps_ignored(optimizer: BalancedAdam, group: dict[str, Any], param: torch.nn.Parameter) -> None:
    group["eps"] = 1e-8


def mutant(wrong: Wrong) -> Callable[[], AbstractContextManager[None]]:
    """``BalancedAdam`` does ``wrong`` to every parameter before each of its steps, while the context lasts."""

    @contextmanager
    def context() -> Iterator[None]:
        right = BalancedAdam.step

        @torch.no_grad()
        def step(self: BalancedAdam, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None or param in self.fused_grads:
                        wrong(self, group, param)
            return right(self, closure)

        BalancedAdam.step = step  # type: ignore[method-assign]
        try:
            yield
        finally:
            BalancedAdam.step = right  # type: ignore[method-assign]

    return context


@contextmanager
def without_patch(module: str, cls: str, *methods: str) -> Iterator[None]:
    """DeepSpeed's own methods in place of the patched ones, while the context lasts."""
    owner = getattr(import_module(module), cls)
    patched = {method: getattr(owner, method) for method in methods}
    for method, wrapper in patched.items():
        setattr(owner, method, wrapper.__wrapped__)
    try:
        yield
    finally:
        for method, wrapper in patched.items():
            setattr(owner, method, wrapper)


UNPATCHED: dict[str, Callable[[], AbstractContextManager[None]]] = {
    # Stage 0 in 16 bits takes a step with zero gradients at start-up.
    "phantom_step": partial(
        without_patch,
        "deepspeed.runtime.fp16.unfused_optimizer",
        "FP16_UnfusedOptimizer",
        "initialize_optimizer_states",
        "__init__",
    ),
    # A universal checkpoint at stage 3 gives every group the settings of the first.
    "settings_of_group_0": partial(
        without_patch,
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        "load_hp_checkpoint_state_from_checkpoint_dir_stage3",
        "load_state_dict",
    ),
}
MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    wrong.__name__: mutant(wrong)
    for wrong in (
        late_bias_correction_on_rank_1,
        moments_lost_at_step_5,
        decay_applied_twice,
        shard_of_rank_1_shifted,
        settings_of_the_first_group,
        eps_ignored,
    )
}


@contextmanager
def replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    """Another function in place of one of the package's, while the context lasts."""
    right = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, right)


def rows_of_the_shard(zero: Any) -> dict[Tensor, Layout]:
    """Each rank takes its stretch of a tensor for a tensor of its own."""
    found = {}
    for flat, layout in layouts(zero).items():
        pieces = []
        for piece in layout.pieces:
            rows = max(1, -(-piece.length * piece.rows // piece.numel))
            pieces.append(Piece(rows, rows * piece.numel // piece.rows, 0, piece.offset, piece.length))
        found[flat] = Layout(pieces)
    return found


def with_torch_pow(mean: Tensor, grad: Tensor, beta: float, p: float) -> Tensor:
    return (mean.pow(p / 2) * beta + grad.abs().pow(p) * (1.0 - beta)).pow(2 / p)


OF_RELATIVES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "adamp-without_collective": lambda: replaced(Layout, "_all_reduce", lambda *_: None),
    "adamp-rows_of_the_shard": lambda: replaced(fragments, "layouts", rows_of_the_shard),
    "l3-torch_pow": lambda: replaced(power_mean, "update", with_torch_pow),
}
"""Variant, and what is wrong with it. Sharding shows it, so there is nothing to see at stage 0."""


OF_HPZ: dict[str, Callable[[], AbstractContextManager[None]]] = {
    # The weights of the step before are gathered on each host.
    "stale_secondary_partition": lambda: replaced(
        import_module("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3,
        "invalidate_secondary_tensor",
        lambda _: None,
    ),
}
"""It shows in the losses of a real model; the awkward one has gradients that don't depend on its weights."""


def wrong(name: str | None) -> AbstractContextManager[None]:
    """The mutant or the missing patch of that name; nothing for None."""
    return (MUTANTS | UNPATCHED | OF_RELATIVES | OF_HPZ)[name]() if name else nullcontext()
