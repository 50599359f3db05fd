"""The hook that registers when DeepSpeed is imported: whoever else loads modules, and however an import ends."""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from balanced_adam import BalancedAdam
from balanced_adam.zero import import_hook, registration

ENGINE = import_hook.ENGINE
SOURCES = {
    "deepspeed/__init__.py": "import deepspeed.runtime.engine\nimport deepspeed.late\n",
    "deepspeed/runtime/__init__.py": "",
    "deepspeed/runtime/config.py": "",
    "deepspeed/runtime/engine.py": "import deepspeed.runtime.config\nclass DeepSpeedEngine: pass\n",
    "deepspeed/late.py": "",
}
"""A DeepSpeed that takes no time to import."""


@pytest.fixture
def no_deepspeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """None has been imported, and the one that can be is SOURCES, once written."""
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    others = [finder for finder in sys.meta_path if type(finder).__name__ != "_EngineFinder"]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registration, "_refusals", [])
    monkeypatch.setattr(torch.optim, "BalancedAdam", BalancedAdam)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]  # before monkeypatch brings the others back


@pytest.fixture
def registered(no_deepspeed: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Each registration notes whether the engine was there to its end."""
    calls: list[bool] = []
    monkeypatch.setattr(
        registration, "register_or_refuse", lambda: calls.append(hasattr(sys.modules[ENGINE], "DeepSpeedEngine"))
    )
    monkeypatch.setattr(registration, "was_tried", lambda: bool(calls))
    return calls


def write(folder: Path, **changed: str) -> None:
    for name, source in {
        **SOURCES,
        **{key.replace("__", "/", 1) + ".py": text for key, text in changed.items()},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    importlib.invalidate_caches()


def imported() -> ModuleType:
    return importlib.import_module("deepspeed")


def test_the_import_registers_once_and_leaves_the_module_as_it_would_be(registered: list[bool], tmp_path: Path) -> None:
    write(tmp_path)
    import_hook.install()
    imported()
    spec = sys.modules[ENGINE].__spec__
    assert registered == [True] and spec is not None
    assert type(spec.loader).__name__ == type(sys.modules[ENGINE].__loader__).__name__ == "SourceFileLoader"
    pickle.dumps(spec)
    import_hook.install()
    import_hook.register_if_imported()
    assert registered == [True]


def test_from_a_zip_file(registered: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "ds.zip", "w") as file:
        for name, source in SOURCES.items():
            file.writestr(name, source)
    monkeypatch.syspath_prepend(str(tmp_path / "ds.zip"))
    import_hook.install()
    imported()
    assert registered == [True]


class Asking(importlib.abc.MetaPathFinder):
    """A finder that asks all others, as ours does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("deepspeed."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        return next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_beside_a_finder_that_asks_the_others(registered: list[bool], tmp_path: Path, first: bool) -> None:
    write(tmp_path)
    import_hook.install()
    sys.meta_path.insert(0 if first else 1, Asking())
    imported()
    assert registered == [True]


def test_after_our_module_has_been_reloaded(registered: list[bool], tmp_path: Path) -> None:
    write(tmp_path)
    import_hook.install()
    importlib.reload(import_hook).install()
    imported()
    assert registered == [True]


def test_an_import_that_fails_and_is_tried_again(registered: list[bool], tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "deepspeed" / "runtime" / "engine.py").write_text("raise OSError('CUDA_HOME does not exist')\n")
    import_hook.install()
    with pytest.raises(OSError, match=r"^CUDA_HOME does not exist$"):
        imported()
    assert registered == []
    (tmp_path / "deepspeed" / "runtime" / "engine.py").write_text(SOURCES["deepspeed/runtime/engine.py"] + "# whole\n")
    importlib.invalidate_caches()
    imported()
    assert registered == [True]


class Old(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A loader of the time before exec_module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name == ENGINE else None

    def __getattribute__(self, name: str) -> Any:
        if name in ("exec_module", "create_module"):
            raise AttributeError(name)
        return super().__getattribute__(name)

    def load_module(self, name: str) -> ModuleType:
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(DeepSpeedEngine=object, __spec__=None)
        return module


@pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::DeprecationWarning")
def test_beside_a_loader_without_exec_module_the_first_optimizer_registers(
    registered: list[bool], tmp_path: Path
) -> None:
    write(tmp_path)
    import_hook.install()
    sys.meta_path.insert(0, Old())
    imported()
    import_hook.register_if_imported()
    assert registered == [True]


@pytest.mark.parametrize("stub", [lambda: ModuleType(ENGINE), MagicMock], ids=["module", "mock"])
def test_a_stub_in_place_of_the_engine_breaks_no_import(
    no_deepspeed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Callable[[], Any]
) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, ENGINE, stub())
    with pytest.warns(UserWarning, match=r"^BalancedAdam can't register with DeepSpeed .* works without DeepSpeed\.$"):
        import_hook.install()
    assert registration.refusal()
    import_hook.install()  # says it once


def test_a_deepspeed_that_breaks_after_its_engine_breaks_no_import_of_ours(no_deepspeed: None, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "deepspeed" / "late.py").write_text("raise ImportError('libfoo.so.12')\n")
    with pytest.raises(ImportError, match="libfoo"):
        imported()
    assert ENGINE in sys.modules
    import_hook.install()
    assert registration.refusal() is None


def test_asking_for_the_engine_imports_nothing_and_changes_no_module(registered: list[bool], tmp_path: Path) -> None:
    write(tmp_path)
    import_hook.install()
    finder = next(finder for finder in sys.meta_path if type(finder).__name__ == "_EngineFinder")
    assert finder.find_spec(ENGINE, ["/nonexistent"]) is None
    finder.find_spec(ENGINE, None)
    assert "deepspeed" not in sys.modules
    imported()
    for _ in range(3):
        copy.copy(finder.find_spec(ENGINE, [str(tmp_path / "deepspeed" / "runtime")]).loader)  # type: ignore[union-attr]
    assert type(sys.modules[ENGINE].__spec__.loader).__name__ == "SourceFileLoader"  # type: ignore[union-attr]
    assert registered == [True]


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_the_import_works_and_the_engine_refuses(no_deepspeed: None, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "deepspeed" / "runtime" / "engine.py").write_text(
        "class DeepSpeedEngine:\n    def _configure_optimizer(self, client, params):\n        return client\n"
    )
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '0.99'\nimport deepspeed.runtime.engine\n")
    import_hook.install()
    engine = imported().runtime.engine.DeepSpeedEngine()
    ours, theirs = BalancedAdam([torch.ones(1, requires_grad=True)]), object()
    with pytest.raises(RuntimeError, match=r"^BalancedAdam can't register with DeepSpeed 0\.99: "):
        engine._configure_optimizer(ours, None)
    engine.optimizer_name = lambda: "BalancedAdam"
    with pytest.raises(RuntimeError, match=r"^BalancedAdam can't register with DeepSpeed 0\.99: "):
        engine._configure_optimizer(None, None)
    assert engine._configure_optimizer(theirs, None) is theirs
    registration._refusals.clear()  # as where registering again has worked
    assert engine._configure_optimizer(ours, None) is ours
