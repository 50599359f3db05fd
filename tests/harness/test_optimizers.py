"""The optimizers that a run and an arm may name: BalancedAdam, its relatives, torch's and DeepSpeed's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.harness.conftest import Make
from tests.harness.runs import change, cut, finish, losses, out_of
from train import compare
from train.checkpoint import resumable_run
from train.common.errors import ConfigError
from train.common.files import REPOSITORY
from train.run import optimizers
from train.run.metrics import read_metrics
from train.sweep.arms import Arm
from train.sweep.options import Comparison
from train.sweep.plan import manifest, settings_of

ARMS = [
    ("0.95", ((0.95,), "fp32", "adam")),
    ("0.9,0.9", ((0.9,), "fp32", "adam")),
    ("adam:0.9", ((0.9,), "fp32", "adam")),
    ("adamd:0.9,0.95", ((0.9, 0.95), "fp32", "adamd")),
    ("adamp:0.95:packed16", ((0.95,), "packed16", "adamp")),
    ("l1:0.95:packed8", ((0.95,), "packed8", "l1")),
    ("l1.5:refresh:100", ("refresh:100", "fp32", "l1.5")),
    ("l3:from:0.8:to:0.95:packed16", ("from:0.8:to:0.95", "packed16", "l3")),
    ("amsgrad:0.9,0.999", ((0.9, 0.999), "fp32", "amsgrad")),
    ("torch:NAdam:0.9,0.999", ((0.9, 0.999), "fp32", "torch:NAdam")),
    ("torch:AdamW:horizon:20", ("horizon:20", "fp32", "torch:AdamW")),
    ("deepspeed:Adam:0.95", ((0.95,), "fp32", "deepspeed:Adam")),
]


@pytest.mark.parametrize(("text", "parts"), ARMS)
def test_an_arm_is_read_from_its_text_and_from_the_run_that_it_becomes(text: str, parts: Any) -> None:
    arm = Arm.parse(text)
    assert arm == Arm(*parts) and Arm.parse(str(arm)) == arm
    (run,) = manifest(Comparison(arms=(text,), seeds=(0,), launcher="python", ranks=1))["runs"]
    settings = settings_of(run)
    assert run["arm"] == str(Arm.of(settings.optimizer)) == str(arm)
    assert ("optimizer" in settings.identity()["optimizer"]) == (arm.optimizer != "adam")


BAD = [
    ("adamq:0.9", "arms has 'adamq:0.9'; an arm is one beta"),
    ("torch:0.9", "arms has 'torch:0.9'; an arm is one beta"),
    ("torch:NAdam", "arms has 'torch:NAdam'; an arm is one beta"),
    ("torch:Nadam:0.9", "optimizer is 'torch:Nadam', and torch.optim has no optimizer Nadam"),
    ("torch:SGD:0.9", "optimizer is 'torch:SGD', and torch.optim.SGD takes no betas"),
    ("torch:SparseAdam:0.9", "weight_decay is 0.1 and optimizer is 'torch:SparseAdam', which adds it to the gradient"),
    ("torch:Adamax:0.9", "weight_decay is 0.1 and optimizer is 'torch:Adamax', which adds it to the gradient"),
    ("deepspeed:SGD:0.9", "optimizer is 'deepspeed:SGD'; of DeepSpeed's own it may be Adam, AdamW, Lamb, Lion"),
    ("deepspeed:NAdam:0.9", "optimizer is 'deepspeed:NAdam'; .*torch:NAME is for torch's"),
    ("deepspeed:BalancedAdam:0.9", "optimizer is 'deepspeed:BalancedAdam'; of DeepSpeed's own"),
    ("torch:AdamW:from:0.5:to:0.9", "whose bias correction takes betas for constant; give numbers"),
    ("deepspeed:Adam:from:0.5:to:0.9", "whose bias correction takes betas for constant; give numbers"),
    ("torch:Optimizer:0.9", "optimizer is 'torch:Optimizer', and torch.optim.Optimizer takes no betas"),
    ("torch:AdamP:0.9", "optimizer is 'torch:AdamP', and torch.optim has no optimizer AdamP"),
    ("torch:lr_scheduler:0.9", "torch.optim has no optimizer lr_scheduler"),
    ("torch:AdamW:0.9:packed16", "state is 'packed16' and optimizer is 'torch:AdamW'"),
    ("amsgrad:0.9:packed16", "state is 'packed16', and AMSGrad divides"),
    ("adamnc:0.9:packed8", "state is 'packed8', and AdamNC divides"),
    ("adamp:0.9,0.95:packed16", "packed moments need equal betas"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD)
def test_a_bad_arm_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        manifest(Comparison(arms=(text,), seeds=(0,), launcher="python", ranks=1))
    assert "\n" not in str(refused.value)


LATE = [
    (["--optimizer", "adamp", "--betas", "0.9", "0.99"], "--allow-unbalanced"),
    (["--optimizer", "torch:AdamW", "--betas", "0.9", "0.99"], "--allow-unbalanced is needed where they differ"),
    (["--optimizer", "deepspeed:Lion"], "is refused by DeepSpeed: This op had not been implemented on CPU"),
    (
        ["--optimizer", "adamp", "--ds-config", "{fused}"],
        "params.fused, and adamp has no kernels",
    ),
    (["--optimizer", "torch:AdamW", "--ds-config", "{fused}"], "params.fused, and torch:AdamW has no kernels"),
    (["--optimizer", "l4"], "optimizer is 'l4'; it must be one of adam, adamd"),
    (["--optimizer", "torch:NAdam", "--precision", "bf16", "--ds-config", "{zero0}"], "is stage 0 in bf16, where"),
    (
        ["--optimizer", "l3", "--ds-config", "{adamp}"],
        'optimizer.type = "AdamP", and --optimizer is l3; make them agree',
    ),
    (["--ds-config", "{adamp}"], 'optimizer.type = "AdamP"; it must be "BalancedAdam"'),
    (
        ["--optimizer", "adamp", "--ds-config", "{delta}"],
        "has optimizer.params.delta, and --optimizer adamp has its default",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), LATE)
def test_a_bad_optimizer_is_refused_in_one_sentence(
    make: Make, options: list[str], sentence: str, tmp_path: Path
) -> None:
    zero0 = REPOSITORY / "ds_configs" / "zero0.json"
    config = json.loads(zero0.read_text())
    places = {"zero0": zero0, **{name: tmp_path / f"{name}.json" for name in ("adamp", "delta", "fused")}}
    places["fused"].write_text(json.dumps(config | {"optimizer": {"params": {"fused": True}}}))
    places["adamp"].write_text(json.dumps(config | {"optimizer": {"type": "AdamP"}}))
    places["delta"].write_text(json.dumps(config | {"optimizer": {"type": "AdamP", "params": {"delta": 0.5}}}))
    with pytest.raises(ConfigError, match=sentence) as refused:
        resumable_run.pretrain(make(*(option.format(**places) for option in options)))
    assert "\n" not in str(refused.value)


def test_an_optimizer_of_torchs_is_made_with_decoupled_decay_where_it_can() -> None:
    params = {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.3}
    for name in ("NAdam", "RAdam", "Adam"):
        made = optimizers.build(f"torch:{name}", params)
        assert made is not None
        (group,) = made([torch.zeros(1)]).param_groups
        assert type(made([torch.zeros(1)])).__name__ == name
        assert group["decoupled_weight_decay"] and group["weight_decay"] == 0.3 and group["betas"] == (0.9, 0.95)


NAMES = ["adamp", "l3", "amsgrad", "adamnc", "torch:NAdam", "deepspeed:AdamW"]


@pytest.mark.ranks
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_with_it_and_a_cut_run_goes_on_as_the_uncut_one(
    name: str, small_run: list[str], tmp_path: Path
) -> None:
    options = change(small_run, optimizer=name, ds_config=REPOSITORY / "ds_configs" / "zero2.json")
    code, said = finish(options)
    assert code == 0, said
    kind = name.partition(":")[2] or optimizers.OWN[name][0]
    assert f"{kind}: " in said
    lines = [line for line in read_metrics(out_of(options)) if "loss" in line]
    assert all((line["update_rms"] is None) == optimizers.is_foreign(name) for line in lines[1:])
    assert all(("projected" in line) == (name == "adamp") for line in lines)
    alone = change(options, out=tmp_path / "one-rank")
    assert finish(alone, None)[0] == 0
    assert losses(options) == pytest.approx(losses(alone), rel=2e-5)
    uncut = losses(options)
    cut(out_of(options))
    code, said = finish(options)
    assert code == 0, said
    assert losses(options) == uncut


@pytest.mark.ranks
def test_a_state_that_universal_checkpoints_do_not_hold_is_not_taken_to_another_number_of_ranks(
    small_run: list[str],
) -> None:
    for name in ("amsgrad", "torch:NAdam"):
        options = change(small_run, optimizer=name, out=out_of(small_run).with_name(name.replace(":", "-")))
        assert finish(options)[0] == 0
        cut(out_of(options))
        code, said = finish(options, None)
        assert code != 0 and f"so that {name} has to resume as it was" in said, said


@pytest.mark.ranks
def test_with_round_robin_gradients_a_run_resumes_as_it_was_and_not_otherwise(
    small_run: list[str], tmp_path: Path
) -> None:
    config = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text())
    config["zero_optimization"]["round_robin_gradients"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = change(small_run, ds_config=tmp_path / "config.json")
    assert finish(options)[0] == 0
    uncut = losses(options)
    cut(out_of(options))
    without = change(options, ds_config=REPOSITORY / "ds_configs" / "zero2.json")
    for others, ranks in ((options, None), (without, 2)):
        code, said = finish(others, ranks)
        assert code != 0 and "with round_robin_gradients DeepSpeed mixes up parameters when it converts" in said, said
    assert finish(options)[0] == 0
    assert losses(options) == uncut


def test_a_comparison_of_optimizers_is_reported_by_their_names(small_run: list[str], tmp_path: Path) -> None:
    arms = ["l1:0.9:packed16", "torch:AdamW:0.9"]
    data = [word for flag in ("--data", "--data-cache") for word in (flag, small_run[small_run.index(flag) + 1])]
    options = ["--seeds", "0", "--steps", "4", "--batch", "4", "--sequence-length", "32", "--launcher", "python"]
    out = tmp_path / "comparison"
    compare.main(["--out", str(out), "--arms", *arms, *options, "--ranks", "1", "--", *data])
    assert sorted(pd.read_csv(out / "report.csv")["arm"]) == arms
