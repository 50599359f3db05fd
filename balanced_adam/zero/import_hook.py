"""Registration with DeepSpeed without importing it: when it is imported, or at once where it is already.

DeepSpeed takes a second to import, and many who have it installed train in plain PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from balanced_adam.zero.registration import is_registered, register, set_name

ENGINE = "deepspeed.runtime.engine"
"""The module of DeepSpeed's that looks optimizers up by their names; ``import deepspeed`` imports it."""


def install() -> None:
    """Register with DeepSpeed now if it has been imported, and otherwise as soon as it is; set
    ``torch.optim.BalancedAdam``.

    Raises:
        RuntimeError: as :func:`balanced_adam.zero.register`; from ``import deepspeed``, where that comes later.
    """
    set_name()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    register_if_imported()


def register_if_imported() -> None:
    """Register with DeepSpeed unless that has happened, or DeepSpeed has not been imported, or not wholly yet."""
    engine = sys.modules.get(ENGINE)
    if engine is not None and not getattr(engine.__spec__, "_initializing", False) and not is_registered():
        register()


class _Finder(MetaPathFinder):
    """Finds the engine as others do, and has :func:`register` called at the end of its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != ENGINE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        register()

    loader.exec_module = exec_module  # type: ignore[method-assign]
