"""ds_configs: what is wrong in one is named in a sentence, and what asks for nothing that is lacking is accepted."""

import json
from pathlib import Path

import pytest

from tests.harness.conftest import Make
from train.checkpoint import resumable_run
from train.common.errors import ConfigError
from train.common.files import REPOSITORY
from train.run import deepspeed_config

DS_CONFIGS = [
    ("{", "is not JSON"),
    ("[]", "is a JSON list; it must be an object"),
    ('{"bf16": {"enabled": false}, "bf16": {"enabled": true}}', "has the key 'bf16' twice"),
    ('{"optimizer": {"type": "AdamW"}}', 'has optimizer.type = "AdamW"; it must be "BalancedAdam"'),
    ('{"optimizer": {"params": {"amsgrad": true}}}', "amsgrad is True, and BalancedAdam takes"),
    ('{"optimizer": {"params": {"adam_w_mode": false}}}', "adam_w_mode is False, and BalancedAdam takes"),
    ('{"optimizer": {"params": {"momentum": 0.9}}}', "has optimizer.params.momentum, which BalancedAdam does not have"),
    ('{"optimizer": {"params": {"fused": "yes"}}}', 'optimizer.params.fused = "yes"; it must be true, false or null'),
    ('{"optimizer": {"params": {"fused": 1}}}', "optimizer.params.fused = 1; it must be true, false or null"),
    ('{"optimizer": {"params": {"fused_zero": null}}}', "optimizer.params.fused_zero = null; it must be true or false"),
    ('{"steps_per_print": 0}', "steps_per_print = 0; it must be a whole number, at least 1"),
    ('{"steps_per_print": 1.5}', "steps_per_print = 1.5; it must be a whole number"),
    ('{"steps_per_print": "10"}', 'steps_per_print = "10"; it must be a whole number'),
    ('{"gradient_predivide_factor": 0}', "gradient_predivide_factor = 0; it must be a number above 0"),
    ('{"gradient_predivide_factor": "2"}', 'gradient_predivide_factor = "2"; it must be a number above 0'),
    ('{"data_types": {"grad_accum_dtype": "fp64"}}', 'grad_accum_dtype = "fp64"; it must be "fp32", "fp16" or "bf16"'),
    ('{"data_types": []}', r"has data_types = \[\]; it must be an object"),
    *(
        (
            f'{{"zero_optimization": {{"stage": {stage}, "{which}": {{"device": "nvme", "nvme_path": "/tmp"}}}}}}',
            sentence,
        )
        for stage, which, sentence in (
            (2, "offload_optimizer", 'offload_optimizer.device = "nvme"; the state goes to no disk'),
            (3, "offload_optimizer", 'offload_optimizer.device = "nvme"; the state goes to no disk'),
            (3, "offload_param", 'offload_param.device = "nvme"; weights go to no disk'),
        )
    ),
    *(
        (
            f'{{"zero_optimization": {{"stage": 3, "offload_optimizer": {{"device": "cpu", "ratio": {ratio}}}}}}}',
            "it must be 1",
        )
        for ratio in (0.3, 0, '"1"', "true", "NaN")
    ),
    *(
        (content, rf"has {key}, which train.pretrain does not support \(.*\); remove it")
        for key, content in {
            "checkpoint.load_universal": '{"checkpoint": {"load_universal": true}}',
            "activation_checkpointing": '{"activation_checkpointing": {"partition_activations": true}}',
            "autotuning": '{"autotuning": {"enabled": true}}',
            "checkpoint.writer": '{"checkpoint": {"writer": {"type": "fast", "decoupled": true}}}',
            "compile": '{"compile": {"disable": false, "backend": "inductor"}}',
            "data_efficiency": '{"data_efficiency": {"enabled": true, "seed": 1}}',
            "data_parallel_size": '{"data_parallel_size": 2}',
            "expert_parallel": '{"expert_parallel": {"enabled": true, "autoep_size": 2}}',
            "hybrid_engine": '{"hybrid_engine": {"enabled": true}}',
            "sequence_parallel_size": '{"sequence_parallel_size": 2}',
            "tensor_parallel": '{"tensor_parallel": {"autotp_size": 2}}',
            "zero_optimization.offload_optimizer.super_offload": '{"zero_optimization": {"stage": 3, '
            '"offload_optimizer": {"device": "cpu", "super_offload": true}}}',
            "zero_optimization.zenflow": '{"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}',
        }.items()
    ),
    *(
        (content, f"{key}.*{instead}.*; remove it")
        for key, instead, content in (
            ("checkpoint.writer", "synced", '{"checkpoint": {"writer": {}}}'),
            ("checkpoint.writer", "synced", '{"checkpoint": {"writer": {"decoupled": false}}}'),
            ("compile", "give --compile", '{"compile": {"passes": ["z3"]}}'),
            ("data_efficiency", "mixture", '{"data_efficiency": {"data_routing": {"random_ltd": {"enabled": true}}}}'),
            ("data_efficiency", "mixture", '{"data_efficiency": {"data_sampling": {"enabled": true}}}'),
            ("tensor_parallel", "use stage 3", '{"tensor_parallel": {"preset_model": "llama"}}'),
        )
    ),
    *(
        (f'{{"{key}": {{"enabled": false}}}}', f"has {key}, which DeepSpeed no longer has; remove it")
        for key in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "sparse_attention",
        )
    ),
    (
        '{"zero_optimization": {"stage": 3, "mics_shard_size": 2}}',
        "has zero_optimization.mics_shard_size, which DeepSpeed no longer has",
    ),
    *(
        (f'{{"zero_optimization": {{"stage": 3, "{key}": true}}}}', f"zero_optimization.{key}, which needs GPUs")
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    ),
    ('{"wandb": {"enabled": true}}', "has wandb.enabled = true, and the package wandb is not installed"),
    ('{"comet": {"enabled": true}}', "has comet.enabled = true, and the package comet_ml is not installed"),
    (
        '{"optimizer": {"type": "BalancedAdam", "params": {"betas": 0.9}}}',
        r"betas = \[0.9, 0.9\], but betas is \[0.95, 0.95\]",
    ),
    ('{"train_batch_size": 64}', "train_batch_size = 64, but batch is 4; make them equal"),
    ('{"gradient_clipping": 5}', "gradient_clipping = 5, but clip is 1.0"),
    ('{"scheduler": {"type": "WarmupLR"}}', "has a scheduler"),
    ('{"fp16": {"enabled": true}}', "has fp16 at stage 0"),
    ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage = 7"),
    ('{"zero_optimization": {"stage": "3"}}', 'zero_optimization.stage = "3"; it must be 0, 1, 2 or 3'),
    ('{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}', "offload_optimizer at stage 0"),
    ('{"bfloat16": {"enabled": true}}', "has 'bfloat16'; write 'bf16'"),
    ('{"zero_optimization": true}', "has zero_optimization = true; it must be an object"),
    ('{"zero_optimization": {"stage": 1, "reduce_buket_size": 5}}', "reduce_buket_size"),
    (
        '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}',
        "zero_hpz_partition_size = 2 on 1 rank; it must divide their number",
    ),
    (
        '{"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}',
        "zero_hpz_partition_size = 2 at stage 2, where DeepSpeed partitions no weights; use stage 3",
    ),
    *(
        (
            f'{{"zero_optimization": {{"stage": 3, "zero_hpz_partition_size": {size}}}}}',
            f'zero_hpz_partition_size = {size}; it must be a number of ranks, or "auto"',
        )
        for size in ('"2"', "true", "1.5", "-1")
    ),
    ('{"compile": {"pases": null}}', "has 'compile.pases', which DeepSpeed does not know"),
    ('{"zero_optimisation": {"stage": 3}}', "has 'zero_optimisation', .* did you mean 'zero_optimization'"),
    ('{"gradient_cliping": 1.0}', "did you mean 'gradient_clipping'"),
    ('{"optimizer": "BalancedAdam"}', 'has optimizer = "BalancedAdam"; it must be an object'),
    ('{"optimizer": {"params": null}}', "has optimizer.params = null; it must be an object"),
    ('{"bf16": true}', "has bf16 = true; it must be an object"),
    ('{"bf16": {"enabled": "maybe"}}', 'bf16.enabled = "maybe"; it must be true, false or "auto"'),
    ('{"zero_optimization": {"stage": 1}, "fp16": {"enabled": 1}}', "fp16.enabled = 1; it must be true"),
    (
        '{"zero_optimization": {"stage": 1}, "fp16": {"enabled": true}, "bf16": {"enabled": true}}',
        "is refused by DeepSpeed",
    ),
    ('{"communication_data_type": "fp7"}', 'communication_data_type = "fp7"; it must be "fp32", "fp16" or "bf16"'),
    ('{"gradient_allreduce_op": "sum"}', 'gradient_allreduce_op = "sum"; the gradient is the mean over the batch'),
    ('{"managed_gradient_accumulation": false}', "managed_gradient_accumulation = false; .* it must be true"),
    ('{"wall_clock_breakdown": "false"}', 'wall_clock_breakdown = "false"; it must be true or false'),
    ('{"data_types": {"param_dtype": "bf16"}}', 'param_dtype = "bf16", but the run trains in fp32; make them agree'),
    ('{"fp16": {"enabledd": false}}', "has 'fp16.enabledd', which DeepSpeed does not know"),
    ('{"flops_profiler": {"enable": true}}', "has 'flops_profiler.enable', .* did you mean 'enabled'"),
    ('{"timers": 3}', "has timers = 3; it must be an object"),
    (
        '{"zero_optimization": {"stage": 2}, "prescale_gradients": true}',
        "prescale_gradients = true at stage 2, where .*; remove prescale_gradients",
    ),
    ('{"zero_optimization": {"stage": 1, "legacy_stage1": true}}', "legacy_stage1, .*DeepSpeed has removed it"),
    (
        '{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}',
        'zero_optimization.reduce_bucket_size = "auto", which only',
    ),
]


@pytest.mark.parametrize(("content", "sentence"), DS_CONFIGS)
def test_a_bad_ds_config_is_refused_in_one_sentence(make: Make, tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence) as refused:
        resumable_run.pretrain(make("--ds-config", str(file)))
    assert "\n" not in str(refused.value)


OFF = [
    '{"hybrid_engine": {"enabled": false}, "compile": {"deepcompile": false, "double_buffer": true}}',
    '{"data_efficiency": {"data_routing": {"enabled": false, "random_ltd": {}}}, "checkpoint": {"writer": null}}',
    '{"data_efficiency": {"seed": 1234}, "hybrid_engine": {"max_out_tokens": 512}, "wandb": {"project": "p"}}',
    '{"tensor_parallel": {"autotp_size": 0}, "data_types": {"grad_accum_dtype": "float32"}}',
    '{"activation_checkpointing": {"partition_activations": false}, "tensor_parallel": {}}',
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1, "super_offload": false}}}',
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}}',
    '{"steps_per_print": 2e3, "gradient_predivide_factor": 2, "data_types": {"grad_accum_dtype": null}}',
    '{"optimizer": {"params": {"torch_adam": true, "adam_w_mode": true, "fused": null, "fused_zero": false}}}',
]
"""What asks for nothing that train.pretrain lacks."""


@pytest.mark.parametrize("content", OFF)
def test_a_section_that_is_off_and_a_setting_that_changes_nothing_are_accepted(
    make: Make, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    deepspeed_config.resolve(make("--ds-config", str(file)), 1, False)


def test_the_secondary_partition_is_that_of_a_host_where_it_is_auto(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("--ds-config", str(REPOSITORY / "ds_configs" / "zero3-hpz.json"))
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert deepspeed_config.resolve(run, 4, False)["zero_optimization"]["zero_hpz_partition_size"] == 2
    monkeypatch.setenv("LOCAL_SIZE", "3")
    with pytest.raises(ConfigError, match="zero_hpz_partition_size = 3 on 4 ranks; it must divide their number"):
        deepspeed_config.resolve(run, 4, False)


@pytest.mark.parametrize("given", ["logs", "", None, "/elsewhere"])
def test_a_monitor_writes_into_the_runs_folder_where_its_path_is_not_absolute(
    make: Make, tmp_path: Path, given: str | None
) -> None:
    file = tmp_path / "ds.json"
    section = {"enabled": True} if given is None else {"enabled": True, "output_path": given}
    file.write_text(json.dumps({"tensorboard": section, "csv_monitor": section}))
    run = make("--ds-config", str(file))
    config = deepspeed_config.resolve(run, 1, False)
    for name in ("tensorboard", "csv_monitor"):
        assert config[name]["output_path"] == (given if given == "/elsewhere" else str(run.out / (given or "")))


@pytest.mark.parametrize(
    "content", ['{"bf16": {"enabled": false}}', '{"zero_optimization": {"stage": 1}, "fp16": {"enabled": true}}']
)
def test_a_ds_config_of_another_precision_than_the_flag_is_refused(make: Make, tmp_path: Path, content: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"has bf16.enabled = .*, but precision is bf16; make them agree"):
        resumable_run.pretrain(make("--ds-config", str(file), "--precision", "bf16"))


def test_what_deepspeed_refuses_only_when_it_starts_is_a_sentence_too(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(
        '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true, "bf16_master_weights_and_grads": true}}'
    )
    with pytest.raises(ConfigError, match=rf"ds_config {file} is refused by DeepSpeed: .*[Mm]aster") as refused:
        resumable_run.pretrain(make("--ds-config", str(file)))
    assert "\n" not in str(refused.value)
