"""DeepSpeed as a version to come might have it: with one thing in ZeRO's step changed that the one pass relies on.

Each change is made to DeepSpeed's own source, or around one of its methods, beneath our wrappers.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch

from balanced_adam.zero import partitions, register


class Change(NamedTuple):
    """One method of DeepSpeed's, changed."""

    stage: str
    """``1`` and ``2`` for stages 1 and 2, ``3``, or ``bf16`` for BF16_Optimizer."""
    name: str
    method: str
    replacements: tuple[tuple[str, str], ...] = ()
    """What stands in its source, and what shall stand there."""
    around: Callable[..., Any] | None = None
    """Instead of replacements: called with the original, self and the arguments."""
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{'-offload' * self.offload}-{self.name}"

    @property
    def owner(self) -> type:
        """The class that has the method."""
        stage12, stage3, bf16 = partitions.classes()
        return {"3": stage3, "bf16": bf16}.get(self.stage, stage12)

    @contextmanager
    def made(self) -> Iterator[None]:
        """DeepSpeed so changed, and our wrappers around it, while the context lasts."""
        owner, ours = self.owner, vars(self.owner)[self.method]
        original = getattr(ours, "__wrapped__", ours)
        changed = self._around(original) if self.around else self._rewritten()
        setattr(owner, self.method, changed)
        register()
        try:
            yield
        finally:
            setattr(owner, self.method, ours)

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        around = self.around
        assert around is not None
        return lambda zero, *args, **kwargs: around(original, zero, *args, **kwargs)

    def _rewritten(self) -> Callable[..., Any]:
        file = Path(inspect.getfile(self.owner))
        (found,) = (n for n in ast.parse(file.read_text()).body if getattr(n, "name", "") == self.owner.__name__)
        assert isinstance(found, ast.ClassDef)
        (method,) = (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == self.method)
        first = min([method.lineno, *(each.lineno for each in method.decorator_list)])
        source = textwrap.dedent("\n".join(file.read_text().splitlines()[first - 1 : method.end_lineno]))
        for old, new in self.replacements:
            assert old in source, f"{self}: DeepSpeed's {self.method} has no {old}"
            source = source.replace(old, new)
        space = dict(vars(inspect.getmodule(self.owner)))
        exec(compile(source, f"changed {self.method}", "exec"), space)
        return space[self.method]


def _clamp(gradient: Any) -> None:
    gradient.clamp_(-(2.0**-6), 2.0**-6)


def _norm_of_the_greatest(original: Any, zero: Any, gradients: Any, params: Any, norm_type: float = 2) -> Any:
    return original(zero, gradients, params, float("inf"))


def _by_value(original: Any, zero: Any, gradients: Any, norm: Any) -> None:
    original(zero, gradients, norm)
    for gradient in gradients:
        _clamp(gradient)


def _by_value_3(original: Any, zero: Any, sub_group: int, norm: Any) -> None:
    original(zero, sub_group, norm)
    _clamp(zero.fp32_partitioned_groups_flat[sub_group].grad)


def _twice(original: Any, zero: Any, *arguments: Any) -> None:
    original(zero, *arguments)
    original(zero, *arguments)


def _on_rank_1(original: Any, zero: Any, *arguments: Any) -> None:
    original(zero, *arguments)
    if torch.distributed.get_rank() == 1:
        first = arguments[0]
        _clamp(zero.fp32_partitioned_groups_flat[first].grad if isinstance(first, int) else first[0])


def _then_clamped(original: Any, zero: Any, group: int) -> None:
    original(zero, group)
    with torch.no_grad():
        partitions.masters(zero)[group].clamp_(-0.5, 0.5)


def _noisy_gradient_3(original: Any, zero: Any, sub_group: int) -> None:
    original(zero, sub_group)
    zero.fp32_partitioned_groups_flat[sub_group].grad.add_(0.25)


def _renamed_3(original: Any, zero: Any, sub_group: int) -> None:
    flatten, zero.flatten = zero.flatten, torch._utils._flatten_dense_tensors
    try:
        original(zero, sub_group)
    finally:
        zero.flatten = flatten


def _unscaled_early_3(original: Any, zero: Any, sub_group: int, norm: Any) -> None:
    """The factor comes in two parts, which rounds twice."""
    zero.fp32_partitioned_groups_flat[sub_group].grad.mul_(1.0 / 3.0)
    original(zero, sub_group, norm / 3.0)


def _no_copy_3(original: Any, zero: Any, sub_group: int) -> None:
    zero._unflatten_partitioned_parameters(sub_group)


def _stochastic_copy_3(original: Any, zero: Any, sub_group: int) -> None:
    original(zero, sub_group)
    zero.fp16_partitioned_groups_flat[sub_group].mul_(1.0 + 2.0**-7)


def _more_in_the_norm(original: Any, zero: Any, for_clipping: bool = False) -> Any:
    found = original(zero, for_clipping)
    if for_clipping:
        for gradient in found:
            _clamp(gradient)
    return found


def _no_copy_bf16(original: Any, zero: Any) -> None:
    zero.bf16_partitioned_groups = [[*each] for each in zero.bf16_partitioned_groups]
    kept = [[tensor.clone() for tensor in each] for each in zero.bf16_partitioned_groups]
    original(zero)
    for each, old in zip(zero.bf16_partitioned_groups, kept, strict=True):
        each[torch.distributed.get_rank()].copy_(old[torch.distributed.get_rank()])


def _later(holds: Callable[[Any, Any, Any], Any]) -> Callable[..., None]:
    """Clip by value from when on ``holds(zero, gradient, norm)``."""

    def around(original: Any, zero: Any, what: Any, norm: Any) -> None:
        original(zero, what, norm)
        gradient = zero.fp32_partitioned_groups_flat[what].grad if isinstance(what, int) else what[0]
        if holds(zero, gradient, norm):
            _clamp(gradient)

    return around


def _clips(zero: Any, gradient: Any, norm: Any) -> bool:
    return float(norm) / zero.loss_scale > zero.clip_grad


def _scaled(zero: Any, gradient: Any, norm: Any) -> bool:
    return zero.loss_scale != 2.0**4  # where the tests begin


def _lacks_one(zero: Any, gradient: Any, norm: Any) -> bool:
    """A whole tensor of zeros, but not the few that fill a partition up."""
    return int((gradient == 0.0).sum()) > 10


STEP, GRAD = "self._optimizer_step(i)", "self.single_partition_of_fp32_groups[i].grad = single_grad_partition"
COPY = "bit16_partitions[partition_id].data.copy_(fp32_partition.data)"
UNSCALE = "self.unscale_and_clip_grads([single_grad_partition], scaled_global_grad_norm)"
EARLY = (
    "self.parallel_partitioned_bit16_groups[i][partition_id].data.copy_(self.single_partition_of_fp32_groups[i].data);"
)
ALIGNED = "self.flatten_dense_tensors_aligned("
RENAMED = (
    (ALIGNED, "(lambda tensors, _: _flatten_dense_tensors(tensors))("),
    ("self.flatten(", "_flatten_dense_tensors("),
)
CHANGES = [
    *(
        change
        for stage in ("1", "2")
        for change in (
            Change(stage, "norm", "get_grad_norm_direct", around=_norm_of_the_greatest),
            Change(stage, "factor", "unscale_and_clip_grads", around=_by_value),
            Change(stage, "factor on one rank", "unscale_and_clip_grads", around=_on_rank_1),
            Change(stage, "unscaled twice", "unscale_and_clip_grads", around=_twice),
            Change(stage, "copied before the step", "step", ((STEP, f"{EARLY} {STEP}"), (COPY, "pass"))),
            Change(stage, "flat gradient", "step", ((GRAD, f"single_grad_partition.add_(0.25); {GRAD}"),)),
            Change(stage, "no copy", "step", ((COPY, "pass"),)),
            Change(stage, "other copy", "step", ((COPY, COPY.replace(".data)", ".data * (1 + 2.0**-7))")),)),
            Change(stage, "flatten renamed", "step", RENAMED),
            Change(stage, "two steps", "step", ((STEP, f"{STEP}; {STEP}"),)),
            Change(
                stage,
                "gradients reused",
                "step",
                ((GRAD, f"{GRAD}; [g.zero_() for g in self.averaged_gradients[i] if g.dtype != torch.float32]"),),
            ),
            Change(stage, "weights after the step", "_optimizer_step", around=_then_clamped),
            Change(
                stage,
                "unscaled before it is flat",
                "step",
                (
                    (UNSCALE, "pass"),
                    (
                        "self.free_grad_in_param_list(self.params_not_in_partition[i])",
                        "self.unscale_and_clip_grads(list(self.averaged_gradients[i]), scaled_global_grad_norm)",
                    ),
                ),
            ),
        )
    ),
    Change("2", "factor", "unscale_and_clip_grads", around=_by_value, offload=True),
    Change("2", "two steps", "step", ((STEP, f"{STEP}; {STEP}"),), offload=True),
    Change("2", "weights after the step", "_optimizer_step", around=_then_clamped, offload=True),
    *(
        Change("3", name, method, around=around)
        for name, method, around in (
            ("norm", "get_grad_norm_direct", _norm_of_the_greatest),
            ("factor", "unscale_and_clip_grads", _by_value_3),
            ("factor on one rank", "unscale_and_clip_grads", _on_rank_1),
            ("factor in two parts", "unscale_and_clip_grads", _unscaled_early_3),
            ("flat gradient", "_prepare_fp32_grad_for_sub_group", _noisy_gradient_3),
            ("flatten renamed", "_prepare_fp32_grad_for_sub_group", _renamed_3),
            ("two steps", "_optimizer_step", _twice),
            ("weights after the step", "_optimizer_step", _then_clamped),
            ("no copy", "_reassign_or_swap_out_partitioned_parameters", _no_copy_3),
            ("other copy", "_reassign_or_swap_out_partitioned_parameters", _stochastic_copy_3),
        )
    ),
    Change("3", "factor", "unscale_and_clip_grads", around=_by_value_3, offload=True),
    Change("3", "two steps", "_optimizer_step", around=_twice, offload=True),
    Change("bf16", "factor", "get_grads_for_norm", around=_more_in_the_norm),
    Change("bf16", "two steps", "step", (("self.optimizer.step()", "self.optimizer.step(); self.optimizer.step()"),)),
    Change("bf16", "no copy", "update_lp_params", around=_no_copy_bf16),
    Change(
        "bf16",
        "flat gradient",
        "step",
        (("self.optimizer.step()", "self.fp32_groups_flat_partition[0].grad.add_(0.25); self.optimizer.step()"),),
    ),
]
LATER = [
    *(
        Change(stage, "once it clips", "unscale_and_clip_grads", around=_later(_clips), offload=offload)
        for stage, offload in (("1", False), ("2", False), ("2", True), ("3", False), ("3", True))
    ),
    Change(
        "bf16",
        "once it clips",
        "step",
        (
            (
                "self.optimizer.step()",
                "[g.clamp_(-(2.0**-6), 2.0**-6) for g in self.fp32_groups_gradient_flat_partition"
                " if float(all_groups_norm) > self.clip_grad]; self.optimizer.step()",
            ),
        ),
    ),
    *(
        Change(stage, "at another loss scale", "unscale_and_clip_grads", around=_later(_scaled), offload=offload)
        for stage, offload in (("1", False), ("2", True), ("3", False))
    ),
    *(
        Change(stage, "without a gradient", "unscale_and_clip_grads", around=_later(_lacks_one))
        for stage in ("1", "2")  # at stage 3 DeepSpeed takes the last gradient again
    ),
]
"""Changes that nothing shows in the first step."""


def gone(owner: Any, name: str, instead: Callable[..., Any] | None = None) -> None:
    """Take a method, or a function, from where we look for it. DeepSpeed itself still finds it, wherever it has moved,
    or another in its place."""
    original = inspect.unwrap(getattr(owner, name))
    for holder in getattr(owner, "__mro__", [owner]):
        if name in vars(holder):
            delattr(holder, name)
    if isinstance(owner, type):

        def moved(self: Any, attribute: str) -> Any:
            if attribute == name:
                return MethodType(instead or original, self)
            raise AttributeError(attribute)

        owner.__getattr__ = moved  # type: ignore[attr-defined]
