"""What a ds_config may say beyond what DeepSpeed itself checks: values at which DeepSpeed would fail in the middle of a
run, and features that would be without effect here, or that need another program than this one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from train.common.errors import ConfigError, require

REMOVED = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zeropp_loco_param",
)
"""Keys that DeepSpeed refuses, whatever their value."""
UNSUPPORTED = {
    "activation_checkpointing": "it is for models that call DeepSpeed's checkpoint function; use "
    "--activation-checkpointing",
    "autotuning": "the deepspeed launcher would start other runs than this one",
    "checkpoint.load_universal": "a run converts and loads its checkpoints itself",
    "checkpoint.use_node_local_storage": "all ranks read and write one folder",
    "checkpoint.parallel_write": "the model is not cut into stages",
    "checkpoint.writer": "checkpoints are synced to disk before a run goes on",
    "compile": "DeepSpeed compiles only a model that its program asks it to; give --compile",
    "data_types.buffer_dtype": "--precision says in what it trains",
    "data_efficiency": "the order of the text is the run's own; give --data a mixture",
    "data_parallel_size": "every rank is one of the data-parallel ranks",
    "datastates_ckpt": "checkpoints are synced to disk before a run goes on",
    "expert_parallel": "every rank holds the same experts",
    "hybrid_engine": "it only trains, and generates nothing",
    "pipeline": "the model is not cut into stages",
    "sequence_parallel_size": "every rank reads whole sequences; --activation-checkpointing makes room for long ones",
    "tensor_parallel": "every rank holds whole tensors, or ZeRO's partitions; use stage 3",
    "torch_autocast": "--precision says in what it trains",
    "weight_quantization": "it quantizes nothing",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.offload_optimizer.super_offload": "it replaces the optimizer by DeepSpeed's own",
    "zero_optimization.zenflow": "it replaces the optimizer by DeepSpeed's own",
}
"""Features, and why train.pretrain has none of them."""
OFF_UNLESS = {
    **dict.fromkeys(("autotuning", "expert_parallel", "hybrid_engine"), ("enabled",)),
    **dict.fromkeys(("comet", "tensorboard", "torch_autocast", "wandb"), ("enabled",)),
    "compile": ("enabled", "deepcompile", "backend", "passes"),
    "data_efficiency": (
        "enabled",
        "data_routing.enabled",
        "data_routing.random_ltd.enabled",
        "data_sampling.enabled",
        "data_sampling.curriculum_learning.enabled",
        "data_sampling.dynamic_batching.enabled",
    ),
    "tensor_parallel": ("autotp_size", "tp.tp_size", "partition_config", "preset_model"),
}
"""Sections that DeepSpeed leaves off unless one of these keys says otherwise; a size of 1 does not."""
ON_GPUS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
"""Parts of ZeRO++ whose kernels are CUDA's."""


def _whole(value: Any) -> Any:
    """JSON has 2e3 for 2000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[PositiveInt, BeforeValidator(_whole)]
DType = Literal["fp32", "float32", "float", "fp16", "float16", "half", "bf16", "bfloat16"]
"""The names that DeepSpeed has."""
LOWER = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
Short = Annotated[Literal["fp32", "fp16", "bf16"], LOWER]


class _Section(BaseModel):
    """Part of a ds_config. DeepSpeed knows more keys than these."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Parameters(_Section):
    fused: bool | None = None
    fused_zero: bool = True


class _Optimizer(_Section):
    params: _Parameters = _Parameters()


class _DataTypes(_Section):
    grad_accum_dtype: DType | None = None
    param_dtype: DType | None = None


class _Offload(_Section):
    device: Literal["none", "cpu"] | None = None
    ratio: Annotated[FiniteFloat, Field(ge=1, le=1)] = 1.0


class _Zero(_Section):
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    zero_hpz_partition_size: Annotated[int, Field(ge=0), BeforeValidator(_whole)] = 1


class _FlopsProfiler(_Section):
    enabled: bool = False
    detailed: bool = True
    profile_step: Count = 1
    top_modules: Count = 1
    module_depth: int = -1
    output_file: str | None = None


class _Checkpoint(_Section):
    tag_validation: Annotated[str, Field(pattern="^(?i:ignore|warn|fail)$")] = "Warn"


class _DsConfig(_Section):
    aio: _Section = _Section()
    comet: _Section = _Section()
    comms_logger: _Section = _Section()
    csv_monitor: _Section = _Section()
    flops_profiler: _FlopsProfiler = _FlopsProfiler()
    tensorboard: _Section = _Section()
    timers: _Section = _Section()
    wandb: _Section = _Section()
    checkpoint: _Checkpoint = _Checkpoint()
    communication_data_type: Short | None = None
    seq_parallel_communication_data_type: Short | None = None
    dataloader_drop_last: bool | None = None
    disable_allgather: bool | None = None
    disable_python_gc: bool | None = None
    dump_state: bool | None = None
    memory_breakdown: bool | None = None
    prescale_gradients: bool | None = None
    use_data_before_expert_parallelism: bool | None = None
    wall_clock_breakdown: bool | None = None
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None
    gradient_allreduce_op: Literal["mean"] = "mean"
    managed_gradient_accumulation: Literal[True] = True
    vocabulary_size: Count | None = None
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], LOWER] | None = None
    steps_per_print: Count | None = None
    gradient_predivide_factor: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    optimizer: _Optimizer = _Optimizer()
    data_types: _DataTypes = _DataTypes()
    zero_optimization: _Zero = _Zero()


DTYPES = 'it must be "fp32", "fp16" or "bf16"'
WHAT = {
    "steps_per_print": "it must be a whole number, at least 1",
    "gradient_predivide_factor": "it must be a number above 0",
    "optimizer.params.fused": "it must be true, false or null",
    "optimizer.params.fused_zero": "it must be true or false",
    "checkpoint.tag_validation": 'it must be "Ignore", "Warn" or "Fail"',
    "communication_data_type": DTYPES,
    "data_types.grad_accum_dtype": DTYPES,
    "data_types.param_dtype": DTYPES,
    "flops_profiler.profile_step": "it must be a whole number, at least 1",
    "flops_profiler.top_modules": "it must be a whole number, at least 1",
    "gradient_allreduce_op": 'the gradient is the mean over the batch on any number of ranks: it must be "mean"',
    "log_level": 'it must be "debug", "info", "warning", "error" or "critical"',
    "managed_gradient_accumulation": "micro-batches are accumulated by DeepSpeed: it must be true",
    "seq_parallel_communication_data_type": DTYPES,
    "vocabulary_size": "it must be a whole number, at least 1",
    "zero_optimization.offload_optimizer.device": 'the state goes to no disk: it must be "cpu" or "none"',
    "zero_optimization.offload_optimizer.ratio": "all of the state is offloaded, or none: it must be 1",
    "zero_optimization.offload_param.device": 'weights go to no disk: it must be "cpu" or "none"',
    "zero_optimization.zero_hpz_partition_size": 'it must be a number of ranks, or "auto"',
}
"""What would be right."""


def dtype(config: dict[str, Any]) -> str:
    """Return in what a ds_config computes: "bf16", "fp16" or "fp32"."""
    return next((name for name in ("bf16", "fp16") if _at(config, f"{name}.enabled")), "fp32")


def check(config: dict[str, Any], path: Path, world: int, gpus: bool, here: bool) -> None:
    """Check a ds_config in which no "auto" is left.

    Args:
        config: its content.
        path: the file, for the message.
        world: number of ranks.
        gpus: whether the ranks run on GPUs.
        here: whether they run on this machine, so that it has to have what they need.

    Raises:
        ConfigError: in one sentence that names the key, the value and what would be right.
    """
    for key in REMOVED:
        *sections, name = key.split(".")
        section = _at(config, ".".join(sections)) if sections else config
        require(name not in (section or ()), f"ds_config {path} has {key}, which DeepSpeed no longer has; remove it.")
    for key, reason in UNSUPPORTED.items():
        require(
            not _is_on(key, _at(config, key)),
            f"ds_config {path} has {key}, which train.pretrain does not support ({reason}); remove it.",
        )
    try:
        _DsConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        kinds = {"bool_type": "true or false", "int_type": "a whole number", "string_type": "text"}
        what = f"it must be {kinds.get(first['type'], 'an object')}"
        value, what = json.dumps(first["input"], default=str), WHAT.get(name, what)
        raise ConfigError(f"ds_config {path} has {name} = {value}; {what}.") from None
    _check_param_dtype(config, path)
    _check_secondary_partition(config["zero_optimization"], path, world)
    if not here:
        return
    for key in () if gpus else ON_GPUS:
        require(
            not _at(config, f"zero_optimization.{key}"),
            f"ds_config {path} has zero_optimization.{key}, which needs GPUs, and the ranks run on CPUs; remove it.",
        )
    for section, package in (("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")):
        require(
            not _is_on(section, _at(config, section)) or find_spec(package) is not None,
            f"ds_config {path} has {section}.enabled = true, and the package {package} is not installed; install it, "
            f"or remove {section}.",
        )


def _check_param_dtype(config: dict[str, Any], path: Path) -> None:
    """Check that the weights' format, where the file names it, is the one that the run trains in.

    Raises:
        ConfigError: if it is another.
    """
    mode = dtype(config)
    names = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
    given = _at(config, "data_types.param_dtype")
    require(
        given is None or names.get(given, given) == mode,
        f"ds_config {path} has data_types.param_dtype = {json.dumps(given)}, but the run trains in {mode}; "
        "make them agree, or remove it.",
    )


def _check_secondary_partition(zero: dict[str, Any], path: Path, world: int) -> None:
    """Check that the ranks fall into groups that hold the weights once more each: ZeRO++'s hpZ.

    Raises:
        ConfigError: if they don't, where DeepSpeed would take another size; or if the stage partitions no weights.
    """
    size = zero.get("zero_hpz_partition_size", 1)
    has = f"ds_config {path} has zero_optimization.zero_hpz_partition_size = {json.dumps(size)}"
    require(
        size <= 1 or zero["stage"] == 3,
        f"{has} at stage {zero['stage']}, where DeepSpeed partitions no weights; use stage 3, or remove it.",
    )
    require(
        size <= 1 or world % size == 0,
        f"{has} on {world} rank{'s' * (world > 1)}; it must divide their number, as that of the ranks on a host does.",
    )


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_on(key: str, value: Any) -> bool:
    """Whether a feature is asked for, where most are off unless they are enabled."""
    if key == "checkpoint.writer":  # DeepSpeed takes even an empty one for its fastest
        return value is not None
    if not isinstance(value, dict):
        return bool(value)
    if key in OFF_UNLESS:
        said = {name: _at(value, name) for name in OFF_UNLESS[key]}
        return any(bool(each) and not (name.endswith("size") and each == 1) for name, each in said.items())
    return any(_leaves(value))


def _leaves(value: Any) -> Iterator[bool]:
    for each in value.values() if isinstance(value, dict) else (value,):
        if isinstance(each, dict):
            yield from _leaves(each)
        else:
            yield bool(each)
