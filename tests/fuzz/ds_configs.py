"""ds_configs: the shipped ones, with keys of DeepSpeed's documentation at right and at wrong values.

What is accepted says only *how* a run is computed. So it has to give the losses of the plain configuration, which
``train`` sees to.
"""

from __future__ import annotations

import copy
import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from tests.fuzz.outcome import Outcome, attempt
from train.common.command_line import parse
from train.common.errors import ConfigError
from train.common.files import REPOSITORY
from train.distributed.launch import join
from train.run import deepspeed_config
from train.run.config import Run
from train.run.engine import initialize

NO_BOOL: list[Any] = ["maybe", 2, 0.5, [True], {"a": 1}]
NO_STRICT_BOOL: list[Any] = ["false", "true", 1, 0, [], *NO_BOOL]
NO_COUNT: list[Any] = [-1, "x", [1], {"a": 1}, float("nan"), 10.5]
SECTIONS: list[Any] = [True, 1, "x", [], [1]]
Values = tuple[list[Any], list[Any]]
"""Right ones, and wrong ones."""
TOP = [
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "memory_breakdown",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
]
ZERO = [
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
]
ANY_STAGE: dict[str, Values] = {
    **{key: ([True, False], NO_STRICT_BOOL) for key in TOP},
    **{f"zero_optimization.{key}": ([True, False], NO_BOOL) for key in ZERO},
    **{
        f"zero_optimization.{key}": ([1000, 5e8, 200_000], NO_COUNT)
        for key in ("reduce_bucket_size", "allgather_bucket_size")
    },
    "zero_optimization": ([], SECTIONS),
    "zero_optimization.legacy_stage1": ([False], [True]),
    "zero_optimization.stage": ([], [4, -1, "1", 1.5, True, None, "three"]),
    "zero_optimization.zero_quantized_weights": ([False], [True]),
    "zero_optimization.offload_optimizer.ratio": ([], [0.5, -1, "x", 2]),
    "zero_optimization.offload_optimizer.device": ([], ["nvme", "gpu", 1, "CPU "]),
    "zero_optimization.zenflow": ([], [{"topk_ratio": 0.1}]),
    "optimizer": ([], SECTIONS),
    "optimizer.type": (["BalancedAdam", "balancedadam"], ["AdamW", "Adam", 1, None, ["BalancedAdam"], "BalancedAdam "]),
    "optimizer.params": ([{}], SECTIONS),
    "optimizer.params.lr": (["auto", 1e-3], [2e-3, "1e-3", -1, True, [1e-3]]),
    "optimizer.params.betas": (["auto", 0.95, [0.95, 0.95]], [0.9, [0.9, 0.999], "0.95", [0.95], True, {"a": 1}]),
    "optimizer.params.eps": (["auto", 1e-8], [1e-6, "1e-8", None]),
    "optimizer.params.weight_decay": (["auto", 0.1], [0, "0.1", True]),
    "optimizer.params.variant": (["auto", "adam"], ["adamd", "nadam", 1]),
    "optimizer.params.state": (["auto", "fp32"], ["packed16", 32, True]),
    "optimizer.params.fused": ([True, False, None], ["true", 1, 0, []]),
    "optimizer.params.fused_zero": ([True, False], ["false", 0, None]),
    "optimizer.params.adam_w_mode": ([True], [False, "true", 1]),
    "optimizer.params.amsgrad": ([False], [True, 0, "false"]),
    "optimizer.params.momentum": ([], [0.9]),
    "bf16": ([{"enabled": False}, {}], SECTIONS),
    "bf16.enabled": ([False, "auto"], ["yes", 1, 0, None, "false"]),
    # On a processor that computes in fp16, it is wrong at stage 0 alone.
    "fp16.enabled": ([False, "auto"], ["yes", 1, None, *([] if get_accelerator().is_fp16_supported() else [True])]),
    "gradient_clipping": (["auto", 1.0, 1], [0.5, "1.0", -1, True, None, [1.0]]),
    "train_batch_size": (["auto", 4], [8, "4", 0, -4, None, 4.5, True]),
    "train_micro_batch_size_per_gpu": (["auto", 2], [4, "2", 0, None, True]),
    "gradient_accumulation_steps": (["auto", 2], [1, "2", 0, None, True]),
    "steps_per_print": ([1, 10, 2e3, None], [0, -1, 1.5, "10", True, [1]]),
    "prescale_gradients": ([False], NO_STRICT_BOOL),
    "gradient_predivide_factor": ([1], [0, -1, "2", True, None, float("inf")]),
    "communication_data_type": (["fp32", "FP32", None], ["fp64", 32, True, {"a": 1}]),
    "seq_parallel_communication_data_type": (["fp32"], ["fp8", 1, []]),
    "gradient_allreduce_op": (["mean"], ["sum", "avg", 1, None]),
    "managed_gradient_accumulation": ([True], [False, "true", 0, None]),
    "data_types": ([{}], SECTIONS),
    "data_types.grad_accum_dtype": (["fp32", None], ["fp64", 32, True, ["fp32"], "FP"]),
    "data_types.param_dtype": (["fp32", None], ["bf16", "fp16", 16, "x"]),
    "checkpoint": ([{}], SECTIONS),
    "checkpoint.tag_validation": (["Ignore", "WARN", "fail"], ["never", 1, True, None]),
    "checkpoint.load_universal": ([False], [True, "yes", 1]),
    "checkpoint.use_node_local_storage": ([False], [True, 1]),
    "checkpoint.writer": ([None], [{"type": "FAST"}, {}, {"decoupled": False}]),
    "checkpoint.parallel_write": ([{}, {"pipeline_stage": False}], [{"pipeline_stage": True}]),
    **{
        key: ([{"enabled": False}, {}], SECTIONS)
        for key in ("comms_logger", "csv_monitor", "flops_profiler", "tensorboard", "wandb")
    },
    "timers": ([{}], SECTIONS),
    "flops_profiler.profile_step": ([1, 5], [0, "x", 1.5, [1]]),
    "torch_autocast.enabled": ([False], [True, "false", 1]),
    "timers.throughput.enabled": ([True, False], ["maybe", 2, []]),
    "comms_logger.enabled": ([False], ["maybe", 2, []]),
    "tensorboard.enabled": ([False], ["maybe", 3, []]),
    "csv_monitor.enabled": ([False], ["maybe", 3, []]),
    "wandb.enabled": ([False], [True, "maybe"]),
    "comet.enabled": ([False], [True]),
    "log_level": (["warning", "ERROR"], ["loud", 3, True]),
    "vocabulary_size": ([1000], ["x", -1, 0, 1.5, True]),
    "scheduler": ([], [{"type": "WarmupLR"}, {}, None, "auto"]),
    "hybrid_engine.enabled": ([False], [True]),
    "tensor_parallel.autotp_size": ([0, 1], [2, "2"]),
    "expert_parallel.enabled": ([False], [True]),
    "compile.deepcompile": ([False], [True]),
    "compile.passes": ([None], [["z3"]]),
    "data_efficiency.enabled": ([False], [True, "true"]),
    "data_efficiency.data_routing": ([{}], [{"random_ltd": {"enabled": True}}]),
    "sequence_parallel_size": ([], [1, 2]),
    "activation_checkpointing.partition_activations": ([False], [True]),
    "amp.enabled": ([], [True, 1]),
    "autotuning.enabled": ([False], [True]),
    "eigenvalue.enabled": ([], [True]),
    "compression_training": ([], [{"layer_reduction": {"enabled": True}}]),
    "sparse_gradients": ([], [True]),
    "elasticity": ([], [{"enabled": True}]),
    "_comment": (["a note", 1, {"a": "b"}, "auto", {"a": "auto"}], []),
    "aio": ([{"thread_count": 1, "block_size": 1048576}, {}], SECTIONS),
}
STAGE_3: dict[str, Values] = {
    **{
        f"zero_optimization.{key}": ([0, 1000, 1e9], NO_COUNT)
        for key in (
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
        )
    },
    "zero_optimization.sub_group_size": ([1000, 1e9], NO_COUNT),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": ([True, False], NO_BOOL),
    "zero_optimization.offload_param.device": (["none", "cpu"], ["nvme", "disk", 1]),
    "zero_optimization.zero_hpz_partition_size": (["auto", 0, 1, 1.0], [2, True, "1", *NO_COUNT]),
}


@cache
def shipped() -> list[tuple[str, dict[str, Any]]]:
    """The ds_configs that this project comes with."""
    files = sorted((REPOSITORY / "ds_configs").glob("zero*.json"))
    return [(file.name, json.loads(file.read_text())) for file in files]


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by its dotted name."""
    *sections, last = key.split(".")
    for name in sections:
        config = config.setdefault(name, {})
    config[last] = copy.deepcopy(value)


def misspelt(draw: random.Random, name: str) -> str:
    """The name with two letters exchanged, one left out or one doubled."""
    place = draw.randrange(len(name))
    changed = draw.choice([name[:place] + name[place + 1 :], name[:place] + name[place] + name[place:]])
    return changed if changed not in (name, "adamw_mode") else name + "s"  # DeepSpeed has both


def drawn(draw: random.Random) -> tuple[dict[str, Any], bool, str]:
    """A ds_config, whether it is wrong, and the key that is."""
    _, base = draw.choice(shipped())
    config = copy.deepcopy(base)
    table = ANY_STAGE | (STAGE_3 if config["zero_optimization"]["stage"] == 3 else {})
    for key in draw.sample([key for key, (right, _) in table.items() if right and "." not in key], 2):
        put(config, key, draw.choice(table[key][0]))
    key = draw.choice(sorted(table))
    right, wrong = table[key]
    how = draw.random()
    if how < 0.2 and right and not key.startswith("_"):
        *sections, last = key.split(".")
        name = ".".join([*sections, misspelt(draw, last)])
        put(config, name, draw.choice(right))
        return config, True, name
    is_wrong = bool(wrong) and (how < 0.75 or not right)
    try:
        put(config, key, draw.choice(wrong if is_wrong else right))
    except TypeError:  # the section is a weird value
        return base, False, ""
    return config, is_wrong, key


def resolve(run: Run, file: Path, config: Any) -> None:
    """Read the ds_config as a run on one rank does."""
    file.write_text(json.dumps(config))
    deepspeed_config.resolve(run, 1, False)


def outcome(seed: int, run: Run) -> Outcome:
    """Of one drawn ds_config, which is written to the file that ``run`` names: a run of two micro-batches of two."""
    config, wrong, key = drawn(random.Random(seed))
    file = run.parallelism.ds_config
    return attempt(json.dumps(config), lambda: resolve(run, file, config), (ConfigError,), wrong, key)


def without_batches(config: dict[str, Any]) -> dict[str, Any]:
    """Without the sizes that go with a number of ranks."""
    ours = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: value for key, value in config.items() if key not in ours}


def losses(argument: tuple[list[str], Path, list[dict[str, Any]]]) -> list[list[float | None] | str]:
    """Job: the losses of three steps under each of these ds_configs, or what was raised."""
    options, folder, configs = argument
    file = folder / f"ds-{os.environ['RANK']}.json"
    run = parse(Run, [*options, "--ds-config", str(file)], "train.pretrain", None)
    world = int(os.environ["WORLD_SIZE"])
    found: list[list[float | None] | str] = []
    for config in configs:
        file.write_text(json.dumps(config))
        try:
            resolved = deepspeed_config.resolve(run, world, False)
            trainer = initialize(run, join(60.0), resolved)
            found.append([trainer.train_step()["loss"] for _ in range(3)])
            trainer.engine.destroy()
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once a process
        except Exception as error:  # also of DeepSpeed
            found.append(f"{error!r:.300}")
    return found
