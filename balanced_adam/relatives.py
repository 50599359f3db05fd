"""Relatives of Adam that are optimizers of their own: LpAdam, AMSGrad, AdamNC and AdamP.

Each is a :class:`~balanced_adam.BalancedAdam` with another rule: what its docstring does not name is as there (groups,
one beta unless ``allow_unbalanced``, decoupled decay, bias correction, float32 moments, DTensors, ZeRO, state dicts).
They step in plain torch, for comparisons; kernels and ZeRO's step in one pass know Adam's rule alone. docs/relatives.md
says where they come from and what was measured.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from balanced_adam import dtensor, power_mean, rule, tensor_rows
from balanced_adam import state as states
from balanced_adam.arguments import as_setting
from balanced_adam.optimizer import BalancedAdam
from balanced_adam.parameter_step import Update
from balanced_adam.update_size import UpdateSize

Group = dict[str, Any]


class Relative(BalancedAdam):
    """What they share: one step in plain torch, of which a subclass replaces a part."""

    PACKS: ClassVar[bool] = False
    """Whether |m| is at most the root of what ``exp_avg_sq`` holds, and the step needs nothing else."""

    def _forget(self) -> None:
        super()._forget()
        self._sizes: dict[Tensor, tuple[Tensor, Tensor]] = {}  # of the last step: greatest |u|, and the sum of u^2

    def _fuses(self, param: Tensor) -> bool:
        for switch in ("fused", "capturable"):
            if self.defaults[switch]:
                raise RuntimeError(f"{switch} is True, and {type(self).__name__} has no kernel; leave it out.")
        return False

    def _check_own(self, group: Group) -> None:
        super()._check_own(group)
        if group["state"] != "fp32" and not self.PACKS:
            raise ValueError(
                f"state is {group['state']!r}, and {type(self).__name__} divides by more than the root of a packed v; "
                "it must be 'fp32'."
            )

    def _rule(self, param: Tensor, group: Group, step: int) -> Update:
        return partial(self._update, param, group, step)

    def _update(
        self,
        param: Tensor,
        group: Group,
        count: int,
        weights: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        step: int,
        lr: float,
        betas: rule.Betas,
        eps: float,
        weight_decay: float,
        maximize: bool = False,
        bounded: bool = False,
    ) -> tuple[Tensor, ...]:
        """As :func:`balanced_adam.rule.update`, with the parts below; ``step`` is the number for bias correction, and
        ``count`` that of the step."""
        grad = -grad.to(exp_avg.dtype) if maximize else grad.to(exp_avg.dtype)
        exp_avg = exp_avg * betas[0] + grad * (1.0 - betas[0])
        exp_avg_sq = self._second_moment(group, count, exp_avg_sq, grad, betas[1])
        if not bounded:
            exp_avg, exp_avg_sq = rule.flushed(exp_avg, exp_avg_sq, tied=betas[0] == betas[1])
        correction = self._bias_correction(group, step, betas, eps)
        move = rule.direction(exp_avg, self._divisor(param, exp_avg_sq), correction)
        if bounded:
            move = move.clamp(-1.0 / correction.scale, 1.0 / correction.scale)
        move, kept = self._project(param, group, weights, grad, move, lr * weight_decay)
        size = move.abs().double() * correction.scale
        if size.numel():
            self._sizes[param] = (size.amax(), size.square().sum())
        return rule.moved(weights, move, lr * correction.scale, kept), exp_avg, exp_avg_sq

    def _second_moment(self, group: Group, count: int, exp_avg_sq: Tensor, grad: Tensor, beta: float) -> Tensor:
        return exp_avg_sq * beta + (grad * grad) * (1.0 - beta)

    def _divisor(self, param: Tensor, exp_avg_sq: Tensor) -> Tensor:
        """What has the root that divides."""
        return exp_avg_sq

    def _bias_correction(self, group: Group, step: int, betas: rule.Betas, eps: float) -> rule.BiasCorrection:
        return rule.bias_correction(step, betas, eps)

    def _project(
        self, param: Tensor, group: Group, weights: Tensor, grad: Tensor, move: Tensor, decay: float
    ) -> tuple[Tensor, float | Tensor]:
        """The move, and what is kept of the weights."""
        return move, 1.0 - decay

    @torch.no_grad()
    def update_size(self) -> UpdateSize:
        """As of :class:`~balanced_adam.BalancedAdam`; measured in each step."""
        moved, self._moved = self._moved, {}
        sizes, self._sizes = self._sizes, {}
        found = [(float(top), float(squares), moved[param].factor) for param, (top, squares) in sizes.items()]
        return UpdateSize(
            max((top * factor for top, _, factor in found), default=0.0),
            math.fsum(squares * factor**2 for _, squares, factor in found),
            sum(dtensor.local(param).numel() for param in sizes),
        )


class LpAdam(Relative):
    r"""Adam whose denominator is the p-th root of an average of :math:`|g|^p` (arXiv 2106.05449).

    The paper recommends p = 3 or 6. p = 2 is Adam. With equal betas every step is bounded by ``lr``, by Hölder's
    inequality, and moments can be packed. ``exp_avg_sq`` holds the average to the power 2 / p
    (:mod:`balanced_adam.power_mean`), and so has the size of a squared gradient. Other optimizers that don't look at
    ``p``, such as torch's, take it for Adam's.

    Args:
        p: 1, 1.5, 2, 3 or 6; a group may set its own. It stays what it was at the first step. For float64 parameters
            |g|^p must be a float64, too.
    """

    OWN: ClassVar[dict[str, Any]] = {"p": 3.0}
    PACKS = True

    def _check_own(self, group: Group) -> None:
        group["p"] = as_setting("p", group["p"])
        if group["p"] not in power_mean.POWERS:
            allowed = ", ".join(f"{p:g}" for p in power_mean.POWERS)
            raise ValueError(f"p is {group['p']:g}; it must be one of {allowed}.")
        super()._check_own(group)
        if any("step" in self.state.get(param, {}) for param in group["params"]):
            begun = self._begun_with.setdefault(id(group), group["p"])
            if begun != group["p"]:
                raise ValueError(f"p is {group['p']} at this step, and steps before had {begun}; it must stay.")

    def _forget(self) -> None:
        super()._forget()
        self._begun_with: dict[int, float] = {}  # id of a group: p of its averages

    def _second_moment(self, group: Group, count: int, exp_avg_sq: Tensor, grad: Tensor, beta: float) -> Tensor:
        return power_mean.update(exp_avg_sq, grad, beta, group["p"])

    def _bias_correction(self, group: Group, step: int, betas: rule.Betas, eps: float) -> rule.BiasCorrection:
        if group["p"] == 2.0:
            return rule.bias_correction(step, betas, eps)
        root = (1.0 - rule.power(betas[1], step)) ** (1.0 / group["p"])
        return rule.BiasCorrection(root / (1.0 - rule.power(betas[0], step)), eps * root)


class AMSGrad(Relative):
    """Adam that divides by the root of the greatest v so far (arXiv 1904.09237), as ``torch.optim.AdamW(amsgrad=True)``
    does: of v before bias correction.

    State beside Adam's: ``max_exp_avg_sq``, as torch's, whose state loads here, and back. DeepSpeed's universal
    checkpoints have no place for it, and are refused.
    """

    OWN: ClassVar[dict[str, Any]] = {"amsgrad": True}

    def _check_own(self, group: Group) -> None:
        super()._check_own(group)
        for param in group["params"]:
            state = self.state.get(param, {})
            if "exp_avg" in state and not states.maximum(state):
                raise ValueError(
                    f"the loaded state has no {states.MAXIMUM}, which DeepSpeed's universal checkpoints leave out: "
                    "resume AMSGrad from a checkpoint of the same number of ranks."
                )

    def _prepare_step(self, param: Tensor, group: Group, work: Any) -> None:
        if not states.maximum(self.state[param]):
            dtype = rule.moments_dtype(param.dtype)
            self.state[param][states.MAXIMUM] = torch.zeros_like(param, dtype=dtype)
        super()._prepare_step(param, group, work)

    def _divisor(self, param: Tensor, exp_avg_sq: Tensor) -> Tensor:
        greatest = dtensor.local(self.state[param][states.MAXIMUM])
        return greatest.copy_(torch.maximum(greatest, exp_avg_sq))


class AdamNC(Relative):
    r"""Adam whose v is the mean of all squared gradients: :math:`\beta_2 = 1 - 1/t` at step t (arXiv 1904.09237, with a
    constant :math:`\beta_1` 2003.09729). Their learning rates fall as :math:`1/\sqrt t`: leave that to a scheduler.

    m is corrected for its zero start, v needs no correction, and of ``betas`` the second is not used. Other optimizers,
    such as torch's, take its state for Adam's, and correct v for a zero start that it doesn't have.
    """

    OWN: ClassVar[dict[str, Any]] = {"mean_of_squares": True}

    def _second_moment(self, group: Group, count: int, exp_avg_sq: Tensor, grad: Tensor, beta: float) -> Tensor:
        return super()._second_moment(group, count, exp_avg_sq, grad, 1.0 - 1.0 / count)

    def _bias_correction(self, group: Group, step: int, betas: rule.Betas, eps: float) -> rule.BiasCorrection:
        return rule.BiasCorrection(1.0 / (1.0 - rule.power(betas[0], step)), eps)


class AdamP(Relative):
    r"""Adam that leaves out the radial part of a step where weights look scale-invariant (arXiv 2006.08217).

    A tensor of at least two dimensions is looked at by rows (its channels), and then as one. Where for all of these
    :math:`|\cos(w, g)| < \delta / \sqrt d`, d their number of elements, the step loses its part along w, and weight
    decay is ``wd_ratio`` of what it was. m and v are Adam's. The step of what is projected, each row or the tensor, can
    only get shorter, but a single weight's may exceed ``lr``.

    Rows are those of whole tensors, wherever these are cut: in ZeRO's partitions, or as DTensors of FSDP2. All ranks
    must step the same parameters in the same order, as they do there; two small collectives a step and group.

    Args:
        delta: at least 0.
        wd_ratio: in [0, 1].

    Raises:
        ValueError: beside those of BalancedAdam, on a tensor that is cut in a way in which its rows aren't known, such
            as tensor parallelism's and FSDP1's.
    """

    OWN: ClassVar[dict[str, Any]] = {"delta": 0.1, "wd_ratio": 0.1}
    PACKS = True

    def _forget(self) -> None:
        super()._forget()
        self.layouts: dict[Tensor, tensor_rows.Layout] = {}
        """Of flat tensors; ZeRO's step fills it in (:mod:`balanced_adam.zero.fragments`)."""
        self._projected: dict[Tensor, tuple[int, int]] = {}

    def _check_own(self, group: Group) -> None:
        super()._check_own(group)
        for name in ("delta", "wd_ratio"):
            group[name] = as_setting(name, group[name])
        if group["wd_ratio"] > 1.0:
            raise ValueError(f"wd_ratio is {group['wd_ratio']}; it must lie in [0, 1].")
        for param in group["params"]:
            if getattr(param, "_fsdp_flattened", False) or getattr(param, "tensor_model_parallel", False):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is what FSDP1 or tensor parallelism has cut, and AdamP "
                    "needs sums over rows of whole tensors; use FSDP2 or ZeRO."
                )
            tensor_rows.layout(param)

    def _project(
        self, param: Tensor, group: Group, weights: Tensor, grad: Tensor, move: Tensor, decay: float
    ) -> tuple[Tensor, float | Tensor]:
        layout = self.layouts[param] if self.layouts else tensor_rows.layout(param)
        w, g, u = (tensor.reshape(-1).to(move.dtype) for tensor in (weights, grad, move))

        def products(here: slice) -> Tensor:
            a, b, c = w[here].double(), g[here].double(), u[here].double()
            return torch.stack([a * b, a * a, b * b, a * c])

        sums = layout.row_sums(products, 4, move.device)
        kept, eps, found = torch.full_like(u, 1.0 - decay), max(group["eps"], LEAST), 0
        for piece, by_row in zip(layout.pieces, sums, strict=True):
            for wg, ww, gg, wu in (by_row, _in_all(by_row)):
                norms = [power_mean.root(square, 2) for square in (ww, gg)]
                cosine = wg.abs() / (norms[0].clamp(min=eps) * norms[1].clamp(min=eps))
                if bool(cosine.max() < group["delta"] / math.sqrt(piece.numel // len(wg))):
                    radial = wu / (norms[0] + eps).square()
                    u[piece.here] -= w[piece.here] * piece.of_rows(radial).to(u.dtype)
                    kept[piece.here] = 1.0 - decay * group["wd_ratio"]
                    found += 1
                    break
        self._projected[param] = (found, len(layout.pieces))
        return u.view(move.shape), kept.view(move.shape)

    def projected(self) -> tuple[int, int]:
        """How many tensors have been projected since the last call of this, and of how many that have rows.

        Call it after each step. Under ZeRO they are those of all ranks, but for groups of experts.
        """
        steps, self._projected = self._projected, {}
        return sum(found for found, _ in steps.values()), sum(of for _, of in steps.values())


def _in_all(by_row: Tensor) -> Tensor:
    """Sums over all rows, (k, 1); exactly rounded, in whichever order."""
    return torch.tensor([[math.fsum(each)] for each in by_row.tolist()], dtype=by_row.dtype, device=by_row.device)


LEAST = 1e-150
"""In place of an eps of 0, so that rows of zeros have the cosine 0."""
RELATIVES: tuple[type[Relative], ...] = (LpAdam, AMSGrad, AdamNC, AdamP)
