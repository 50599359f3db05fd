"""Registration with DeepSpeed without importing it: when it is imported, or at once where it is already.

DeepSpeed takes a second to import, and many who have it installed train in plain PyTorch. Nothing here ever makes an
import fail.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import local
from types import ModuleType
from typing import Any

from balanced_adam.zero import registration

ENGINE = "deepspeed.runtime.engine"
"""The module of DeepSpeed's that looks optimizers up by their names; ``import deepspeed`` imports it."""


def install() -> None:
    """Set ``torch.optim.BalancedAdam``. Register with DeepSpeed now if it has been imported, and otherwise as soon as
    it is.

    Raises:
        RuntimeError: if ``torch.optim`` has another ``BalancedAdam`` already.
    """
    registration.set_name()
    # By name: this module may have been reloaded.
    if not any(type(finder).__name__ == _EngineFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _EngineFinder())
    register_if_imported()


def register_if_imported() -> None:
    """Register with DeepSpeed if it has been imported, to the end, and that has not been tried yet."""
    engine = sys.modules.get(ENGINE)
    being_imported = getattr(getattr(engine, "__spec__", None), "_initializing", False)
    if engine is not None and not being_imported and not registration.was_tried():
        registration.register_or_refuse()


class _EngineFinder(MetaPathFinder):
    """Finds the engine as the other finders do, and has BalancedAdam registered at the end of its import."""

    def __init__(self) -> None:
        self._asking = local()  # others may ask all finders, too

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != ENGINE or getattr(self._asking, "others", False):
            return None
        self._asking.others = True
        try:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            self._asking.others = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec = copy(spec)
            spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[arg-type]
        return spec


class _RegisteringLoader(Loader):
    """Loads as another loader, which keeps its place in the module; then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        registration.register_or_refuse()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)
