"""Read a ds_config file strictly, fill in every "auto" from the run's options and reject contradictions."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterable, Iterator, KeysView
from pathlib import Path
from typing import Any, cast

from balanced_adam.arguments import LEFT_OVER, check_left_over
from train.common.errors import ConfigError, first_line, require
from train.run import ds_schema, optimizers
from train.run.config import Run

BALANCED = "BalancedAdam"
PATHS = {"fused", "fused_zero"}  # optimizer parameters that choose how the step is computed, not its result


def layout(ds_config: dict[str, Any], world: int) -> dict[str, Any]:
    """Return the properties that must be equal for DeepSpeed to load a checkpoint without conversion."""
    accumulation = ds_config.get("data_types", {}).get("grad_accum_dtype")
    zero = ds_config["zero_optimization"]
    return {
        "world": world,
        "stage": zero["stage"],
        "dtype": ds_schema.dtype(ds_config),
        "accumulation": accumulation,
        "round_robin": zero["stage"] in (1, 2) and bool(zero.get("round_robin_gradients")),
    }


def load(path: Path) -> dict[str, Any]:
    """Read a ds_config file.

    Raises:
        ConfigError: if there is no such file, it isn't a JSON object, or an object in it has a key twice.
    """
    require(path.is_file(), f"ds_config is {path}, which is not a file; give one of ds_configs/*.json or your own.")
    try:
        config = json.loads(path.read_text("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"ds_config {path} is not JSON: {error}.") from None
    require(isinstance(config, dict), f"ds_config {path} is a JSON {type(config).__name__}; it must be an object.")
    return config


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    require(not twice, f"ds_config {path} has the key {', '.join(map(repr, twice))} twice; keep one.")
    return dict(pairs)


def resolve(run: Run, world: int, gpus: bool) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``: the file's, completed from the run's options.

    Args:
        run: the options, already checked.
        world: number of ranks.
        gpus: whether the ranks run on GPUs. This decides bf16 if neither the file nor the options do.

    Raises:
        ConfigError: if the file and the options contradict each other, or DeepSpeed rejects the result.
    """
    path = run.parallelism.ds_config
    config = load(path)
    require("bfloat16" not in config, f"ds_config {path} has 'bfloat16'; write 'bf16', its newer name.")
    optimizer, zero, bf16, fp16 = (
        _section(config, n, path) for n in ("optimizer", "zero_optimization", "bf16", "fp16")
    )
    params = _section(optimizer, "params", path, "optimizer.")
    micro = run.parallelism.micro_batch_on(world)
    _check_optimizer(config, optimizer, run, path)
    _set_monitors(config, run)
    own = run.parameters()
    try:
        check_left_over(params)
    except ValueError as error:
        raise ConfigError(f"ds_config {path}: optimizer.params.{error}") from None
    name = run.optimizer.optimizer
    useless = PATHS & set(params) if optimizers.is_foreign(name) or params.get("fused") else set[str]()
    require(
        optimizers.has_kernels(name) or not useless,
        f"ds_config {path} has optimizer.params.{min(useless, default='')}, and {name} has no kernels; remove it.",
    )
    if params.get("eps") == "auto" and "eps" not in own:  # which not every optimizer takes
        del params["eps"]
    unknown = set(params) - set(own) - PATHS - LEFT_OVER.keys()
    first = min(unknown, default="")
    require(
        first not in optimizers.left_at_defaults(name),
        f"ds_config {path} has optimizer.params.{first}, and --optimizer {name} has its default; remove it.",
    )
    require(
        not unknown,
        f"ds_config {path} has optimizer.params.{first}, which {optimizer['type']} does not have"
        f"{_meant(first, own.keys() | PATHS)}",
    )
    accumulation = run.parallelism.batch // (micro * world)
    _fill(config, "train_batch_size", run.parallelism.batch, "batch", path)
    _fill(config, "train_micro_batch_size_per_gpu", micro, "micro_batch", path)
    _fill(config, "gradient_accumulation_steps", accumulation, "batch / (ranks x micro_batch)", path)
    _fill(config, "gradient_clipping", run.optimizer.clip, "clip", path)
    for key, value in own.items():
        _fill(params, key, value, key, path, "optimizer.params.")
    in_fp16 = _resolve_precision(bf16, fp16, run.parallelism.precision, gpus, path)
    _check_zero(config, zero, in_fp16, path)
    dtype = ds_schema.dtype(config)
    require(
        not optimizers.is_foreign(name) or dtype == "fp32" or zero.get("stage", 0) != 0,
        f"optimizer is {name!r}, and ds_config {path} is stage 0 in {dtype}, where DeepSpeed takes a step of it before "
        "the first gradient; use stage 1, 2 or 3.",
    )
    if left := next(_autos(config), None):
        known = _parsed({key: value for key, value in config.items() if not any(_autos(value))}, path).asked
        key = left.split(".")[0]
        require(key in known, f"ds_config {path} has {key!r}, which DeepSpeed does not know{_meant(key, known)}")
        raise ConfigError(
            f'ds_config {path} has {left} = "auto", which only Transformers\' Trainer fills in; give a value.'
        )
    here = getattr(run, "ranks", None) is None  # train.preflight --ranks may check for other machines
    ds_schema.check(config, path, world, gpus, here)
    _validate(config, path)
    from deepspeed.accelerator import get_accelerator

    require(
        not (in_fp16 and here) or get_accelerator().is_fp16_supported(),
        f"ds_config {path} has fp16.enabled = true, and this processor computes in no fp16; use bf16.",
    )
    return config


def _check_optimizer(config: dict[str, Any], optimizer: dict[str, Any], run: Run, path: Path) -> None:
    """Set the optimizer's type to that of the run. The file may name BalancedAdam, as those in ds_configs/ do.

    Raises:
        ConfigError: if the file names another optimizer, or has a scheduler.
    """
    name = run.optimizer.optimizer
    foreign = optimizers.is_foreign(name)
    wanted = name.partition(":")[2] if foreign else optimizers.OWN[name][0]
    given = optimizer.get("type", BALANCED)
    require(
        isinstance(given, str) and given.lower() in (wanted.lower(), BALANCED.lower()),
        f"ds_config {path} has optimizer.type = {json.dumps(given)}; it must be {json.dumps(wanted)} "
        "(which is AdamW with --allow-unbalanced); --optimizer takes others."
        if wanted == BALANCED
        else f"ds_config {path} has optimizer.type = {json.dumps(given)}, and --optimizer is {name}; make them agree.",
    )
    optimizer["type"] = wanted
    require(
        "scheduler" not in config,
        f"ds_config {path} has a scheduler, which conflicts with --schedule {run.schedule.schedule}; remove it there.",
    )
    if foreign:
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)


def _set_monitors(config: dict[str, Any], run: Run) -> None:
    """Enable DeepSpeed's monitors as the logging options say. A dry run writes nothing, so it has none."""
    if run.dry_run:
        for name in ("tensorboard", "csv_monitor", "wandb", "comet"):
            config.pop(name, None)
        return
    for name in ("tensorboard", "csv_monitor"):
        if isinstance(section := config.get(name), dict):  # a relative path is one in the run's folder
            section["output_path"] = str(run.out / str(section.get("output_path") or ""))
    monitor = {"output_path": str(run.out), "job_name": "monitor"}
    if run.logging.tensorboard:
        config["tensorboard"] = {"enabled": True, **monitor}
    if run.logging.csv:
        config["csv_monitor"] = {"enabled": True, **monitor}
    if run.logging.wandb:
        config["wandb"] = {"enabled": True, "project": run.logging.wandb, "group": run.out.parent.name}


def _resolve_precision(bf16: dict[str, Any], fp16: dict[str, Any], precision: str, gpus: bool, path: Path) -> bool:
    """Resolve ``enabled`` of the sections bf16 and fp16, and return whether the run computes in fp16.

    Raises:
        ConfigError: if a value is neither a boolean nor "auto", or the sections contradict ``precision``.
    """
    for section, section_name in ((bf16, "bf16"), (fp16, "fp16")):
        enabled = section.get("enabled", "auto")
        require(
            isinstance(enabled, bool) or enabled == "auto",
            f'ds_config {path} has {section_name}.enabled = {json.dumps(enabled)}; it must be true, false or "auto".',
        )
    in_fp16 = fp16.get("enabled") is True
    if "enabled" in fp16 and not in_fp16:
        fp16["enabled"] = False
    wanted_bf16 = gpus and not in_fp16 if precision == "auto" else precision == "bf16"
    if bf16.setdefault("enabled", "auto") == "auto":
        bf16["enabled"] = wanted_bf16
    require(
        precision == "auto" or (bf16["enabled"] is wanted_bf16 and not in_fp16),
        f"ds_config {path} has bf16.enabled = {json.dumps(bf16['enabled'])} and "
        f"fp16.enabled = {json.dumps(in_fp16)}, but precision is {precision}; make them agree.",
    )
    return in_fp16


def _check_zero(config: dict[str, Any], zero: dict[str, Any], in_fp16: bool, path: Path) -> None:
    """Set the ZeRO stage to 0 if it is missing, and ZeRO++'s secondary partition to the ranks of this host if "auto".

    Raises:
        ConfigError: if the stage is invalid, or something is asked for that DeepSpeed does not do at this stage.
    """
    stage = zero.setdefault("stage", 0)
    require(
        type(stage) is int and 0 <= stage <= 3,
        f"ds_config {path} has zero_optimization.stage = {json.dumps(stage)}; it must be 0, 1, 2 or 3.",
    )
    require(
        not (in_fp16 and stage == 0),
        f"ds_config {path} has fp16 at stage 0, where DeepSpeed never scales the loss; use bf16, or stage 1, 2 or 3.",
    )
    if zero.get("zero_hpz_partition_size") == "auto":  # the ranks of a host hold the weights once more
        zero["zero_hpz_partition_size"] = int(os.environ.get("LOCAL_SIZE", "1"))
    offload = zero.get("offload_optimizer")
    require(
        stage > 0 or not isinstance(offload, dict) or offload.get("device", "none") == "none",
        f"ds_config {path} has zero_optimization.offload_optimizer at stage 0, where DeepSpeed offloads nothing; "
        "use stage 1, 2 or 3.",
    )
    for key, without in (("prescale_gradients", (None, False)), ("gradient_predivide_factor", (None, 1))):
        require(
            stage < 2 or zero.get("reduce_scatter") is False or config.get(key) in without,
            f"ds_config {path} has {key} = {json.dumps(config.get(key))} at stage {stage}, where DeepSpeed scales "
            f"gradients only with reduce_scatter = false; remove {key}.",
        )


def _fill(section: dict[str, Any], key: str, value: Any, flag: str, path: Path, within: str = "") -> None:
    """Set ``section[key]`` to ``value`` if it is missing or "auto"; ``within`` is the section's name and a dot.

    Raises:
        ConfigError: if the file has another value there; it names the option, ``flag``.
    """
    present = section.get(key, "auto")
    if key == "betas" and isinstance(present, int | float) and not isinstance(present, bool):
        present = [present, present]
    if present == "auto":
        section[key] = value
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        not number or type(present) in (int, float),
        f'ds_config {path} has {within}{key} = {json.dumps(present)}; it must be {json.dumps(value)}, or "auto".',
    )
    require(
        type(present) in (type(value), int, float) and present == value,
        f"ds_config {path} has {within}{key} = {json.dumps(present)}, but {flag} is {json.dumps(value)}; "
        'make them equal, or write "auto".',
    )


def _autos(node: Any, name: str = "") -> Any:
    """Yield the dotted names of all values that are still "auto"."""
    if node == "auto":
        yield name
    elif isinstance(node, dict):
        for key, value in node.items():
            if key.startswith("_"):
                continue  # a comment
            yield from _autos(value, f"{name}.{key}".lstrip("."))


def _section(config: dict[str, Any], name: str, path: Path, within: str = "") -> dict[str, Any]:
    """Return the object ``config[name]``, creating it if it is missing; ``within`` is as for :func:`_fill`.

    Raises:
        ConfigError: if the value is not an object.
    """
    section = config.setdefault(name, {})
    require(
        isinstance(section, dict),
        f"ds_config {path} has {within}{name} = {json.dumps(section)}; it must be an object, as in ds_configs/*.json.",
    )
    return cast("dict[str, Any]", section)


class _AccessRecorder(dict[str, Any]):
    """A dict that records which keys were looked up, in itself and in the dicts in it.

    What goes through all keys, as a pydantic model that is built from it does, looks up each.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({k: _AccessRecorder(v) if isinstance(v, dict) else v for k, v in content.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.asked.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        return KeysView(self)

    def unknown(self) -> tuple[str, set[str]]:
        """Return the dotted name of a key that was not looked up, empty if there is none, and what was in its section.

        A section that is off may have any keys, one in which nothing was looked up is a pydantic model's, and a key
        that begins with "_" is a comment.
        """
        for key, value in super().items():
            if key.startswith("_") or key == "aio":  # of offload to disks, which there is none of here
                continue
            if key not in self.asked:
                return key, self.asked
            if isinstance(value, _AccessRecorder) and value.asked and dict.get(value, "enabled") is not False:
                name, asked = value.unknown()
                if name:
                    return f"{key}.{name}", asked
        return "", set()


def _validate(config: dict[str, Any], path: Path) -> None:
    """Have DeepSpeed parse the configuration, and reject keys that it never looks up.

    Raises:
        ConfigError: if DeepSpeed rejects a value, or does not know a key.
    """
    unknown, known = _parsed(config, path).unknown()
    require(
        not unknown,
        f"ds_config {path} has {unknown!r}, which DeepSpeed does not know{_meant(unknown.split('.')[-1], known)}",
    )


def _parsed(config: dict[str, Any], path: Path) -> _AccessRecorder:
    """Have DeepSpeed parse the configuration, and return what it has looked up.

    Raises:
        ConfigError: if DeepSpeed rejects a value, or does not know a key of a section.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    # DeepSpeed assumes one rank here, so the batch size would not fit. The three batch sizes are checked already, as
    # are the optimizer's parameters.
    content = {key: value for key, value in copy.deepcopy(config).items() if key != "train_batch_size"}
    content["optimizer"] = {**content.get("optimizer", {}), "params": {}}
    recorder = _AccessRecorder(content)
    try:
        DeepSpeedConfig(recorder)
    except ValidationError as error:
        first = error.errors()[0]
        within = [str(each) for each in first["loc"]]
        where = _place(config, within, first["input"]) or ".".join(within) or "a section"
        require(
            first["type"] != "extra_forbidden",
            f"ds_config {path} has {where!r}, which DeepSpeed does not know; remove it.",
        )
        right = {"bool": "must be true or false", "int": "must be a whole number"}.get(first["type"].split("_")[0])
        why = f"it {right}" if right else f"DeepSpeed says: {first['msg']}"
        raise ConfigError(f"ds_config {path} has {where} = {json.dumps(first['input'])}; {why}.") from None
    except Exception as error:  # DeepSpeed raises errors of any class on a wrong value
        raise ConfigError(f"ds_config {path} is refused by DeepSpeed: {first_line(error)}") from None
    return recorder


def _meant(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown key: the one that is most like it, if there is one."""
    return next((f"; did you mean {each!r}?" for each in difflib.get_close_matches(name, known, 1)), "; remove it.")


def _place(section: dict[str, Any], within: list[str], wrong: Any) -> str | None:
    """Return the dotted name of a value in a section, or in one in it, whose own names DeepSpeed alone tells."""
    value: Any = section
    missing = object()
    for name in within:
        value = value.get(name, missing) if isinstance(value, dict) else missing
    if value is not missing and json.dumps(value) == json.dumps(wrong):
        return ".".join(within)
    for name, content in section.items():
        if isinstance(content, dict) and (found := _place(content, within, wrong)):
            return f"{name}.{found}"
    return None
