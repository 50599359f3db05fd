"""Registration by name with DeepSpeed, and patches of its defects on our paths.

:func:`register` reaches into DeepSpeed at four points (and at those of :mod:`balanced_adam.zero.wrappers` and
:mod:`balanced_adam.zero.packed_state`). Two make the name known, since DeepSpeed has no registry for outside
optimizers: a name in a ds_config that is not one of its own becomes ``getattr(torch.optim, name)`` (runtime/engine.py,
``_configure_basic_optimizer``), and ZeRO then asks for ``type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS``
(runtime/zero/utils.py).

Two patch defects of DeepSpeed 0.19.8 that change what *any* optimizer computes, for BalancedAdam alone:

* Stage 0 in 16 bits: ``FP16_UnfusedOptimizer.initialize_optimizer_states`` takes a step with zero gradients at
  start-up, so that the step count is one too high for ever and weight decay is applied once too often. We skip it: our
  state is made at the first real step. In fp16 the same wrapper divides the gradient by a loss scale that the loss was
  never multiplied by, which nothing after it can repair: refused.
* Universal checkpoints at stage 3 give every parameter group the settings of group 0. We read them again, per group.

Others are known and not patched (docs/deepspeed-defects.md); one of them: a parameter without a gradient in some step
is given its last gradient again at stage 3, and with offload at stage 2 (tests/parity/cases.py says where).
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from balanced_adam import bias_correction
from balanced_adam.optimizer import BalancedAdam
from balanced_adam.zero import packed_state, wrappers

NAME = "BalancedAdam"
TESTED_DEEPSPEED = "0.19.8"
_refusals: list[str] = []  # why this process' DeepSpeed can't take a BalancedAdam, if it can't
_lacking: dict[str, str] = {}  # what DeepSpeed can't take one for -> the method of DeepSpeed's that is gone
PACKED, UNSCALED, UNIVERSAL = (
    'a "state" that is not "fp32"',
    "zero_optimization.stage 0 in 16 bits",
    "a universal checkpoint at zero_optimization.stage 3",
)


def register() -> None:
    """Make ``"optimizer": {"type": "BalancedAdam"}`` in a ds_config mean our class, under every ZeRO stage.

    Needs no ``zero_allow_untested_optimizer`` and no ``zero_force_ds_cpu_optimizer``. Calling it again changes nothing.
    It has to happen in every rank's process before ``deepspeed.initialize``. ``import balanced_adam`` sees to that
    (:mod:`balanced_adam.zero.import_hook`).

    Raises:
        ImportError: if DeepSpeed can't be imported.
        RuntimeError: if DeepSpeed no longer takes optimizers by such a name (the message names the version tested), or
            if ``torch.optim`` already has another ``BalancedAdam``. DeepSpeed does not take a BalancedAdam then.
            Where it lacks a method that a patch or packed state needs, it refuses what needs that, and no more.
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
            f"BalancedAdam can't register with DeepSpeed {_version()}: {error}; it was tested with DeepSpeed "
            f"{TESTED_DEEPSPEED}, so install that version."
        ) from error
    _refusals.clear()


def _patch() -> None:
    """Look for what is needed; then make the name known and wrap the methods that are there."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    patches: list[wrappers.Override] = [
        (FP16_UnfusedOptimizer, "initialize_optimizer_states", _no_initialization_step),
        (DeepSpeedZeroOptimizer_Stage3, "load_hp_checkpoint_state_from_checkpoint_dir_stage3", _settings_per_group),
    ]
    packed = packed_state.overrides()
    needs = [*zip(patches, (UNSCALED, UNIVERSAL), strict=True), *((override, PACKED) for override in packed)]
    lacking = {need: f"{cls.__name__}.{name}" for (cls, name, _), need in needs if not hasattr(cls, name)}
    if missing := packed_state.missing_function():
        lacking[PACKED] = missing
    if not DeepSpeedEngine._is_supported_optimizer(None, NAME):
        raise AttributeError(f"a name in torch.optim no longer resolves ({NAME!r})")
    if not missing:
        packed_state.patch_fragments()
    for cls, name, wrapper in (*patches, *wrappers.overrides(), *packed):
        if hasattr(cls, name):
            _wrap(cls, name, wrapper)
    _lacking.clear()
    _lacking.update(lacking)
    if lacking:
        _refuse_in_engine()
    if BalancedAdam not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(BalancedAdam)


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
        if getattr(torch.optim, NAME, None) is BalancedAdam:
            delattr(torch.optim, NAME)
        return

    @functools.wraps(configure)
    def method(self: Any, client_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        def refused(optimizer: Any) -> Any:
            if isinstance(optimizer, BalancedAdam) and (reason := refusal() or _lack(self, optimizer)):
                raise RuntimeError(reason)
            return optimizer

        by_name = client_optimizer is None and self.optimizer_name() == NAME
        if by_name and getattr(torch.optim, NAME, None) is BalancedAdam and (reason := refusal()):
            raise RuntimeError(reason)
        if callable(refused(client_optimizer)):
            build = client_optimizer
            client_optimizer = lambda params: refused(build(params))  # noqa: E731
        configured = configure(self, client_optimizer, *args, **kwargs)
        refused(getattr(self, "basic_optimizer", None))
        return configured

    method.balanced_adam_patched = True  # type: ignore[attr-defined]
    setattr(engine, "_configure_optimizer", method)  # noqa: B010


def _lack(engine: Any, optimizer: BalancedAdam) -> str | None:
    """Why this engine can't have this optimizer, although DeepSpeed takes others; None if it can."""
    if not _lacking:
        return None
    stage, half = engine.zero_optimization_stage(), engine.fp16_enabled() or engine.bfloat16_enabled()
    wanted = {
        PACKED: any(group["state"] != "fp32" for group in optimizer.param_groups),
        UNSCALED: stage == 0 and half,
        UNIVERSAL: stage == 3 and engine.load_universal_checkpoint(),
    }
    return next(
        (
            f"DeepSpeed {_version()} has no {method}, without which BalancedAdam does not take {need}; it was tested "
            f"with DeepSpeed {TESTED_DEEPSPEED}."
            for need, method in _lacking.items()
            if wanted[need]
        ),
        None,
    )


def _version() -> str:
    """DeepSpeed's, also while it is being imported."""
    try:
        return getattr(sys.modules.get("deepspeed"), "__version__", None) or version("deepspeed")
    except PackageNotFoundError:
        return "of unknown version"


def set_name() -> None:
    """Make ``torch.optim.BalancedAdam`` our class, which is how DeepSpeed finds optimizers that are not its own.

    Raises:
        RuntimeError: if another class has that name.
    """
    if getattr(torch.optim, NAME, BalancedAdam) is not BalancedAdam:
        raise RuntimeError(f"torch.optim.{NAME} is another class already; only one can have the name.")
    setattr(torch.optim, NAME, BalancedAdam)


def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace method ``name`` by ``wrapper(original, self, ...)`` for wrappers of BalancedAdam; once, however often
    called."""
    original = getattr(cls, name)
    if getattr(original, "balanced_adam_patched", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.optimizer, BalancedAdam):
            return wrapper(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    method.balanced_adam_patched = True  # type: ignore[attr-defined]
    setattr(cls, name, method)


def _no_initialization_step(original: Callable[..., None], self: Any) -> None:
    # Up to DeepSpeed 0.18 the wrapper doesn't know its dtype.
    if getattr(self, "low_precision_dtype", self.fp16_groups[0][0].dtype) == torch.float16:
        raise ValueError(
            "zero_optimization.stage is 0 with fp16.enabled: DeepSpeed divides these gradients by a loss scale that it "
            "never multiplied the loss by; use bf16, or stage 1, 2 or 3."
        )


def _settings_per_group(original: Callable[..., None], self: Any, checkpoint_dir: str, *shapes: Any) -> None:
    if shapes and len(self.fp32_partitioned_groups_flat) > 1:  # up to DeepSpeed 0.17 it asks for the shapes
        raise RuntimeError(
            f"DeepSpeed {_version()} loads a universal checkpoint at stage 3 into a single sub-group, and this model "
            f"has {len(self.fp32_partitioned_groups_flat)}; use DeepSpeed 0.18 or later, or stage 1 or 2."
        )

    def load(self: Any, checkpoint_dir: str) -> None:
        original(self, checkpoint_dir, *shapes)
        # The file that DeepSpeed itself has just unpickled; it holds settings and step counts, no moments.
        saved = torch.load(Path(checkpoint_dir) / "zero" / "optimizer_state.pt", weights_only=False)
        groups = saved["optimizer_state_dict"]["param_groups"]
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.pop(bias_correction.GROUP_KEY, None)  # of the first group
            group.update({key: value for key, value in settings.items() if key != "params"})

    packed_state.keep_formats(load, self, checkpoint_dir)
