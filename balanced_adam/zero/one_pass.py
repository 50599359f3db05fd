"""ZeRO's step in one pass over memory.

Around the optimizer's step DeepSpeed casts the gradients to fp32, multiplies them by the unscaling and clipping factor,
and copies the new fp32 weights to 16 bits, each in a pass of its own; before it, it scans the gradients for overflow and
takes their norm from fp64 copies. Here one kernel does the former, and one read-only pass the latter.

No step() of DeepSpeed's is copied. Its own methods run, with a few of them wrapped: the gradients are handed to the
optimizer as they are (:meth:`BalancedAdam.set_fused_grad`) and DeepSpeed works on stand-ins that take no memory. So *its* code
still decides on overflow, scale and clipping: its factor is what it makes of a 1.0, and its norm what it makes of one
number per tensor, that tensor's own norm. What it computes is the same, bit for bit.

(The sums of squares are taken in double in another order than torch's. Where they aren't exact they may differ in the last
bit of a double. Stages 1 and 2 round the norm to float, stage 3 only the factor: so weights could differ in about one step in
10^8, and at stage 3 ``get_global_grad_norm`` may show that bit.)

Where something isn't known, or one of the methods in RECOGNISED has another source than in the version this was written for,
the original methods run: see :func:`obstacle`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from balanced_adam import kernels

RECOGNISED: dict[str, dict[str, str]] = {
    "DeepSpeedZeroOptimizer": {
        "step": "fac1cee02b7caa95",
        "scaled_global_norm": "3768d5bb1396347a",
        "get_grad_norm_direct": "b3246401684415c6",
        "unscale_and_clip_grads": "b81ee2e8fb29540c",
        "_optimizer_step": "b2206460c363ce96",
        "has_overflow": "86861cabe4eca752",
        "has_overflow_partitioned_grads_serial": "f7f05ff829e93397",
        "_get_preflattened_grad_partition": "811709259fbe80c0",
        "_release_preflattened_grad_buffers": "8357bbdc0628f9f5",
        "get_flat_partition": "28741ab070c30ed0",
        "free_grad_in_param_list": "eaa2bb13015c38a4",
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        "step": "d7e1bfe84220c235",
        "_get_norm_groups": "2d02e95e07c664e1",
        "get_grad_norm_direct": "9df80f20d7eaac25",
        "unscale_and_clip_grads": "78a48794816306e6",
        "_optimizer_step": "fbcccd9e792f099f",
        "has_overflow": "1de3ec6d25d4c448",
        "_overflow_check_and_loss_scale_update": "da1f5b068ceca9b7",
        "_prepare_sub_group": "f92d0047b4c2a42a",
        "_prepare_fp32_grad_for_sub_group": "d054fe131c9f4b78",
        "_reassign_or_swap_out_partitioned_parameters": "b08c58eecac8005d",
        "_release_sub_group": "4298381ea8567c5e",
        "_unflatten_partitioned_parameters": "9d9490c176fd5a10",
    },
    "BF16_Optimizer": {
        "step": "37bf1ad8767b89f5",
        "get_grads_for_norm": "392132f4bbf398e5",
        "update_lp_params": "fa2c03ea34b3f509",
        "clear_hp_grads": "7a357002d75f382c",
    },
}
"""Digests of the methods that this relies on, in DeepSpeed 0.19.8: those wrapped below and those around them."""

WRAPPED: dict[tuple[type, str], Callable[..., Any]] = {}
"""The methods that have been wrapped in this process, as they stand in their classes then."""

_TURNED_OFF = "fused or fused_zero is false"

Override = tuple[type, str, Callable[..., Any]]


def overrides() -> list[Override]:
    """The methods of DeepSpeed's to wrap, each with ``wrapper(original, self, *args)``."""
    stage12, stage3, bf16 = classes()
    wrappers: list[Override] = [
        *((cls, "step", _tidied) for cls in (stage12, stage3, bf16)),
        (stage12, "_get_preflattened_grad_partition", _keep_gradient),
        (stage12, "unscale_and_clip_grads", _unscale),
        (stage12, "has_overflow_partitioned_grads_serial", _scan),
        (stage12, "get_grad_norm_direct", _norm),
        (stage3, "_prepare_fp32_grad_for_sub_group", _keep_gradient_3),
        (stage3, "unscale_and_clip_grads", _unscale_3),
        (stage3, "_reassign_or_swap_out_partitioned_parameters", _reassign_3),
        (stage3, "has_overflow", _scan_3),
        (stage3, "get_grad_norm_direct", _norm),
        (bf16, "get_grads_for_norm", _keep_gradient_bf16),
    ]
    # One that DeepSpeed no longer has is an obstacle of its own: its digest will be missing.
    return [(cls, name, _unless_obstacle(wrapper)) for cls, name, wrapper in wrappers if hasattr(cls, name)]


def obstacle(zero: Any) -> str | None:
    """Why this ZeRO optimizer of DeepSpeed's does not take its step in one pass; None if it does."""
    state = getattr(zero, "_balanced_adam_one_pass", None)
    if state is None:
        reason = _obstacle(zero)
        state = zero._balanced_adam_one_pass = _State(reason)
        if reason is not None and reason != _TURNED_OFF:
            _log(f"ZeRO's step is not taken in one pass: {reason}")
    return state.obstacle


def _log(message: str) -> None:
    from deepspeed.utils import log_dist

    log_dist(f"BalancedAdam: {message}", ranks=[0], level=logging.WARNING)


def _refused(zero: Any, reason: str) -> bool:
    """Say once that a step which was to be one pass isn't. Returns False."""
    state = zero._balanced_adam_one_pass
    if not state.refused:
        state.refused = True
        _log(f"a step of ZeRO's could not be taken in one pass, and DeepSpeed's own passes take it: {reason}")
    return False


def digests(cls: type) -> dict[str, str]:
    """Digest of the source of each method of a class, decorators left out."""
    lines = Path(inspect.getfile(cls)).read_text().splitlines()
    texts = {name: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for name, n in _definitions(cls).items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


@functools.cache
def _definitions(cls: type) -> dict[str, ast.FunctionDef]:
    """The methods of a class as its source file has them."""
    source = Path(inspect.getfile(cls)).read_text()
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
    return {n.name: n for n in found.body if isinstance(n, ast.FunctionDef)}


def _unless_obstacle(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper``, but the original alone where there is an obstacle."""

    @functools.wraps(wrapper)
    def either(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if obstacle(self) is None:
            return wrapper(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return either


def classes() -> tuple[type, type, type]:
    """DeepSpeed's ZeRO optimizers: of stages 1 and 2, of stage 3, and BF16_Optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer


@functools.cache
def unrecognised(name: str) -> str | None:
    """The first method of the class of this name whose source is not the one that this was written for."""
    (cls,) = (cls for cls in classes() if cls.__name__ == name)
    try:
        present = digests(cls)
    except (OSError, SyntaxError, TypeError, ValueError):  # no source to be had
        present = {}
    return next((method for method, known in RECOGNISED[name].items() if present.get(method) != known), None)


def replaced(cls: type) -> str | None:
    """The first method that this relies on which is not the one of the source file any more, or not wrapped by us as it
    should be.

    Digests are of files; this is for code that replaces methods at run time, before us or after.
    """
    ours = {name for owner, name, _ in overrides() if owner is cls}
    definitions, file = _definitions(cls), inspect.getfile(cls)
    for name in RECOGNISED[cls.__name__]:
        method = vars(cls).get(name)
        if name in ours:
            if method is None or method is not WRAPPED.get((cls, name)):
                return name
            method = getattr(method, "__wrapped__", None)
        code = getattr(_undecorated(method), "__code__", None)
        lines = {definitions[name].lineno, *(each.lineno for each in definitions[name].decorator_list)}
        if code is None or code.co_filename != file or code.co_firstlineno not in lines:
            return name
    return None


def _undecorated(method: Any) -> Any:
    """What is within the two decorators that DeepSpeed has on these methods, torch.no_grad and its own for NVTX."""
    from deepspeed.utils import nvtx
    from torch.utils import _contextlib

    decorators = (nvtx.__file__, _contextlib.__file__)
    while getattr(getattr(method, "__code__", None), "co_filename", None) in decorators:
        cells = dict(zip(method.__code__.co_freevars, method.__closure__ or (), strict=True))
        if "func" not in cells:
            break
        method = cells["func"].cell_contents
    return method


def _obstacle(zero: Any) -> str | None:
    import deepspeed

    from balanced_adam.optimizer import BalancedAdam

    if type(zero.optimizer) is not BalancedAdam:
        return f"the optimizer is a {type(zero.optimizer).__name__}, whose step() may be another"
    settings = zero.optimizer.defaults
    if settings["fused"] is False or not settings["fused_zero"]:
        return _TURNED_OFF
    if settings["capturable"]:
        return "capturable is true"
    if type(zero) not in classes():
        return f"{type(zero).__name__} is not known"
    if (name := unrecognised(type(zero).__name__)) is not None:
        return f"{type(zero).__name__}.{name} of DeepSpeed {deepspeed.__version__} is not as it was in the version this was written for"
    if (name := replaced(type(zero))) is not None:
        return f"other code has replaced {type(zero).__name__}.{name}"
    options = {
        "zenflow": "ZenFlow",
        "torch_autocast_gradscaler": "torch_autocast with a gradient scaler",
        "use_muon": "Muon",
        "_uses_muon": "Muon",
        "has_moe_layers": "groups of experts",
        "swap_optimizer": "offload to NVMe",
    }
    for attribute, option in options.items():
        if getattr(zero, attribute, None):
            return f"{option} is in use"
    if getattr(zero, "offload_optimizer", False) and zero.partial_offload != 1.0:
        return "offload_optimizer.ratio is below 1"
    if getattr(zero, "grad_acc_dtype", torch.float32) != torch.float32:  # BF16_Optimizer clips in that dtype
        return f"gradients are accumulated in {zero.grad_acc_dtype}"
    masters = _masters(zero)
    if any(master.dtype != torch.float32 for master in masters):
        return f"the master weights are {masters[0].dtype}"
    return next((reason for master in masters if (reason := kernels.why_not(master.device)) is not None), None)


def _masters(zero: Any) -> list[Tensor]:
    """The flat fp32 weights of this rank, by group or sub-group."""
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return []


def describe(zero: Any) -> str:
    """How the optimizer behind an engine takes its step, such as ``CUDA fused, ZeRO-1 one pass``.

    Args:
        zero: ``engine.optimizer``.
    """
    optimizer = getattr(zero, "optimizer", zero)
    params = [*_masters(zero)] or [p for group in optimizer.param_groups for p in group["params"]]
    device = params[0].device
    fused = optimizer.defaults["fused"] is not False and kernels.why_not(device) is None
    path = f"{device.type.upper()} {'fused' if fused else 'in plain torch'}"
    names = dict(zip(classes(), ("ZeRO", "ZeRO-3", "ZeRO-1"), strict=True))
    if type(zero) in names:
        stage = names[type(zero)] if names[type(zero)] != "ZeRO" else f"ZeRO-{2 if zero.partition_gradients else 1}"
        path += f", {stage} {'one pass' if obstacle(zero) is None else 'in several passes'}"
    return path


class _State:
    """What is under way in one ZeRO optimizer."""

    def __init__(self, obstacle: str | None) -> None:
        self.obstacle = obstacle
        self.refused = False
        """Whether a step could not be taken in one pass although there was no obstacle."""
        self.factor: Tensor | None = None
        """Multiplies the gradient that was handed over last; a 1 until DeepSpeed has unscaled and clipped it."""
        self.copies = False
        """Whether the kernel writes the copy of the weights that it belongs to."""
        self.stepping = False
        """Whether a step is under way; outside of one, gradients may change between a scan and the norm."""
        self.sums: dict[int, Tensor] = {}
        """id of a list of gradients -> their sums of squares, from the overflow scan to the norm."""


class _JustWritten:
    """Stands in, once, for weights that the kernel writes itself: DeepSpeed's copy into them does nothing."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def data(self) -> _JustWritten:
        return self

    def copy_(self, *_: Any, **__: Any) -> _JustWritten:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the source of a copy it is the weights themselves."""
        return function(*(arg.tensor if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


class _Weights(list):
    """A list of weight tensors that hands out a :class:`_JustWritten` the next time that item ``fresh`` is taken."""

    def __init__(self, tensors: Sequence[Tensor], fresh: int | None) -> None:
        super().__init__(tensors)
        self.fresh = fresh

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if index == self.fresh:
            self.fresh = None
            return _JustWritten(item)
        return item


def _hand_over(
    zero: Any,
    master: Tensor,
    pieces: Sequence[Tensor],
    copy: Tensor | None,
    factor: Tensor | None = None,
    keep: bool = False,
) -> bool:
    """Let the next optimizer step of ``master`` be the one pass; False if it can't be, and then nothing has changed."""
    if copy is not None and (copy.data_ptr() == master.data_ptr() or copy.device != master.device):
        copy = None  # the weights are their own master (torch_autocast), or on another device (offload at stage 3)
    factor = torch.ones(1, device=master.device) if factor is None else factor
    if not zero.optimizer.set_fused_grad(master, [piece.reshape(-1) for piece in pieces], factor, copy, keep):
        kinds = sorted({f"{str(piece.dtype).removeprefix('torch.')} on {piece.device}" for piece in pieces})
        found = f"{sum(piece.numel() for piece in pieces)} elements ({', '.join(kinds)}) of gradient"
        return _refused(
            zero, f"{found} for {master.numel()} weights on {master.device}, or the optimizer has step hooks"
        )
    state = zero._balanced_adam_one_pass
    state.factor, state.copies = factor, copy is not None
    return True


def _hand_over_offloaded(zero: Any, master: Tensor, copy: Tensor, clip: Callable[[Tensor], None]) -> bool:
    """As :func:`_hand_over`, for a master whose gradient lies in an fp32 buffer that lasts from step to step.

    The buffer has to hold the clipped gradient afterwards, as without us: DeepSpeed steps a parameter that gets no
    gradient next time with what it finds there.
    """
    if master.grad is None:
        return False
    factor = torch.ones(1, device=master.device)
    clip(factor)
    return _hand_over(zero, master, [master.grad], copy, factor, keep=float(factor) != 1.0)


def _tidied(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A whole step; nothing of it is left afterwards, also where it was skipped or has failed."""
    state = self._balanced_adam_one_pass
    state.stepping = True
    try:
        return original(self, *args, **kwargs)
    finally:
        state.stepping = False
        state.factor, state.copies, state.sums = None, False, {}
        for master in _masters(self):
            self.optimizer.clear_fused_grad(master)
        for attribute in ("parallel_partitioned_bit16_groups", "bf16_partitioned_groups"):
            for weights in getattr(self, attribute, ()):
                if isinstance(weights, _Weights):
                    weights.fresh = None
        buffers = getattr(self, "param_buffer_of_bit16_for_cpu_offload_groups", None)
        if isinstance(buffers, _Weights):
            buffers.fresh = None


# ---- Stages 1 and 2: DeepSpeedZeroOptimizer


def _keep_gradient(original: Callable[..., Any], self: Any, group: int) -> Tensor | None:
    """The gradient partition stays in its pieces; step() gets a flat fp32 tensor without memory."""
    flat: Tensor | None = original(self, group)
    gradients, master = self.averaged_gradients[group], self.single_partition_of_fp32_groups[group]
    if hasattr(gradients, "release_grad_buffers"):  # gone before the step
        _refused(self, "DeepCompile keeps the gradients in buffers of its own")
        return flat
    rank = torch.distributed.get_rank(group=self.real_dp_process_group[group])
    weights = self.parallel_partitioned_bit16_groups
    if not _hand_over(self, master, gradients if flat is None else [flat], weights[group][rank]):
        return flat
    if self._balanced_adam_one_pass.copies:
        weights[group] = _Weights(weights[group], rank)
    return master.new_zeros(1).expand(master.numel()) if flat is None else flat


def _unscale(original: Callable[..., Any], self: Any, gradients: list[Tensor], norm: Tensor) -> None:
    """DeepSpeed unscales and clips a 1, which thus becomes the factor."""
    state = self._balanced_adam_one_pass
    if self.cpu_offload:
        masters, buffers = self.single_partition_of_fp32_groups, self.param_buffer_of_bit16_for_cpu_offload_groups
        group = next(i for i, master in enumerate(masters) if master.grad is gradients[0])
        if not _hand_over_offloaded(self, masters[group], buffers[group], lambda one: original(self, [one], norm)):
            original(self, gradients, norm)
        elif state.copies:
            self.param_buffer_of_bit16_for_cpu_offload_groups = _Weights(buffers, group)
    else:
        original(self, gradients if state.factor is None else [state.factor], norm)
    state.factor = None


def _scan(original: Callable[..., Any], self: Any) -> Tensor:
    """Overflow from the sums of squares, which the norm then needs too."""
    lists = [self.averaged_gradients[group] for group in range(len(self.bit16_groups))]
    total = _total(self, lists)
    return original(self) if total is None else ~total.isfinite().view(1)


# ---- Stage 3: DeepSpeedZeroOptimizer_Stage3


def _keep_gradient_3(original: Callable[..., Any], self: Any, sub_group: int) -> None:
    gradients, master = self.averaged_gradients[sub_group], self.fp32_partitioned_groups_flat[sub_group]
    if not _hand_over(self, master, gradients, self.fp16_partitioned_groups_flat[sub_group]):
        return original(self, sub_group)
    for gradient in gradients:
        if gradient.is_cuda:  # it was made on another stream
            gradient.record_stream(torch.cuda.current_stream(gradient.device))
    self.averaged_gradients[sub_group] = None
    return None


def _unscale_3(original: Callable[..., Any], self: Any, sub_group: int, norm: Tensor) -> None:
    state, masters = self._balanced_adam_one_pass, self.fp32_partitioned_groups_flat
    master = masters[sub_group]

    def clip(one: Tensor) -> None:
        self.fp32_partitioned_groups_flat = {sub_group: SimpleNamespace(grad=one)}
        try:
            original(self, sub_group, norm)
        finally:
            self.fp32_partitioned_groups_flat = masters

    if self.offload_optimizer:
        handed = _hand_over_offloaded(self, master, self.fp16_partitioned_groups_flat[sub_group], clip)
    elif handed := state.factor is not None:
        clip(state.factor)
    if not handed:
        state.copies = False
        original(self, sub_group, norm)
    state.factor = None


def _reassign_3(original: Callable[..., Any], self: Any, sub_group: int) -> None:
    """Without the copy, where the kernel has made it."""
    state = self._balanced_adam_one_pass
    if state.copies:
        state.copies = False
        self._unflatten_partitioned_parameters(sub_group)
    else:
        original(self, sub_group)


def _scan_3(original: Callable[..., Any], self: Any, partition_gradients: bool = True) -> bool:
    """DeepSpeed scans one number, the sum of all squares."""
    whole = partition_gradients and not self.offload_optimizer
    total = _total(self, [self.averaged_gradients[i] for i in range(len(self.fp16_groups))]) if whole else None
    if total is None:
        return bool(original(self, partition_gradients))
    if total.is_cuda:  # DeepSpeed scans on a stream of its own
        self.reduce_and_partition_stream.wait_stream(torch.cuda.current_stream(total.device))
        total.record_stream(self.reduce_and_partition_stream)
    buffer, self.grad_partitions_flat_buffer = self.grad_partitions_flat_buffer, total.view(1)
    try:
        return bool(original(self, partition_gradients))
    finally:
        self.grad_partitions_flat_buffer = buffer


# ---- Stage 1 with gradients accumulated in fp32: BF16_Optimizer


def _keep_gradient_bf16(original: Callable[..., Any], self: Any, for_clipping: bool = False) -> Any:
    """Asked for what to clip: a 1. Asked for the norm's gradients, which is how a step begins: those, as ever."""
    state = self._balanced_adam_one_pass
    if for_clipping and state.factor is not None:
        return [state.factor]
    found = original(self, for_clipping)
    if not for_clipping:
        factor = None
        for group, master in enumerate(self.fp32_groups_flat_partition):
            rank = torch.distributed.get_rank(group=self.real_dp_process_group[group])
            weights, gradient = self.bf16_partitioned_groups, self.fp32_groups_gradient_flat_partition[group]
            if not _hand_over(self, master, [gradient], weights[group][rank], factor=factor):
                for taken in self.fp32_groups_flat_partition:  # all or none: the factor is one
                    self.optimizer.clear_fused_grad(taken)
                state.factor = None
                break
            factor = state.factor
        else:
            for group, weights in enumerate(self.bf16_partitioned_groups):
                rank = torch.distributed.get_rank(group=self.real_dp_process_group[group])
                self.bf16_partitioned_groups[group] = _Weights(weights, rank)
    return found


# ---- The norm, stages 1 to 3


def _norm(original: Callable[..., Any], self: Any, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
    """DeepSpeed takes the norm of the tensors' norms."""
    known = self._balanced_adam_one_pass.sums.pop(id(gradients), None)
    sums = known if known is not None or norm_type != 2 else _sums(gradients)
    if sums is None:
        return original(self, gradients, params, norm_type)
    if sums.device.type == "cpu":  # torch's root is not always correctly rounded there
        norms = [torch.tensor([math.sqrt(s) if s >= 0.0 else s], dtype=sums.dtype) for s in sums.tolist()]
    else:
        norms = list(sums.sqrt().split(1))
    for norm, gradient in zip(norms, gradients, strict=True):
        if getattr(gradient, "_zero_padding", False):
            norm._zero_padding = True  # type: ignore[attr-defined]
    return original(self, norms, params, norm_type)


def _sums(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sums of squares of these tensors, in one pass; None where that can't be had."""
    present = [gradient for gradient in gradients if gradient is not None]
    places = {(gradient.dtype, gradient.device) for gradient in present}
    if len(present) != len(gradients) or len(places) != 1 or not all(map(Tensor.is_contiguous, present)):
        return None
    ((dtype, device),) = places
    if dtype not in kernels.DTYPES or kernels.why_not(device) is not None:
        return None
    return kernels.sums_of_squares(present)


def _total(zero: Any, lists: list[Sequence[Tensor | None]]) -> Tensor | None:
    """The sum of all squares in these lists, whose own sums are kept for the norm; None where that can't be had."""
    state, found = zero._balanced_adam_one_pass, {}
    for gradients in lists:
        sums = _sums(gradients)
        if sums is None:
            state.sums = {}
            return None
        found[id(gradients)] = sums
    state.sums = found if state.stepping else {}
    return torch.cat(list(found.values())).sum()
