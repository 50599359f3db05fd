"""A ds_config file, read strictly, with every "auto" filled in from the settings and every contradiction refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.settings import Run, SettingsError, require

OPTIMIZER = "BalancedAdam"


def load(path: Path) -> dict[str, Any]:
    """Read a ds_config file.

    Raises:
        SettingsError: if there is no such file, it isn't a JSON object, or an object holds a key twice.
    """
    require(path.is_file(), f"ds_config is {path}, which is not a file; give one of ds_configs/*.json or your own.")
    try:
        config = json.loads(path.read_text(), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise SettingsError(f"ds_config {path} is not JSON: {error}.") from None
    require(isinstance(config, dict), f"ds_config {path} is a JSON {type(config).__name__}; it must be an object.")
    return config


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    require(not twice, f"ds_config {path} has the key {', '.join(map(repr, twice))} twice; keep one.")
    return dict(pairs)


def resolve(run: Run, world: int, gpus: bool) -> dict[str, Any]:
    """The configuration that ``deepspeed.initialize`` gets: the file's, completed by the settings.

    Args:
        run: the settings, already checked.
        world: number of ranks.
        gpus: whether the ranks run on GPUs, which decides bf16 where nobody else does.

    Raises:
        SettingsError: where the file and the settings contradict each other, or DeepSpeed refuses the outcome.
    """
    path = run.parallelism.ds_config
    config = load(path)
    micro = run.parallelism.micro_batch_on(world)
    optimizer = config.setdefault("optimizer", {})
    name = optimizer.setdefault("type", OPTIMIZER)
    require(
        name == OPTIMIZER,
        f"ds_config {path} names the optimizer {name!r}; it must be {OPTIMIZER!r} (any betas, with --allow-unbalanced).",
    )
    require(
        "scheduler" not in config,
        f"ds_config {path} has a scheduler, which would fight with --schedule {run.schedule.schedule}; remove it there.",
    )
    logging = run.logging
    monitor = {"output_path": str(run.out), "job_name": "monitor"}
    if logging.tensorboard:
        config["tensorboard"] = {"enabled": True, **monitor}
    if logging.csv:
        config["csv_monitor"] = {"enabled": True, **monitor}
    if logging.wandb:
        config["wandb"] = {"enabled": True, "project": logging.wandb, "group": run.out.parent.name}

    wanted = [
        (config, "train_batch_size", run.parallelism.batch, "batch"),
        (config, "train_micro_batch_size_per_gpu", micro, "micro_batch"),
        (
            config,
            "gradient_accumulation_steps",
            run.parallelism.batch // (micro * world),
            "batch / (ranks x micro_batch)",
        ),
        (config, "gradient_clipping", run.optimizer.clip, "clip"),
    ]
    params = optimizer.setdefault("params", {})
    unknown = set(params) - set(run.optimizer.parameters())
    require(
        not unknown,
        f"ds_config {path} has optimizer.params.{min(unknown, default='')}, which {OPTIMIZER} does not have.",
    )
    wanted += [(params, key, value, key) for key, value in run.optimizer.parameters().items()]
    for section, key, value, flag in wanted:
        _fill(section, key, value, flag, path)
    bf16 = config.setdefault("bf16", {"enabled": "auto"})
    fp16 = config.get("fp16", {}).get("enabled") is True
    precision = run.parallelism.precision
    enabled = gpus and not fp16 if precision == "auto" else precision == "bf16"
    if bf16.setdefault("enabled", "auto") == "auto":
        bf16["enabled"] = enabled
    require(
        precision == "auto" or (bf16["enabled"] is enabled and not fp16),
        f"ds_config {path} has bf16.enabled = {json.dumps(bf16['enabled'])} and fp16.enabled = {json.dumps(fp16)}, but "
        f"precision is {precision}; make them agree.",
    )
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    require(
        not (fp16 and stage == 0),
        f"ds_config {path} has fp16 at stage 0, where DeepSpeed never scales the loss; use bf16, or stage 1, 2 or 3.",
    )
    left = next(_autos(config), None)
    require(
        left is None, f'ds_config {path} has {left} "auto", which only Transformers\' Trainer fills in; give a value.'
    )
    _validate(config, path)
    return config


def _fill(section: dict[str, Any], key: str, value: Any, flag: str, path: Path) -> None:
    """Set ``section[key]`` where it is missing or "auto"; refuse another value."""
    present = section.get(key, "auto")
    if key == "betas" and isinstance(present, int | float) and not isinstance(present, bool):
        present = [present, present]
    if present == "auto":
        section[key] = value
        return
    require(
        type(present) in (type(value), int, float) and present == value,
        f'ds_config {path} has {key} = {json.dumps(present)}, but {flag} is {json.dumps(value)}; make them equal, or write "auto".',
    )


def _autos(node: Any, name: str = "") -> Any:
    """The names of all values that still are "auto"."""
    if node == "auto":
        yield name
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _autos(value, f"{name}.{key}".lstrip("."))


def _validate(config: dict[str, Any], path: Path) -> None:
    """Have DeepSpeed's own models look at the sections that people write by hand."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise SettingsError(f"ds_config {path} has {where} = {first['input']!r}: {first['msg']}.") from None
