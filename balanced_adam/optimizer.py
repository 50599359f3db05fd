"""BalancedAdam: AdamW with one beta, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from balanced_adam import bias_correction, dtensor, kernels, parameter_step, rule
from balanced_adam import state as states
from balanced_adam import state_dict as state_dicts
from balanced_adam.arguments import (
    SWITCHES,
    Betas,
    as_pair,
    check_before_step,
    check_capturable,
    check_group,
    check_left_over,
    check_meaning,
    check_param,
    check_switches,
)
from balanced_adam.fused_grad import FormerNames, FusedGrad
from balanced_adam.update_size import LastStep, UpdateSize, update_size
from balanced_adam.values import shown
from balanced_adam.warn import is_rank_0, warn_once


class BalancedAdam(FormerNames, torch.optim.Optimizer):
    r"""AdamW whose two moving averages share one decay rate, :math:`\beta_1 = \beta_2 = \beta`.

    The rule is that of :mod:`balanced_adam.rule`, with the symbols g = gradient, m = ``exp_avg``, v = ``exp_avg_sq``,
    :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay``. Equal betas make the update invariant, to first order, to
    drift in the scale of the gradient (arXiv 2601.21739), and bound every step of every weight by ``lr``, since m² ≤
    (1-βᵗ) v by Cauchy-Schwarz (:mod:`balanced_adam.gradient_scale`). The bound is that of one beta from a zero start:
    on a state made with unequal betas, it does not hold until the old averages have faded. Equal betas may change from
    step to step (:mod:`balanced_adam.bias_correction`), but not in a CUDA graph.

    Args:
        params: parameters, named parameters or parameter groups. A group may set its own ``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``state``, ``maximize``, ``variant``.
        lr: learning rate, a number or a tensor of one (it is read at every step, so that schedulers may change it).
        betas: one number, or a pair of equal numbers, each in [0, 1).
        eps: added to the root of the bias-corrected second moment; may be 0.
        weight_decay: decoupled weight decay, as in AdamW (arXiv 1711.05101).
        state: how both moments of an element are stored: "fp32" (8 bytes), "packed32", "packed16" or "packed8" (4, 2,
            1), which need equal betas (:mod:`balanced_adam.packed`). A group may set its own.
        maximize: ascend along the gradient.
        variant: "adam", "adamd" or "adamprox" (:func:`balanced_adam.rule.reparametrized`).
        allow_unbalanced: accept pairs of unequal betas, in any group. This is how plain AdamW is run through the same
            code, as the baseline of a comparison. No checkpoint holds it, so that none can bring it along.
        fused: take the step in one pass over memory, through the kernels of :mod:`balanced_adam.kernels`. None does so
            for every parameter that they take (float32, bfloat16, float16 on CPU or CUDA, without gaps in memory), and
            warns once if there ought to be a kernel and is none; True raises instead; False is plain torch. All three
            have the same bits and the same state, so that a run may change between them. (A gradient of a dtype that
            no kernel takes beside its parameter's goes through plain torch.)
        capturable: keep the step count on the GPU, and read an ``lr`` that is a tensor there, so that a CUDA graph may
            capture :meth:`step` (after one step outside of it). Needs the kernels.
        fused_zero: under DeepSpeed ZeRO, let the same pass unscale and clip the gradients and write the 16-bit weights
            (:mod:`balanced_adam.zero.one_pass`).
        left_over: arguments of torch's and DeepSpeed's Adam, such as ``foreach`` and ``adam_w_mode``. They are accepted
            where they change nothing.

    State per parameter: ``step`` (0-dim float32 tensor), ``exp_avg`` and ``exp_avg_sq`` (the parameter's shape;
    float32, or float64 for float64 parameters), ``log_beta_product`` (a float; :mod:`balanced_adam.bias_correction`).
    The names are those of ``torch.optim.AdamW``, whose state loads here, and back. In place of the moments a packed
    state has ``packed`` (the parameter's shape; int32, the bits of bfloat16, or uint8). Any format loads into any
    other: the optimizer keeps its own, and converts at the next step. :func:`balanced_adam.unpacked` makes a state dict
    for others. As torch's own optimizers, it is not thread-safe: two threads must not step one optimizer at once.

    Raises:
        ValueError: on a value out of range or of a wrong type, on unequal betas without ``allow_unbalanced``, on
            parameters that are not float16, bfloat16, float32 or float64.
        TypeError: on an unknown argument.
        RuntimeError: from :meth:`step`, on a sparse gradient; with ``fused=True`` or ``capturable=True``, from the
            constructor and from :meth:`step`, on a parameter that no kernel takes.
    """

    OWN: ClassVar[dict[str, Any]] = {}
    """Settings that a subclass has beside these, and their defaults; they belong to groups."""

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
        variant: str = "adam",
        allow_unbalanced: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        fused_zero: bool = True,
        **left_over: Any,
    ) -> None:
        own = {name: left_over.pop(name, value) for name, value in self.OWN.items()}
        check_left_over(left_over, type(self).__name__, (*inspect.signature(BalancedAdam).parameters, *own))
        from balanced_adam.zero import import_hook  # which knows this class

        import_hook.register_if_imported()
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state}
        defaults |= {"maximize": maximize, "variant": variant, "allow_unbalanced": allow_unbalanced}
        defaults |= {"fused": fused, "capturable": capturable, "fused_zero": fused_zero, **own}
        check_group(defaults, allow_unbalanced)  # even where each group brings its own values
        check_switches(defaults)
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Set what belongs to steps under way, and is in no state dict."""
        self._counted: dict[Tensor, rule.Betas] = {}  # capturable: whose step count is their own, and their betas
        self.fused_grads: dict[Tensor, FusedGrad] = {}  # what set_fused_grad took for the next step
        self._moved: dict[Tensor, LastStep] = {}  # for update_size
        self._cut = 0  # elements that packing has cut off
        self._made_with: dict[int, bias_correction.History | None] = {}  # what a group's (id) loaded averages were

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict."""
        super().__setstate__(state)
        for settings in (self.defaults, *self.param_groups):  # of a time when there were no others
            settings.setdefault("state", "fp32")
            settings.setdefault("variant", self.defaults.get("variant", "adam"))
        self._forget()
        for group in self.param_groups:
            self._remember(group)
            state_dicts.restore_products(group, self.state, self._made_with[id(group)])
            self._complete(group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and deep-copied."""
        saved = super().__getstate__()
        return {**saved, "state": state_dicts.as_saved(saved["state"], saved["param_groups"])}

    def _remember(self, group: dict[str, Any]) -> None:
        """Note the betas that a loaded group's averages were made with, for states that don't say so themselves."""
        settings = {**group, "betas": as_pair(group["betas"], allow_unbalanced=True)}
        self._made_with[id(group)] = bias_correction.history(settings)
        group.pop(bias_correction.GROUP_KEY, None)

    def _complete(self, group: dict[str, Any]) -> None:
        """Give the states of a group what an older file, or a universal checkpoint, lacks."""
        # None has begun where ZeRO-3 is between steps.
        begun = [state for p in group["params"] if "step" in (state := self.state.get(p, {}))]
        if all(bias_correction.LOG_PRODUCT in state for state in begun):
            return
        oldest = max(int(state["step"]) for state in begun)
        for state in begun:
            if bias_correction.LOG_PRODUCT not in state:
                made_with, steps = self._made_with.get(id(group)), int(state["step"])
                state[bias_correction.LOG_PRODUCT] = bias_correction.log_product(made_with, steps, oldest)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings are checked, and ``betas`` becomes a pair.

        Raises:
            ValueError: as the constructor.
        """
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError(f"a parameter group has no params, only {shown(list(param_group))}.")
        # Groups of torch's Adam may say "fused" and "capturable"; these two are ours alone.
        for field in ("allow_unbalanced", "fused_zero") if isinstance(param_group, dict) else ():
            if param_group.get(field, self.defaults[field]) is not self.defaults[field]:
                raise ValueError(
                    f"{field} is {shown(param_group[field])} in a parameter group; it is a setting of the whole "
                    "optimizer: give it to BalancedAdam itself."
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for field in SWITCHES:
            group.pop(field)  # torch copies all defaults
        try:
            check_group(group, self.defaults["allow_unbalanced"])
            self._check_own(group)
            for param in group["params"]:
                check_param(param, group["state"])
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
            ValueError: if somebody, or a checkpoint, has made a group's betas unequal without permission, or a tensor
                does not fit its parameter (any more); no parameter has changed, but the step may have been counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = parameter_step.Work([], [], {}, [])
        try:
            for group in self.param_groups:
                check_before_step(group, self.defaults["allow_unbalanced"], self.defaults["capturable"])
                self._check_own(group)
            for group in self.param_groups:
                for param in group["params"]:
                    if param in self.fused_grads or param.grad is not None:
                        self._prepare_step(param, group, work)
                        if dtensor.is_dtensor(param):
                            work.distributed.append(param)
                    elif states.format_of(self.state.get(param, {})) not in (None, group["state"]):  # loaded
                        self._cut += states.convert_(group["state"], self.state[param], param)
            work.carry_out()
        finally:  # what was handed over is for this step, also where it fails
            for group in self.param_groups if self.fused_grads else ():
                for param in group["params"]:
                    self.fused_grads.pop(param, None)
        self._moved |= work.moved
        if self._cut:
            cut, self._cut = self._cut, 0
            warn_once(
                f"{cut} elements of the loaded state had an m beyond what its packed form holds (sqrt(v), and less in "
                "packed8); it is cut off there.",
                "cut",
            )
        return loss

    def set_fused_grad(
        self,
        param: Tensor,
        shards: list[Tensor],
        grad_factor: Tensor | None = None,
        lp_param_out: Tensor | None = None,
        store_scaled_grad: bool = False,
    ) -> bool:
        """Give ``param`` a gradient for the next :meth:`step` in a form that saves passes over memory.

        Args:
            param: a contiguous float32 parameter of this optimizer.
            shards, grad_factor, lp_param_out, store_scaled_grad: see :class:`balanced_adam.fused_grad.FusedGrad`.

        Returns:
            Whether it was taken: not where plain torch steps this parameter, a dtype or device doesn't suit, or hooks
            or ``capturable`` need ``param.grad``. It is for one step; loading a state drops it.
        """
        fused_grad = FusedGrad(shards, grad_factor, lp_param_out, store_scaled_grad)
        if not (fused_grad.fits(param) and self._fuses(param)):
            return False
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, _global_pre_hooks, _global_post_hooks)
        if self.defaults["capturable"] or any(hooks):  # a hook would look for param.grad
            return False
        self.fused_grads[param] = fused_grad
        return True

    def clear_fused_grad(self, param: Tensor) -> None:
        """Forget what :meth:`set_fused_grad` took for ``param``, if it is still there."""
        self.fused_grads.pop(param, None)

    def _fuses(self, param: Tensor) -> bool:
        """Whether a kernel steps this parameter.

        Raises:
            RuntimeError: if none does, and ``fused`` or ``capturable`` insists.
        """
        fused, capturable = self.defaults["fused"], self.defaults["capturable"]
        return fused is not False and parameter_step.fuses(dtensor.local(param), bool(fused), capturable)

    def _check_own(self, group: dict[str, Any]) -> None:
        """Check settings that this class alone has, or must not have."""
        check_meaning(group, {name: group[name] if name == "p" else value for name, value in self.OWN.items()})

    def _rule(self, param: Tensor, group: dict[str, Any], step: int) -> parameter_step.Update:
        """The rule by which plain torch takes step number ``step`` of a parameter."""
        return rule.update

    def _prepare_step(self, param: Tensor, group: dict[str, Any], work: parameter_step.Work) -> None:
        """Count the step of a parameter, and add what a kernel shall do, or plain torch."""
        fused = self._fuses(param)
        fused_grad = self.fused_grads.get(param)
        grad = None if param.grad is None else dtensor.local(param.grad)
        state, weights = self.state[param], dtensor.local(param)
        if fused and fused_grad is None and grad is not None and grad.dtype != weights.dtype:
            fused = parameter_step.fuses_grad(weights, grad)
        if "step" in state and bias_correction.LOG_PRODUCT not in state:
            self._complete(group)
        moments, cut = parameter_step.prepare_moments(param, state, group["state"])
        self._cut += cut
        settings: dict[str, Any] = {name: float(group[name]) for name in ("eps", "weight_decay")}
        settings |= {"betas": group["betas"], "maximize": group["maximize"]}
        scalars: bytes | kernels.Recipe
        if self.defaults["capturable"]:
            check_capturable(group)  # a checkpoint may have brought another
            scalars = parameter_step.recipe(param, state, group["lr"], settings, self._counted.get(param))
            self._counted[param] = group["betas"]
        else:
            step, corrected = parameter_step.count(state, group["betas"])
            lr, work.moved[param] = parameter_step.reparametrize(group, settings, corrected)
            if not fused:
                assert grad is not None
                update = self._rule(param, group, step)
                plain = parameter_step.PlainStep(weights, grad, moments, step, corrected, lr, settings, update)
                work.plain_steps.append(plain)
                return
            scalars = kernels.scalars(step, lr, **settings, corrected=corrected)
        parameter_step.lay_out_moments(param, weights, state, moments)
        work.updates.extend(parameter_step.kernel_updates(weights, moments, scalars, grad, fused_grad))

    @torch.no_grad()
    def update_size(self) -> UpdateSize:
        """The size of the last step of every parameter that has moved since the last call of this.

        Call it after each step; it is worked out from the moments, and costs nothing where it isn't called. Under ZeRO
        it covers the partition of this rank. ``numel`` is 0 if nothing has moved, and with ``capturable=True``, where
        no step is noted.
        """
        moved, self._moved = self._moved, {}
        return update_size(moved, self.state, self._fuses)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a group's ``state`` is the format that its moments are in now."""
        for group in self.param_groups:
            self._complete(group)
        saved = super().state_dict()
        state_dicts.describe_groups(saved)
        saved["state"] = state_dicts.as_saved(saved["state"], saved["param_groups"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a BalancedAdam, of a ``torch.optim.AdamW`` of any age, or of DeepSpeed's FusedAdam or
        DeepSpeedCPUAdam.

        The moments keep full precision (float32, float64 for float64 parameters) whatever the parameters' dtype;
        torch's own loading would cast them down to bf16 with the weights. Hyper-parameters come from ``state_dict``,
        as in torch, but for unequal betas where this optimizer takes only equal ones: then its own betas stay, and a
        warning says so. Settings that ``state_dict`` lacks stay as they are.

        Raises:
            ValueError: if the groups don't match, a moment is missing or has another shape than its parameter, moments
                are in an unknown format or not in the one they are called, or the state is that of AMSGrad or of an
                Adam whose weight decay was not decoupled; nothing has changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}
        if not isinstance(state_dict, dict):
            raise ValueError(f"the loaded state is {shown(state_dict)}; it must be the state dict of an optimizer.")

        def examine(_: torch.optim.Optimizer, seen: dict[str, Any]) -> None:
            # Registered last, so that it sees what torch will load, whatever other hooks have made of it.
            loaded.update(state_dicts.check_state_dict(seen, self.param_groups))

        hook = self.register_load_state_dict_pre_hook(examine)
        try:
            with self.keeping_own():
                super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for param, state in loaded.items():
            state_dicts.keep_precision(param, state, self.state[param])

    @contextmanager
    def keeping_own(self) -> Iterator[None]:
        """Around whatever loads the groups' settings: the format of the state stays, and so do equal betas where
        unequal ones can't be.

        What betas the loaded averages were made with is remembered, for bias correction.
        """
        own = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        for group in self.param_groups:
            group.pop(bias_correction.GROUP_KEY, None)
        before, self._made_with = self._made_with, {}
        try:
            yield
        except BaseException:
            self._made_with = before
            raise
        for group, settings in zip(self.param_groups, own, strict=True):
            state_dicts.fill_in(group, settings, self.defaults)
            if id(group) not in self._made_with:
                self._remember(group)
                self._complete(group)
            may_be_unequal = self.defaults["allow_unbalanced"] and settings["state"] == "fp32"
            if (warning := state_dicts.keep_betas(group, settings["betas"], may_be_unequal)) and is_rank_0():
                warnings.warn(warning, stacklevel=4)  # at who called load_state_dict
