"""Balanced Adam: Adam with beta1 = beta2, for PyTorch and, by name, for DeepSpeed ZeRO.

Importing this package makes ``BalancedAdam`` and its relatives known by name: ``torch.optim.BalancedAdam``, and
``"optimizer": {"type": "BalancedAdam", "params": {"lr": 1e-3, "betas": 0.95}}`` in a ds_config. It does not import
DeepSpeed, and registers with it when somebody else does (:mod:`balanced_adam.zero.import_hook`).
"""

from balanced_adam.optimizer import BalancedAdam
from balanced_adam.relatives import AdamNC, AdamP, AMSGrad, LpAdam
from balanced_adam.state import unpacked
from balanced_adam.update_size import UpdateSize
from balanced_adam.zero import import_hook, register

__all__ = ["AMSGrad", "AdamNC", "AdamP", "BalancedAdam", "LpAdam", "UpdateSize", "register", "unpacked"]
__version__ = "0.1.0"

import_hook.install()
