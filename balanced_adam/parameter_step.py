"""One parameter's step, in parts: its moments, its count, and either the rule in plain torch or a kernel's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_adam import bias_correction, dtensor, kernels, packed, rule
from balanced_adam import state as states
from balanced_adam.fused_grad import FusedGrad, join_neighbours
from balanced_adam.update_size import LastStep
from balanced_adam.warn import warn_once

Settings = dict[str, Any]
"""``betas``, ``eps``, ``weight_decay`` and ``maximize`` of a step."""
Update = Callable[..., tuple[Tensor, ...]]
"""A rule as :func:`balanced_adam.rule.update`: weights, gradient and moments -> the new weights and moments."""


def fuses(param: Tensor, fused: bool, capturable: bool) -> bool:
    """Whether a kernel steps this parameter, which is no DTensor. Where there ought to be one and is none, warn once.

    Args:
        param: the parameter.
        fused: whether there must be a kernel.
        capturable: whether a CUDA graph must be able to capture it.

    Raises:
        RuntimeError: if none does, and ``fused`` or ``capturable`` insists.
    """
    reason = None
    if type(param) not in (Tensor, torch.nn.Parameter):
        reason = f"it is a {type(param).__name__}"
    elif param.dtype not in kernels.DTYPES:
        reason = f"its dtype is {param.dtype}"
    elif param.device.type not in ("cpu", "cuda"):
        reason = f"it is on {param.device.type}"
    elif not kernels.is_dense(param):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
        order = "it is neither contiguous nor channels_last"
        reason = "it has gaps in memory" if extent > param.numel() else order
    elif capturable and param.device.type != "cuda":
        reason = f"only CUDA has graphs, and it is on {param.device.type}"
    elif (reason := kernels.why_not(param.device)) is not None and not fused and not capturable:
        warn_once(f"BalancedAdam steps parameters on {param.device} in plain torch, which is slower: {reason}")
    if reason is not None and (fused or capturable):
        setting = "fused" if fused else "capturable"
        raise RuntimeError(f"{setting} is True, and a parameter of shape {tuple(param.shape)} can't be: {reason}.")
    return reason is None


def fuses_grad(weights: Tensor, grad: Tensor) -> bool:
    """Whether a kernel takes a gradient of another dtype than the weights that it steps (see ``Tensor.grad_dtype``)."""
    return weights.dtype == torch.float32 and grad.dtype in kernels.DTYPES


def prepare_moments(param: Tensor, state: states.State, format: str) -> tuple[dict[str, Tensor], int]:
    """Make a parameter's state, or convert it to this format, in place where need be.

    Returns:
        This rank's parts of the tensors that hold the moments, by name; and the number of elements that were cut off
        (:func:`balanced_adam.state.convert_`).
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state[bias_correction.LOG_PRODUCT] = 0.0
    cut = states.convert_(format, state, param)
    return {name: dtensor.local(tensor) for name, tensor in states.moment_tensors(state).items()}, cut


def count(state: states.State, betas: rule.Betas) -> tuple[int, int]:
    """Count one more step at these betas: its number, and the number that its bias correction takes."""
    steps = int(state["step"])
    product, corrected = bias_correction.advance(state[bias_correction.LOG_PRODUCT], betas, steps)
    state[bias_correction.LOG_PRODUCT] = product
    # An int or a 0-dim tensor; never in place, since a universal checkpoint of DeepSpeed loaded at stage 3 gives
    # all parameters one and the same tensor (runtime/zero/stage3.py:3681).
    state["step"] = state["step"] + 1
    return steps + 1, corrected


def reparametrize(group: Settings, settings: Settings, corrected: int) -> tuple[float, LastStep]:
    """The learning rate with which AdamW takes the step of the group's variant, and what its size depends on.

    Args:
        group: of the optimizer.
        settings: of the step; the decay becomes the variant's.
        corrected: the number of the step for bias correction.
    """
    asked = float(group["lr"])
    lr, settings["weight_decay"] = rule.reparametrized(
        group["variant"], asked, settings["weight_decay"], corrected, group["betas"][0]
    )
    return lr, LastStep(corrected, group["betas"], group["eps"], lr / asked if asked else 1.0)


def recipe(
    param: Tensor, state: states.State, lr: float | Tensor, settings: Settings, counted: rule.Betas | None
) -> kernels.Recipe:
    """What a captured kernel needs to count the step and work out its scalars itself.

    Args:
        param: on a GPU.
        state: its step count becomes a tensor of its own there.
        lr: a number, or a float32 tensor there.
        settings: of the step.
        counted: the betas of its last step, if that was counted on the GPU too.

    Raises:
        ValueError: if lr is a tensor that a kernel can't read, or steps before were taken with other betas.
    """
    if isinstance(lr, Tensor) and (lr.device != param.device or lr.dtype != torch.float32):
        raise ValueError(
            f"lr is a {lr.dtype} tensor on {lr.device}; with capturable=True it must be a number or a float32 tensor "
            f"on {param.device}."
        )
    betas = settings["betas"]
    if counted is None:
        steps = int(state["step"])
        changed = bias_correction.of_group(betas, steps, state[bias_correction.LOG_PRODUCT]) is not None
    else:
        changed = counted != betas and counted[0] == counted[1]
    if changed and betas[0] == betas[1]:
        raise ValueError(
            f"betas is {betas}, and steps before were taken with another; with capturable=True betas must stay what "
            "they are."
        )
    if counted is None:
        # A tensor of its own, whatever a checkpoint has made of it: the kernel counts in place.
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=param.device)
        state[bias_correction.LOG_PRODUCT] = bias_correction.UNKNOWN
    return kernels.Recipe(state["step"], lr if isinstance(lr, Tensor) else float(lr), **settings)


class PlainStep(NamedTuple):
    """A step in plain torch; all tensors are this rank's parts."""

    weights: Tensor
    grad: Tensor
    moments: dict[str, Tensor]
    """By name; as the state holds them."""
    step: int
    corrected: int
    """The number of the step for bias correction."""
    lr: float
    settings: Settings
    update: Update

    def check(self) -> None:
        """See that the tensors fit together.

        Raises:
            ValueError: naming the tensor that does not.
        """
        for name, tensor in {"gradient": self.grad, **self.moments}.items():
            if tensor.shape != self.weights.shape or tensor.device != self.weights.device:
                raise ValueError(
                    f"the {name} has shape {tuple(tensor.shape)} on {tensor.device}, and its parameter "
                    f"{tuple(self.weights.shape)} on {self.weights.device}; has it been given other data?"
                )

    def take(self) -> None:
        """Take it by the rule, in place: DeepSpeed keeps views of the weights and of the state."""
        old = [self.weights, *self.moments.values()]
        new: tuple[Tensor, ...]
        settings = {**self.settings, "lr": self.lr}
        if states.PACKED in self.moments:
            settings |= {"step": self.step, "corrected": self.corrected, "rule": self.update}
            new = packed.update(self.weights, self.grad, *old[1:], **settings)
        else:
            new = self.update(self.weights, self.grad, *old[1:], **settings, step=self.corrected)
        for tensor, value in zip(old, new, strict=True):
            tensor.copy_(value)


class Work(NamedTuple):
    """What a step of many parameters comes to, once all are prepared."""

    updates: list[kernels.Update]
    plain_steps: list[PlainStep]
    moved: dict[Tensor, LastStep]
    """By parameter, for :mod:`balanced_adam.update_size`; empty where a GPU counts the steps."""
    distributed: list[Tensor]
    """The parameters that are DTensors, whose versions autograd counts apart from those of this rank's part."""

    def carry_out(self) -> None:
        """Check it all, then do it all.

        Raises:
            ValueError: if tensors do not fit together; nothing is changed then.
        """
        for plain in self.plain_steps:
            plain.check()
        kernels.step(self.updates)
        for plain in self.plain_steps:
            plain.take()
        for update in self.updates:  # autograd must know that they have changed
            for tensor in (update.param, update.first, update.second, update.copy):
                if tensor is not None:
                    torch.autograd.graph.increment_version(tensor)
        for param in self.distributed:
            torch.autograd.graph.increment_version(param)


def lay_out_moments(param: Tensor, weights: Tensor, state: states.State, moments: dict[str, Tensor]) -> None:
    """Bring moments, in place and in the state too, to where and how a kernel takes them.

    They are so already, unless somebody has changed the model or the state by hand.

    Args:
        param: the parameter.
        weights: this rank's part of it.
        state: of the parameter.
        moments: this rank's parts of the tensors that hold its moments.
    """
    for name, tensor in moments.items():
        dtype = tensor.dtype if name == states.PACKED else torch.float32
        laid_out = _laid_out_as(weights, tensor.to(weights.device, dtype))
        if laid_out is not tensor:
            state[name] = dtensor.placed_as(param, laid_out)
            moments[name] = dtensor.local(state[name])


def kernel_updates(
    weights: Tensor,
    moments: dict[str, Tensor],
    scalars: bytes | kernels.Recipe,
    grad: Tensor | None,
    fused_grad: FusedGrad | None,
) -> list[kernels.Update]:
    """What a kernel shall do: one update, or one for each stretch of memory that a fused gradient lies in."""
    if fused_grad is None:
        assert grad is not None
        return [kernels.Update.of(weights, _laid_out_as(weights, grad.resolve_neg()), moments, scalars)]
    shards, factor, copy, keep = fused_grad
    updates, offset = [], 0
    for shard in join_neighbours(shards):
        update = kernels.Update.of(weights, shard, moments, scalars)
        updates.append(update._replace(offset=offset, copy=copy, factor=factor, keep=keep))
        offset += shard.numel()
    return updates


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, in the parameter's order in memory; a copy if it isn't yet."""
    if tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
