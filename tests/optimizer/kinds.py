"""The relatives as the tests build them."""

from __future__ import annotations

from typing import Any

from balanced_adam import AdamNC, AdamP, AMSGrad, BalancedAdam, LpAdam, power_mean

DELTA, RATIO = 1.5, 0.2
KINDS: dict[str, tuple[type[BalancedAdam], dict[str, Any]]] = {
    **{f"l{p:g}": (LpAdam, {"p": p}) for p in power_mean.POWERS},
    "amsgrad": (AMSGrad, {}),
    "adamnc": (AdamNC, {}),
    "adamp": (AdamP, {"delta": DELTA, "wd_ratio": RATIO}),
}
