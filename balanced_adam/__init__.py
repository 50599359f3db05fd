"""Balanced Adam: Adam with beta1 = beta2, for PyTorch and, by name, for DeepSpeed ZeRO.

Importing this package registers ``BalancedAdam`` with DeepSpeed when DeepSpeed is installed, so that
``"optimizer": {"type": "BalancedAdam", "params": {"lr": 1e-3, "betas": 0.95}}`` works in a ds_config.
"""

import warnings
from importlib.util import find_spec

from balanced_adam.optimizer import BalancedAdam, UpdateSize
from balanced_adam.state import unpacked

__all__ = ["BalancedAdam", "UpdateSize", "register", "unpacked"]
__version__ = "0.1.0"


def register() -> None:
    """Make DeepSpeed resolve the optimizer name "BalancedAdam"; see :func:`balanced_adam.zero.register`."""
    from balanced_adam import zero

    zero.register()


if find_spec("deepspeed") is not None:
    try:
        register()
    except ImportError as error:  # no DeepSpeed can run here, but plain PyTorch can
        warnings.warn(f"{error} BalancedAdam works without it.", stacklevel=2)
