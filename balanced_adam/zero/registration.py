"""Registration by name with DeepSpeed.

:func:`register` reaches into DeepSpeed at two points, since DeepSpeed has no registry for outside optimizers: a name in
a ds_config that is not one of its own becomes ``getattr(torch.optim, name)`` (runtime/engine.py,
``_configure_basic_optimizer``), and ZeRO then asks for ``type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS``
(runtime/zero/utils.py). It puts on the wrappers of :mod:`balanced_adam.zero.wrappers`, of
:mod:`balanced_adam.zero.packed_state` and of :mod:`balanced_adam.zero.patches`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from balanced_adam.optimizer import BalancedAdam
from balanced_adam.relatives import RELATIVES
from balanced_adam.warn import warn_once
from balanced_adam.zero import packed_state, patches, wrappers
from balanced_adam.zero.patches import deepspeed_version

OPTIMIZERS: tuple[type[BalancedAdam], ...] = (BalancedAdam, *RELATIVES)
NAMES = {name: each for each in OPTIMIZERS for name in (each.__name__, each.__name__.lower())}
"""In lower case, too, since DeepSpeed takes its own optimizers' names so."""
TESTED_DEEPSPEED = "0.19.8"
_refusals: list[str] = []  # why this process' DeepSpeed can't take a BalancedAdam, if it can't
_gone: list[str] = []  # the methods and functions that packed state needs and this process' DeepSpeed doesn't have


def register() -> None:
    """Make ``"optimizer": {"type": "BalancedAdam"}`` in a ds_config mean our class, under every ZeRO stage.

    Needs no ``zero_allow_untested_optimizer`` and no ``zero_force_ds_cpu_optimizer``. Calling it again changes nothing.
    It has to happen in every rank's process before ``deepspeed.initialize``. ``import balanced_adam`` sees to that
    (:mod:`balanced_adam.zero.import_hook`).

    Raises:
        ImportError: if DeepSpeed can't be imported.
        RuntimeError: if DeepSpeed no longer takes optimizers by such a name (the message names the version tested), or
            if ``torch.optim`` already has another ``BalancedAdam``. DeepSpeed does not take a BalancedAdam then.
            Where it lacks a method that packed state needs, it refuses packed state, and no more.
    """
    try:
        import deepspeed  # noqa: F401
    except Exception as error:  # whatever DeepSpeed's own import runs into, such as a missing CUDA toolkit
        raise ImportError(f"DeepSpeed is not installed, or can't be imported ({error}).") from error
    set_name()
    try:
        _patch()
    except Exception as error:  # a name is gone, or means something else
        raise RuntimeError(
            f"BalancedAdam can't register with DeepSpeed {deepspeed_version()}: {error}; it was tested with DeepSpeed "
            f"{TESTED_DEEPSPEED}, so install that version."
        ) from error
    _refusals.clear()


def _patch() -> None:
    """Look for what is needed; then make the name known and wrap the methods that are there."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    packed = packed_state.overrides()
    gone = [f"{cls.__name__}.{name}" for cls, name, _ in packed if not hasattr(cls, name)]
    if missing := packed_state.missing_function():
        gone.append(missing)
    if unknown := [name for name in NAMES if not DeepSpeedEngine._is_supported_optimizer(None, name)]:
        raise AttributeError(f"a name in torch.optim no longer resolves ({unknown[0]!r})")
    packed_state.check_loaders()
    patches.check_engine()
    if not missing:
        packed_state.patch_fragments()
    for cls, name, wrapper in (*patches.overrides(), *wrappers.overrides(), *packed):
        if hasattr(cls, name):
            _wrap(cls, name, wrapper)
    _gone[:] = gone
    if gone:
        _refuse_in_engine()
    for optimizer in OPTIMIZERS:
        if optimizer not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def register_or_refuse() -> None:
    """Register, where DeepSpeed can be imported; where it has moved what this relies on, refuse and warn.

    Then DeepSpeed's engine refuses a BalancedAdam with that sentence. Other optimizers work under DeepSpeed as ever,
    and BalancedAdam works in plain PyTorch.
    """
    try:
        register()
    except ImportError:  # there is no DeepSpeed to be used
        return
    except RuntimeError as error:
        _refusals[:] = [str(error)]
        _refuse_in_engine()
        with suppress(UserWarning):  # where warnings are errors, this import must not fail: the engine says it again
            warnings.warn(f"{error} BalancedAdam works without DeepSpeed.", stacklevel=2)


def refusal() -> str | None:
    """Why the DeepSpeed of this process refuses a BalancedAdam; None if it doesn't."""
    return _refusals[0] if _refusals else None


def was_tried() -> bool:
    """Whether the DeepSpeed of this process takes a BalancedAdam, or refuses it."""
    utils = sys.modules.get("deepspeed.runtime.zero.utils")
    return bool(_refusals) or BalancedAdam in getattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", ())


def _refuse_in_engine() -> None:
    engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    configure = getattr(engine, "_configure_optimizer", None)
    if hasattr(configure, "balanced_adam_patched"):
        return
    if not callable(configure):  # then at least its name must not be found
        for name, optimizer in NAMES.items():
            if getattr(torch.optim, name, None) is optimizer:
                delattr(torch.optim, name)
        return

    @functools.wraps(configure)
    def method(self: Any, client_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        def refused(optimizer: Any) -> Any:
            if isinstance(optimizer, BalancedAdam) and (reason := refusal() or _lack(optimizer)):
                raise RuntimeError(reason)
            return optimizer

        name = self.optimizer_name() if client_optimizer is None else None
        if name in NAMES and getattr(torch.optim, name, None) is NAMES[name] and (reason := refusal()):
            raise RuntimeError(reason)
        if callable(refused(client_optimizer)):
            build = client_optimizer
            client_optimizer = lambda params: refused(build(params))  # noqa: E731
        configured = configure(self, client_optimizer, *args, **kwargs)
        refused(getattr(self, "basic_optimizer", None))
        return configured

    method.balanced_adam_patched = True  # type: ignore[attr-defined]
    setattr(engine, "_configure_optimizer", method)  # noqa: B010


def _lack(optimizer: BalancedAdam) -> str | None:
    """Why DeepSpeed can't have this optimizer, although it takes others; None if it can."""
    if not _gone or all(group["state"] == "fp32" for group in optimizer.param_groups):
        return None
    return (
        f'DeepSpeed {deepspeed_version()} has no {_gone[0]}, without which BalancedAdam takes no "state" but "fp32"; '
        f"it was tested with DeepSpeed {TESTED_DEEPSPEED}."
    )


def set_name() -> None:
    """Make ``torch.optim.BalancedAdam`` our class, which is how DeepSpeed finds optimizers that are not its own.

    And so its relatives, unless a name of theirs is taken, of which it warns.

    Raises:
        RuntimeError: if another class is called BalancedAdam.
    """
    taken = [name for name, optimizer in NAMES.items() if getattr(torch.optim, name, optimizer) is not optimizer]
    for name in taken:
        sentence = f"torch.optim.{name} is another class already; only one can have the name."
        if NAMES[name] is BalancedAdam:
            raise RuntimeError(sentence)
        warn_once(f"{sentence} In a ds_config it is that one.")
    for name in NAMES.keys() - set(taken):
        setattr(torch.optim, name, NAMES[name])


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace method ``name`` by ``wrapper(original, self, ...)`` for wrappers of BalancedAdam; once, however often
    called."""
    original = getattr(cls, name)
    if getattr(original, "balanced_adam_patched", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = getattr(self, "optimizer", None)
        own = [*args, *kwargs.values()] if held is None else [held]  # it is given to what has none yet
        if any(isinstance(value, BalancedAdam) for value in own):
            return wrapper(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    method.balanced_adam_patched = True  # type: ignore[attr-defined]
    setattr(cls, name, method)
