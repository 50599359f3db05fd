"""BalancedAdam: AdamW with one beta, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from balanced_adam import decay, dtensor, kernels, packed, rule
from balanced_adam import state as states

Betas = float | tuple[float, float]
OWN = ("allow_unbalanced", "fused", "capturable", "fused_zero")
"""Settings of the optimizer, not of its groups; no checkpoint holds them."""


class UpdateSize(NamedTuple):
    """How far a step moved the weights this process holds, in units of lr and without weight decay. With a packed state it is worked out
    from moments that have been rounded since, and off by as much (of packed8 the root mean square is told 10 % too large).

    Sums over processes are sums of ``sum_of_squares`` and of ``numel``; root mean square is the root of their ratio.
    """

    greatest: float
    """max |update| / lr over the elements; see the bound in BalancedAdam."""
    sum_of_squares: float
    """Sum of (update / lr)^2 over the elements."""
    numel: int
    """Number of elements."""


class HandOver(NamedTuple):
    """A gradient that a caller keeps in its own form for the next step, instead of a ``param.grad``."""

    pieces: list[Tensor]
    """Dense tensors of one dtype of ``kernels.DTYPES`` on the parameter's device; they tile the parameter in order."""
    factor: Tensor | None
    """One float32 on the same device; multiplies the gradient. Read when the step is taken."""
    copy: Tensor | None
    """Dense, on the same device, as many elements as the parameter; receives the new weights in its own dtype."""
    keep: bool
    """Store factor * gradient in place of the gradient (float32 only)."""


class BalancedAdam(torch.optim.Optimizer):
    r"""AdamW whose two moving averages share one decay rate, :math:`\beta_1 = \beta_2 = \beta`.

    The rule is that of :mod:`balanced_adam.rule`, with the symbols g = gradient, m = ``exp_avg``, v = ``exp_avg_sq``,
    :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay``. Equal betas make the update invariant, to first order, to
    drift in the scale of the gradient (arXiv 2601.21739), and bound every step of every weight by ``lr``, since
    m² ≤ (1-βᵗ) v by Cauchy-Schwarz (:mod:`balanced_adam.gradient_scale`). The bound is that of one beta from a zero start:
    on a state made with unequal betas, it does not hold until the old averages have faded. Equal betas may change from step to
    step (:mod:`balanced_adam.decay`), but not in a CUDA graph.

    Args:
        params: parameters, named parameters or parameter groups. A group may set its own ``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``state``, ``maximize``.
        lr: learning rate, a float or a 0-dim tensor (it is read at every step, so that schedulers may change it).
        betas: one number, or a pair of equal numbers, each in [0, 1).
        eps: added to the root of the bias-corrected second moment; may be 0.
        weight_decay: decoupled weight decay, as in AdamW (arXiv 1711.05101).
        state: how both moments of an element are stored: "fp32" (8 bytes), "packed32", "packed16" or "packed8" (4, 2, 1),
            which need equal betas (:mod:`balanced_adam.packed`). A group may set its own.
        maximize: ascend along the gradient.
        allow_unbalanced: accept pairs of unequal betas, in any group. This is how plain AdamW is run through the same
            code, as the baseline of a comparison. No checkpoint holds it, so that none can bring it along.
        fused: take the step in one pass over memory, through the kernels of :mod:`balanced_adam.kernels`. None does so
            for every parameter that they take (float32, bfloat16, float16 on CPU or CUDA, without gaps in memory), and
            warns once if there ought to be a kernel and is none; True raises instead; False is plain torch. All three
            have the same bits and the same state, so that a run may change between them.
        capturable: keep the step count on the GPU, and read an ``lr`` that is a tensor there, so that a CUDA graph may
            capture :meth:`step` (after one step outside of it). Needs the kernels.
        fused_zero: under DeepSpeed ZeRO, let the same pass unscale and clip the gradients and write the 16-bit weights
            (:mod:`balanced_adam.zero.one_pass`).

    State per parameter: ``step`` (0-dim float32 tensor), ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape; float32,
    or float64 for float64 parameters). The names are those of ``torch.optim.AdamW``, whose state loads here, and back. In place
    of the moments a packed state has ``packed`` (integers, the parameter's shape). Any format loads into any other; ``state`` of
    this optimizer stays as it is. :func:`balanced_adam.unpacked` makes a state dict for others.

    As torch's own optimizers, it is not thread-safe: two threads must not step one optimizer at once.

    Raises:
        ValueError: on a value out of range, on unequal betas without ``allow_unbalanced``, on complex parameters.
        RuntimeError: from :meth:`step`, on a sparse gradient; with ``fused=True`` or ``capturable=True``, from the
            constructor and from :meth:`step`, on a parameter that no kernel takes.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: Betas = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state: str = "fp32",
        maximize: bool = False,
        allow_unbalanced: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        fused_zero: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state": state,
            "maximize": maximize,
            "allow_unbalanced": allow_unbalanced,
            "fused": fused,
            "capturable": capturable,
            "fused_zero": fused_zero,
        }
        _check(defaults, allow_unbalanced)  # even where each group brings its own values
        _check_flags(defaults)
        self._counted: dict[Tensor, rule.Betas] = {}  # capturable: whose step count is their own, and their betas
        self.handed: dict[Tensor, HandOver] = {}
        """What :meth:`hand_over` took for the next step."""
        self._moved: dict[Tensor, tuple[int, rule.Betas, float]] = {}  # for update_size
        self._cut = 0  # elements that packing has cut off
        self._made_with: dict[int, decay.History | None] = {}  # id of a group: what its loaded averages were made with
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict."""
        super().__setstate__(state)
        for settings in (self.defaults, *self.param_groups):
            settings.setdefault("state", "fp32")  # of a time when there was no other
        self._counted = {}
        self.handed = {}
        self._moved = {}
        self._cut = 0
        self._made_with = {}
        for group in self.param_groups:
            self._remember(group)
            betas = _pair(group["betas"], allow_unbalanced=True)
            found = [state for p in group["params"] if decay.EXCESS in (state := self.state.get(p, {}))]
            # A loader may have filled it in where an old file has none; then the group knows better.
            known = any(state[decay.EXCESS] for state in found) or not (self._made_with[id(group)] or (0, 0))[1]
            for state in found:
                value = float(state.pop(decay.EXCESS))
                if known and "step" in state:
                    state[decay.LOG_PRODUCT] = decay.from_excess(value, betas, int(state["step"]))
            self._complete(group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and deep-copied."""
        saved = super().__getstate__()
        return {**saved, "state": self._as_saved(saved["state"], saved["param_groups"])}

    def _as_saved(self, saved: dict[Any, dict[str, Any]], groups: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        """A copy of the states with the excess of the product of betas in its place (:mod:`balanced_adam.decay`)."""
        copy = dict(saved) if type(saved) is dict else defaultdict(dict, saved)
        for group in groups:
            betas = _pair(group["betas"], allow_unbalanced=True)
            for key in group["params"]:
                state = saved.get(key, {})
                if decay.LOG_PRODUCT in state:
                    logarithm = state[decay.LOG_PRODUCT]
                    steps = 0 if logarithm == decay.UNKNOWN else int(state["step"])
                    copy[key] = {name: value for name, value in state.items() if name != decay.LOG_PRODUCT}
                    copy[key][decay.EXCESS] = decay.excess(logarithm, betas, steps)
        return copy

    def _remember(self, group: dict[str, Any]) -> None:
        """Take note of the betas that a loaded group's averages were made with, for states that don't say so themselves."""
        settings = {**group, "betas": _pair(group["betas"], allow_unbalanced=True)}
        self._made_with[id(group)] = decay.history(settings)
        group.pop(decay.GROUP_KEY, None)

    def _complete(self, group: dict[str, Any]) -> None:
        """Give the states of a group what an older file, or a universal checkpoint, lacks."""
        begun = [
            state for p in group["params"] if "step" in (state := self.state.get(p, {}))
        ]  # none where ZeRO-3 is between steps
        if all(decay.LOG_PRODUCT in state for state in begun):
            return
        oldest = max(int(state["step"]) for state in begun)
        for state in begun:
            if decay.LOG_PRODUCT not in state:
                steps = int(state["step"])
                state[decay.LOG_PRODUCT] = decay.log_product(self._made_with.get(id(group)), steps, oldest)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings are checked, and ``betas`` becomes a pair.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for field in OWN:
            group.pop(field)  # torch copies all defaults
        try:
            _check(group, self.defaults["allow_unbalanced"])
            if any(torch.is_complex(p) for p in group["params"]):
                raise ValueError(
                    "BalancedAdam does not take complex parameters; give torch.view_as_real of them instead."
                )
            if group["state"] != "fp32" and any(p.dtype == torch.float64 for p in group["params"]):
                raise ValueError(
                    f"state is {group['state']!r}, and a parameter is float64; its moments must be 'fp32'."
                )
            for param in group["params"]:
                if reason := dtensor.obstacle(param):
                    raise ValueError(f"BalancedAdam can't step it: {reason}")
                if group["state"] != "fp32" and dtensor.is_opaque(param):
                    raise ValueError(
                        f"state is {group['state']!r}, and a parameter is of the class {type(param).__name__}, which may do with integers what it likes; "
                        "its moments must be 'fp32'."
                    )
                self._fuses(param)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._remember(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, if there was one.

        Raises:
            RuntimeError: if a gradient is sparse; no parameter has changed then.
            ValueError: if somebody, or a checkpoint, has made a group's betas unequal without permission, or a tensor does not fit its
                parameter (any more); no parameter has changed then, but the step may have been counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["betas"] = _pair(group["betas"], self.defaults["allow_unbalanced"])
            _check_state(group)
            for param in group["params"]:
                if param.grad is not None and param.grad.is_sparse:
                    raise RuntimeError(
                        "BalancedAdam does not take sparse gradients; build the embedding with sparse=False."
                    )
                if reason := dtensor.obstacle(param, param.grad):
                    raise ValueError(reason)
        updates: list[kernels.Update] = []
        distributed: list[Tensor] = []
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.handed or param.grad is not None:
                    self._step_parameter(param, group, updates)
                    if dtensor.is_dtensor(param):
                        distributed.append(param)
                elif states.format_of(self.state.get(param, {})) not in (None, group["state"]):  # loaded
                    self._cut += states.bring_to(group["state"], self.state[param], param)
        kernels.step(updates)
        for param in distributed:  # of which autograd counts versions apart from those of this rank's part
            torch.autograd.graph.increment_version(param)
        if self._cut:
            cut, self._cut = self._cut, 0
            warn_once(
                f"{cut} elements of the loaded state had an m beyond what its packed form holds (sqrt(v), and less in packed8); it is cut off there.",
                "cut",
            )
        for update in updates:  # autograd must know that they have changed
            for tensor in (update.param, update.first, update.second, update.copy):
                if tensor is not None:
                    torch.autograd.graph.increment_version(tensor)
        return loss

    def hand_over(
        self,
        param: Tensor,
        pieces: list[Tensor],
        factor: Tensor | None = None,
        copy: Tensor | None = None,
        keep: bool = False,
    ) -> bool:
        """Give ``param`` a gradient for the next :meth:`step`, in a form that saves passes over memory; see HandOver.

        Returns:
            Whether it was taken. It is not where plain torch steps this parameter, or a dtype or device doesn't suit.
        """
        suits = (not keep or (param.device.type == "cpu" and {p.dtype for p in pieces} == {torch.float32})) and all(
            piece.dtype in kernels.DTYPES and piece.device == param.device and piece.is_contiguous()
            for piece in (*pieces, *([] if copy is None else [copy]))
        )
        whole = sum(piece.numel() for piece in pieces) == param.numel()
        if not (suits and whole and param.dtype == torch.float32 and param.is_contiguous() and self._fuses(param)):
            return False
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, _global_pre_hooks, _global_post_hooks)
        if self.defaults["capturable"] or any(hooks):  # a hook would look for param.grad
            return False
        self.handed[param] = HandOver(pieces, factor, copy, keep)
        return True

    def take_back(self, param: Tensor) -> None:
        """Forget what was handed over for ``param``, if it is still there."""
        self.handed.pop(param, None)

    def _fuses(self, param: Tensor) -> bool:
        """Whether a kernel steps this parameter.

        Raises:
            RuntimeError: if none does, and ``fused`` or ``capturable`` insists.
        """
        fused, capturable = self.defaults["fused"], self.defaults["capturable"]
        if fused is False:
            return False
        param = dtensor.local(param)
        obstacle = None
        if type(param) not in (Tensor, torch.nn.Parameter):
            obstacle = f"it is a {type(param).__name__}"
        elif param.dtype not in kernels.DTYPES:
            obstacle = f"its dtype is {param.dtype}"
        elif param.device.type not in ("cpu", "cuda"):
            obstacle = f"it is on {param.device.type}"
        elif not kernels.is_dense(param):
            obstacle = "it has gaps in memory"
        elif capturable and param.device.type != "cuda":
            obstacle = f"only CUDA has graphs, and it is on {param.device.type}"
        elif (reason := kernels.why_not(param.device)) is not None:
            obstacle = reason
            if not fused and not capturable:
                warn_once(f"BalancedAdam steps parameters on {param.device} in plain torch, which is slower: {reason}")
        if obstacle is not None and (fused or capturable):
            setting = "fused" if fused else "capturable"
            raise RuntimeError(
                f"{setting} is True, and a parameter of shape {tuple(param.shape)} can't be: {obstacle}."
            )
        return obstacle is None

    def _step_parameter(self, param: Tensor, group: dict[str, Any], updates: list[kernels.Update]) -> None:
        """Take the step, or append what a kernel shall do."""
        fused = self._fuses(param)
        handed = self.handed.pop(param, None)
        weights = dtensor.local(param)
        grad = None if param.grad is None else dtensor.local(param.grad)
        if grad is not None and handed is None and grad.dtype != weights.dtype and not self.defaults["capturable"]:
            fused = False  # a gradient of another dtype (Tensor.grad_dtype) is cast by the rule
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state[decay.LOG_PRODUCT] = 0.0
        elif decay.LOG_PRODUCT not in state:
            self._complete(group)
        self._cut += states.bring_to(group["state"], state, param)
        stored = {name: dtensor.local(tensor) for name, tensor in states.stored(state).items()}
        betas, eps = group["betas"], group["eps"]
        settings: dict[str, Any] = {name: float(group[name]) for name in ("eps", "weight_decay")}
        settings |= {"betas": betas, "maximize": group["maximize"]}
        scalars: bytes | kernels.Recipe
        if self.defaults["capturable"]:
            lr = group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"])
            if isinstance(lr, Tensor) and (lr.device != param.device or lr.dtype != torch.float32):
                raise ValueError(
                    f"lr is a {lr.dtype} tensor on {lr.device}; with capturable=True it must be a number or a float32 tensor on "
                    f"{param.device}."
                )
            self._count_on_device(param, group)
            scalars = kernels.Recipe(state["step"], lr, **settings)
        else:
            steps, lr = int(state["step"]), float(group["lr"])
            state[decay.LOG_PRODUCT], corrected = decay.advance(state[decay.LOG_PRODUCT], betas, steps)
            # An int or a 0-dim tensor; never in place, since a universal checkpoint of DeepSpeed loaded at stage 3 gives
            # all parameters one and the same tensor (runtime/zero/stage3.py:3681).
            state["step"] = state["step"] + 1
            step = steps + 1
            self._moved[param] = (corrected, betas, eps)
            if not fused:
                assert grad is not None
                old = [weights, *stored.values()]
                new: tuple[Tensor, ...]
                if states.WORDS in stored:
                    new = packed.update(weights, grad, *old[1:], step=step, corrected=corrected, lr=lr, **settings)
                else:
                    new = rule.update(weights, grad, *old[1:], step=corrected, lr=lr, **settings)
                # In place: DeepSpeed keeps views of the weights and of the state.
                for tensor, value in zip(old, new, strict=True):
                    tensor.copy_(value)
                return
            scalars = kernels.scalars(step, lr, **settings, corrected=corrected)
        for name, tensor in stored.items():
            # of the wrong kind only if somebody has changed the model or the state by hand
            dtype = tensor.dtype if name == states.WORDS else torch.float32
            stored[name] = _laid_out_as(weights, tensor.to(weights.device, dtype))
            if stored[name] is not tensor:
                state[name] = dtensor.placed_as(param, stored[name])
                stored[name] = dtensor.local(state[name])
        update = _update_of(weights, stored, scalars)
        if handed is None:
            assert grad is not None
            updates.append(update._replace(grad=_laid_out_as(weights, grad.resolve_neg())))
            return
        offset = 0
        for piece in _joined(handed.pieces):
            updates.append(
                update._replace(grad=piece, offset=offset, copy=handed.copy, factor=handed.factor, keep=handed.keep)
            )
            offset += piece.numel()

    def _count_on_device(self, param: Tensor, group: dict[str, Any]) -> None:
        """Let a captured kernel count the steps, which it takes to be all at the beta of now.

        Raises:
            ValueError: if they weren't.
        """
        state, betas = self.state[param], group["betas"]
        made_with = self._counted.get(param)
        changed = made_with is not None and made_with != betas and made_with[0] == made_with[1]
        if made_with is None:
            # A tensor of its own, whatever a checkpoint has made of it: the kernel counts in place.
            steps = int(state["step"])
            changed = decay.of_group(betas, steps, state[decay.LOG_PRODUCT]) is not None
        if changed and betas[0] == betas[1]:
            raise ValueError(
                f"betas is {betas}, and steps before were taken with another; with capturable=True betas must stay what they are."
            )
        if made_with is None:
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=param.device)
            state[decay.LOG_PRODUCT] = decay.UNKNOWN
        self._counted[param] = betas

    @torch.no_grad()
    def update_size(self) -> UpdateSize:
        """The size of the last step of every parameter that has moved since the last call of this.

        Call it after each step to have the size of that step; it is worked out from the moments, and costs nothing where it
        isn't called. (DeepSpeed calls :meth:`step` once for each group or sub-group, so that one call of ``step`` need not
        be a whole step.) Under ZeRO it covers the partition of this rank. ``numel`` is 0 if nothing has moved.
        """
        greatest: list[Tensor] = []
        squares: list[Tensor] = []
        count = 0
        moved, self._moved = self._moved, {}
        in_kernel: dict[torch.dtype, list[tuple[kernels.Update, float]]] = {}
        for param, (step, betas, eps) in moved.items():
            correction = rule.bias_correction(step, betas, eps)
            weights = dtensor.local(param)
            stored = {name: dtensor.local(tensor) for name, tensor in states.stored(self.state[param]).items()}
            count += weights.numel()
            if param.device.type == "cpu" and self._fuses(param):
                update = _update_of(weights, stored, kernels.scalars(step, 0.0, betas, eps, 0.0, False))
                in_kernel.setdefault(update.first.dtype, []).append((update, correction.scale))
                continue
            for values in zip(*map(_parts, stored.values()), strict=True):
                m, v = states.moments(dict(zip(stored, values, strict=True)))
                size = rule.direction(m, v, correction).abs_()
                if states.WORDS in stored:
                    size = size.clamp_(max=1.0 / correction.scale)
                greatest.append(size.amax().double() * correction.scale)
                squares.append(torch.dot(size, size).double() * correction.scale**2)
        for found in in_kernel.values():
            scale = torch.tensor([scale for _, scale in found], dtype=torch.float64, device="cpu")
            sums, largest = kernels.directions([update for update, _ in found])
            greatest += (largest * scale).unbind()
            squares += (sums * scale**2).unbind()
        if not count:
            return UpdateSize(0.0, 0.0, 0)
        return UpdateSize(float(torch.stack(greatest).amax()), float(torch.stack(squares).sum()), count)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a group's ``state`` is the format that its moments are in, also where the next step will change it."""
        for group in self.param_groups:
            self._complete(group)
        saved = super().state_dict()
        for group in saved["param_groups"]:
            found = {states.format_of(saved["state"].get(number, {})) for number in group["params"]} - {None}
            if len(found) == 1:
                group["state"] = found.pop()
            # For DeepSpeed's universal checkpoints, which keep the groups, and of the states no more than moments and steps.
            taken = [state for number in group["params"] if (state := saved["state"].get(number)) and "step" in state]
            oldest: dict[str, Any] = max(taken, key=lambda state: int(state["step"]), default={})
            group.pop(decay.GROUP_KEY, None)
            if decay.LOG_PRODUCT in oldest:
                betas = _pair(group["betas"], allow_unbalanced=True)
                if said := decay.of_group(betas, int(oldest["step"]), oldest[decay.LOG_PRODUCT]):
                    group[decay.GROUP_KEY] = said
        saved["state"] = self._as_saved(saved["state"], saved["param_groups"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a BalancedAdam, of a ``torch.optim.AdamW`` of any age, or of DeepSpeed's FusedAdam or DeepSpeedCPUAdam.

        The moments keep full precision (float32, float64 for float64 parameters) whatever the parameters' dtype;
        torch's own loading would cast them down to bf16 with the weights. Hyper-parameters come from ``state_dict``,
        as in torch, but for unequal betas where this optimizer takes only equal ones: then its own betas stay, and a
        warning says so. Settings that ``state_dict`` lacks stay as they are.

        Raises:
            ValueError: if the groups don't match, a moment is missing or has another shape than its parameter, moments are in a format that
                isn't known or not the one they are called, or the state is that of AMSGrad or of an Adam whose weight decay
                was not decoupled; nothing has changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}
        if not isinstance(state_dict, dict):
            raise ValueError(f"the loaded state is {state_dict!r:.80}; it must be the state dict of an optimizer.")

        def examine(_: torch.optim.Optimizer, seen: dict[str, Any]) -> None:
            # Registered last, so that it sees what torch will load, whatever other hooks have made of it.
            for key, kind in (("param_groups", list), ("state", dict)):
                if not isinstance(seen.get(key), kind):
                    raise ValueError(f"the loaded state has no {key}; it is not the state dict of an optimizer.")
            if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in seen["param_groups"]):
                raise ValueError(
                    "the loaded state has groups without params; it is not the state dict of an optimizer."
                )
            if [len(g["params"]) for g in seen["param_groups"]] != [len(g["params"]) for g in self.param_groups]:
                return  # torch itself refuses it
            for group, own in zip(seen["param_groups"], self.param_groups, strict=True):
                if "betas" not in group:
                    raise ValueError("the loaded state has groups without betas; it is not that of an Adam.")
                _check_loaded(group, own)
                if group.get("amsgrad"):
                    raise ValueError(
                        "the loaded state has amsgrad=True, which BalancedAdam does not have; train it on with AdamW."
                    )
                if group.get("decoupled_weight_decay") is False and group.get("weight_decay", 0.0) != 0.0:
                    raise ValueError(
                        f"the loaded state is that of an Adam with weight_decay = {group['weight_decay']} added to the "
                        "gradient, and BalancedAdam decouples it, as AdamW; set it to 0 in the state, or go on with Adam."
                    )
            ids = chain.from_iterable(group["params"] for group in seen["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            loaded.update({p: seen["state"].get(i, {}) for i, p in zip(ids, params, strict=False)})
            for group in seen["param_groups"]:
                betas = _pair(group["betas"], allow_unbalanced=True)
                states.check_loaded(
                    group.get("state", "fp32"), [seen["state"].get(i, {}) for i in group["params"]], betas
                )
            for param, state in loaded.items():
                for name, tensor in states.stored(state).items():
                    if tensor.shape != param.shape:
                        raise ValueError(
                            f"the loaded {name} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}."
                        )
                    if reason := dtensor.refuses(param, tensor):
                        raise ValueError(reason)

        hook = self.register_load_state_dict_pre_hook(examine)
        try:
            with self.keeping_own():
                super().load_state_dict(state_dict)
        finally:
            hook.remove()

        for param, state in loaded.items():
            own = self.state[param]
            for name, tensor in states.stored(state).items():
                dtype = tensor.dtype if name == states.WORDS else rule.moments_dtype(param.dtype)
                if own[name].dtype != dtype or (name == states.WORDS and own[name] is tensor):
                    own[name] = tensor.to(device=param.device, dtype=dtype, copy=True)
                own[name] = dtensor.distributed_as(param, own[name])

    @contextmanager
    def keeping_own(self) -> Iterator[None]:
        """Around whatever loads the groups' settings: the format of the state stays, and so do equal betas where unequal ones can't be.

        What betas the loaded averages were made with is remembered, for bias correction.
        """
        own = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        for group in self.param_groups:
            group.pop(decay.GROUP_KEY, None)
        before, self._made_with = self._made_with, {}
        try:
            yield
        except BaseException:
            self._made_with = before
            raise
        for group, settings in zip(self.param_groups, own, strict=True):
            betas, format = settings["betas"], settings["state"]
            for name in self.defaults.keys() & settings.keys():
                group.setdefault(name, settings[name])  # what another Adam, or an older one, does not have
            group["state"] = format
            if id(group) not in self._made_with:
                self._remember(group)
                self._complete(group)
            beta1, beta2 = _pair(group["betas"], allow_unbalanced=True)
            if beta1 != beta2 and not (self.defaults["allow_unbalanced"] and format == "fp32"):
                group["betas"] = betas
                if os.environ.get("RANK", "0") == "0":
                    warnings.warn(
                        f"the loaded state was made with betas ({beta1}, {beta2}); this BalancedAdam goes on with {betas}. "
                        "A step may exceed lr until the old averages have faded.",
                        stacklevel=4,  # who called load_state_dict
                    )


_warned: set[str] = set()


def warn_once(message: str, key: str = "") -> None:
    """Warn once per process of this, or of anything with this key; and of all ranks on the first alone."""
    if (key or message) not in _warned and os.environ.get("RANK", "0") == "0":
        warnings.warn(message, stacklevel=2)
    _warned.add(key or message)


def _update_of(param: Tensor, stored: dict[str, Tensor], scalars: bytes | kernels.Recipe) -> kernels.Update:
    """What a kernel is told of a parameter and its moments or words; the gradient is still missing."""
    first, second = (*stored.values(), None)[:2]
    assert first is not None
    return kernels.Update(param, param, first, second, scalars)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Parts that stay in a CPU's cache while several operations pass over them, or on a GPU need little memory for it."""
    if tensor.numel() == 0:
        return ()
    return tensor.reshape(-1).split(2**26 if tensor.is_cuda else 2**17)


def _laid_out_as(param: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, in the parameter's order in memory; a copy if it isn't yet."""
    if tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def _joined(pieces: list[Tensor]) -> list[Tensor]:
    """The same elements in as few pieces as possible: neighbours in one storage become one."""
    joined: list[Tensor] = []
    for piece in filter(Tensor.numel, pieces):
        if joined:
            last = joined[-1]
            together = last.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
            if together and last.storage_offset() + last.numel() == piece.storage_offset():
                joined[-1] = last.as_strided((last.numel() + piece.numel(),), (1,))
                continue
        joined.append(piece)
    return joined


def _check_flags(defaults: dict[str, Any]) -> None:
    """Check the settings that are switches.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    for field in OWN:
        allowed = (True, False, None) if field == "fused" else (True, False)
        if not any(defaults[field] is value for value in allowed):
            raise ValueError(f"{field} is {defaults[field]!r}; it must be one of {', '.join(map(str, allowed))}.")
    if defaults["capturable"] and defaults["fused"] is False:
        raise ValueError("capturable is True and fused is False; only the kernels can be captured in a CUDA graph.")


def _check(group: dict[str, Any], allow_unbalanced: bool) -> None:
    """Check a group's settings and bring them to floats, betas to a pair; one sentence for what is wrong.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.dim() != 0:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; give a number or a 0-dim tensor.")
    for field in ("lr", "eps", "weight_decay"):
        try:
            value = float(group[field])
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"{field} is {group[field]!r:.80}; it must be a number.") from None
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{field} is {value}; it must be a finite number, at least 0.")
        if field != "lr" or not isinstance(group[field], Tensor):  # a scheduler may hold on to an lr that is a tensor
            group[field] = value
    group["betas"] = _pair(group["betas"], allow_unbalanced)
    _check_state(group)
    if group["state"] in ("packed16", "packed8") and group["eps"] < 1e-9:
        warn_once(
            f"eps is {group['eps']} and state is {group['state']!r}, which reads sqrt(v) below 7e-9 as 0: updates of such small gradients "
            "may be as large as lr; keep eps at 1e-9 or above, or take packed32."
        )


def _check_loaded(group: dict[str, Any], own: dict[str, Any]) -> None:
    """Check the settings of a group that is about to be loaded; unequal betas may pass.

    Raises:
        ValueError: naming the field, the value and what would be right.
    """
    settings = {name: group.get(name, own[name]) for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
    try:
        _check({**settings, "state": "fp32"}, allow_unbalanced=True)
        if not isinstance(settings["maximize"], bool):
            raise ValueError(f"maximize is {settings['maximize']!r}; it must be True or False.")
        decay.history({**group, "betas": _pair(settings["betas"], allow_unbalanced=True)})
    except ValueError as error:
        raise ValueError(f"in the loaded state, {error}") from None


def _check_state(group: dict[str, Any]) -> None:
    """Check how the moments are to be stored.

    Raises:
        ValueError: if there is no such format, or the group's betas are unequal and it needs equal ones.
    """
    if group["state"] not in states.FORMATS:
        raise ValueError(f"state is {group['state']!r}; it must be one of {', '.join(states.FORMATS)}.")
    if group["state"] != "fp32" and group["betas"][0] != group["betas"][1]:
        raise ValueError(
            f"state is {group['state']!r} and betas is {group['betas']}; packed moments need equal betas, since only then is "
            "|m| <= sqrt(v)."
        )


def _pair(betas: Betas, allow_unbalanced: bool) -> rule.Betas:
    """``betas`` as a pair of floats.

    Raises:
        ValueError: if they are no such pair, out of [0, 1), or unequal without permission.
    """
    try:
        beta1, beta2 = map(float, betas) if isinstance(betas, list | tuple) else (float(betas),) * 2
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"betas is {betas!r:.80}; give one number, or a pair of numbers, in [0, 1).") from None
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas is {betas}; each beta must lie in [0, 1).")
    if beta1 != beta2 and not allow_unbalanced:
        raise ValueError(
            f"betas is ({beta1}, {beta2}); BalancedAdam's betas are equal, since only then is a step bounded by lr and "
            "free, to first order, of the gradient's scale: give one number, or allow_unbalanced=True to run plain AdamW."
        )
    return beta1, beta2
