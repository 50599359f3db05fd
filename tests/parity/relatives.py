"""The relatives' rules on whole tensors, for the control.

Written from their papers' formulas, with sums, powers and roots that the package doesn't use.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from balanced_adam import rule

RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamp": ("AdamP", {"delta": 1.5, "wd_ratio": 0.25}),
    "l1": ("LpAdam", {"p": 1}),
    "l1.5": ("LpAdam", {"p": 1.5}),
    "l3": ("LpAdam", {"p": 3}),
    "l6": ("LpAdam", {"p": 6}),
    "amsgrad": ("AMSGrad", {}),
    "adamnc": ("AdamNC", {}),
}
"""The type and the params in a ds_config. delta is such that each of AdamP's cases occurs (:attr:`Control.cases`)."""
TINY = torch.finfo(torch.float32).tiny


class Control:
    """One optimizer's rule; it remembers the maxima of AMSGrad."""

    def __init__(self, name: str) -> None:
        self.kind, self.own = RELATIVES[name]
        self.greatest: dict[str, Tensor] = {}
        self.cases: list[tuple[str, str]] = []
        """What AdamP has done: name of a tensor, and channels, layer or neither."""

    def update(
        self,
        name: str,
        count: int,
        param: Tensor,
        grad: Tensor,
        m: Tensor,
        v: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bounded: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`balanced_adam.rule.update`, in step number ``count``."""
        m = m * betas[0] + grad * (1.0 - betas[0])
        beta2 = 1.0 - 1.0 / count if self.kind == "AdamNC" else betas[1]
        p = float(self.own.get("p", 2.0))
        if p == 2.0:
            v = v * beta2 + (grad * grad) * (1.0 - beta2)
        else:
            old, new = (np.abs(x.cpu().numpy().astype(np.float64)) for x in (v, grad))
            v = torch.tensor((old ** (p / 2) * beta2 + new**p * (1.0 - beta2)) ** (2 / p)).float().to(param.device)
        c1, c2 = (1.0 - rule.power(beta, step) for beta in betas)
        if self.kind == "AdamNC":
            c2 = 1.0
        root = c2 ** (1.0 / p) if p != 2.0 else math.sqrt(c2)
        scale = 1.0 / root if betas[0] == betas[1] and p == 2.0 and self.kind != "AdamNC" else root / c1
        below = v
        if self.kind == "AMSGrad":
            below = self.greatest[name] = torch.maximum(self.greatest.get(name, v), v)
        roots = torch.from_numpy(np.sqrt(below.cpu().numpy())).to(param.device)  # IEEE's
        u = m / (roots + max(eps * root, TINY))
        if bounded:
            u = u.clamp(-1.0 / scale, 1.0 / scale)
        if self.kind == "AdamP" and param.dim() > 1:
            u, ratio = self._projected(name, param, grad, u, eps)
            weight_decay *= ratio
        return param * (1.0 - lr * weight_decay) - u * (lr * scale), m, v

    def _projected(self, name: str, w: Tensor, g: Tensor, u: Tensor, eps: float) -> tuple[Tensor, float]:
        """AdamP's step and decay ratio (arXiv 2006.08217), with exactly rounded sums."""
        for case, rows in (("channels", len(w)), ("layer", 1)):
            a, b, c = (x.reshape(rows, -1).double() for x in (w, g, u))
            dots, squares, of_grad, radial = (
                torch.tensor([math.fsum(row) for row in x.tolist()], dtype=torch.float64, device=w.device)
                for x in (a * b, a * a, b * b, a * c)
            )
            norm = torch.tensor([math.sqrt(x) for x in squares.tolist()], dtype=torch.float64, device=w.device)
            norm_g = torch.tensor([math.sqrt(x) for x in of_grad.tolist()], dtype=torch.float64, device=w.device)
            cosine = dots.abs() / (norm.clamp(min=eps) * norm_g.clamp(min=eps))
            if cosine.max() < self.own["delta"] / math.sqrt(a.shape[1]):
                self.cases.append((name, case))
                along = (radial / (norm + eps) ** 2).float().unsqueeze(1)
                return (u.reshape(rows, -1) - w.reshape(rows, -1) * along).view_as(u), self.own["wd_ratio"]
        self.cases.append((name, "neither"))
        return u, 1.0
