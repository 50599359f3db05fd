"""train.export: what transformers loads is the run's model, bit for bit, in every form of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.harness.exports import (
    ONE_RANK,
    OPTIONS,
    UNTIED,
    ZERO_2,
    copied,
    exported,
    newest,
    place,
    rewrite,
    trained,
    with_own_model,
)
from train import export as command
from train.checkpoint.export import export
from train.checkpoint.load import only_known_classes
from train.checkpoint.manifest import MANIFEST
from train.data.tokenization import PROBE, load_tokenizer
from train.probe.single_rank import single_rank_run

pytestmark = pytest.mark.ranks

CELLS: list[tuple[Any, ...]] = [
    (0, 2),
    (1, 3),
    ZERO_2,
    (3, 3),
    (*ONE_RANK, "--state", "packed32"),
    (*ZERO_2, "--state", "packed8"),
    (3, 2, "--state", "packed16"),
    (1, 2, "--optimizer", "amsgrad"),
    (*ZERO_2, "--optimizer", "torch:AdamW"),
    (3, 2, "--optimizer", "adamp", "--loss", "chunked"),
    UNTIED,
    (*ONE_RANK, "--model", "+gpt2", "--eos-id", "7"),
    (3, 2, "--model", "+gpt2"),
    (3, 2, "--model", "+frozen"),
]


def loss(folder: Path, run: Path) -> float:
    """The mean loss of the exported model on the blocks that the run's last validation reads, one after the other."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, found = loaded
    assert not any(found.values()) and model.dtype == torch.float32
    tokens = np.fromfile(
        place() / "cache" / json.loads((run / "run.json").read_text())["tokens"] / "validation.bin", np.uint16
    )
    blocks = torch.from_numpy(tokens[: len(tokens) // 32 * 32].astype(np.int64)).view(-1, 32)
    count = json.loads((run / "result.json").read_text())["validation_blocks"]
    assert count > 40
    total = 0.0
    with torch.no_grad():
        for number in range(count):
            block = blocks[number * len(blocks) // count]
            logits = model(block[None], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits.double(), block[1:]))
    return total / count


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_exported_model_has_the_validation_loss_of_the_run(cell: tuple[Any, ...], tmp_path: Path) -> None:
    run = trained(*cell)
    export(run, tmp_path / "hf", "fp32")
    measured = json.loads((run / "result.json").read_text())["validation_loss"]
    assert loss(tmp_path / "hf", run) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0]], ids=str)
def test_the_weights_have_the_bits_that_deepspeed_puts_together(cell: tuple[Any, ...], tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run = trained(*cell)
    with only_known_classes():
        expected = get_fp32_state_dict_from_zero_checkpoint(str(run / "checkpoints"), newest(run).name)
    found = exported(run, tmp_path / "hf")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert sum(tensor.numel() for tensor in found.values()) > 30_000


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_in_bf16_gives_its_float32_master_weights_at_every_stage(stage: int, tmp_path: Path) -> None:
    run = trained(stage, 2, "--precision", "bf16")
    found = exported(run, tmp_path / "hf")
    expected = exported(trained(0, 2, "--precision", "bf16"), tmp_path / "stage 0")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())  # these runs are exact
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values())
    if stage < 3:  # where the model's own weights are in one file
        with only_known_classes():
            module = torch.load(newest(run) / "mp_rank_00_model_states.pt")["module"]
        assert all(torch.equal(tensor.bfloat16(), module[name]) for name, tensor in found.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_before_the_first_step_that_moves_anything_the_weights_are_the_initial_ones(stage: int, tmp_path: Path) -> None:
    from train.run import initial_weights, model
    from train.run.config import Model

    run = trained(stage, 3, "--steps", "1", "--warmup", "0", "--lr", "1e-30", "--weight-decay", "0")
    config = model.configuration(Model(), 384, 32)
    torch.manual_seed(0)
    expected = initial_weights.draw(config, at_once=True).state_dict()
    found = exported(run, tmp_path / "hf")
    assert found.keys() == expected.keys() - {"lm_head.weight"}  # tied
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_measures_a_run_from_a_checkpoint_has_the_weights_that_an_export_has(
    stage: int, precision: str, tmp_path: Path
) -> None:
    run = trained(stage, 2, "--precision", precision)
    expected = exported(run, tmp_path / "hf")
    options = OPTIONS.replace("--save-every 2 ", "").split()
    options += ["--data", f"{place()}/corpus", "--data-cache", f"{place()}/cache", "--precision", precision]
    with single_rank_run("test", tmp_path, 4, tuple(options), run) as trainer:
        engine = trainer.engine
        found = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in engine.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        engine.optimizer.step()  # which in bf16 writes the master weights into the model
        assert all(torch.equal(tensor, found[name]) for name, tensor in engine.module.state_dict().items())


TIED = [(ZERO_2, True), (UNTIED, False), ((3, 2, "--model", "+gpt2"), True), ((3, 2, "--model", "+frozen"), True)]


@pytest.mark.parametrize(("cell", "tied"), TIED, ids=str)
def test_the_files_are_those_of_save_pretrained_with_tied_weights_once(
    cell: tuple[Any, ...], tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    found = exported(trained(*cell), tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    loaded.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert found.keys() == theirs.keys() and all(torch.equal(found[name], theirs[name]) for name in found)
    ours, their = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == their


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("cell", [ONE_RANK, (3, 3)], ids=str)
def test_in_sixteen_bits_they_are_the_rounded_master_weights(
    cell: tuple[int, int], dtype: str, torch_dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    full, half = (exported(trained(*cell), tmp_path / name, name) for name in ("fp32", dtype))
    assert full.keys() == half.keys()
    assert all(torch.equal(half[name], full[name].to(torch_dtype)) for name in full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype == torch_dtype


@pytest.mark.parametrize("cell", [(0, 2), (1, 3), (3, 3)], ids=str)
def test_small_files_hold_the_same_weights_and_an_index_names_them(cell: tuple[int, int], tmp_path: Path) -> None:
    whole = exported(trained(*cell), tmp_path / "whole")
    cut = exported(trained(*cell), tmp_path / "cut", max_shard_size=100_000)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 9 and {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        held = load_file(file)
        assert {index["weight_map"][name] for name in held} == {file.name}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 100_000
        assert file.stat().st_mode == (tmp_path / "cut" / "config.json").stat().st_mode
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert loss(tmp_path / "cut", trained(*cell)) == loss(tmp_path / "whole", trained(*cell))


SPECIAL = [
    (ZERO_2, {"bos": None, "eos": 1, "pad": 0}),
    ((*ONE_RANK, "--model", "+gpt2", "--eos-id", "7"), {"bos": None, "eos": 7, "pad": 0}),
    (UNTIED, {"bos": 1, "eos": 2, "pad": 0}),
]


@pytest.mark.parametrize(("cell", "ids"), SPECIAL, ids=str)
def test_the_configuration_is_for_inference_and_the_tokenizer_is_the_runs(
    cell: tuple[Any, ...], ids: dict[str, int | None], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, pipeline

    run = trained(*cell)
    export(run, tmp_path / "hf", "fp32")
    config, generation = AutoConfig.from_pretrained(tmp_path / "hf"), GenerationConfig.from_pretrained(tmp_path / "hf")
    for name, value in ids.items():
        assert getattr(config, f"{name}_token_id") == getattr(generation, f"{name}_token_id") == value
    assert config.use_cache and config.dtype == torch.float32
    ours = load_tokenizer(json.loads((run / "run.json").read_text())["identity"]["data"]["tokenizer"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(PROBE)["input_ids"] == ours(PROBE)["input_ids"]
    assert theirs.eos_token_id == ours.eos_token_id and len(theirs) == len(ours)
    generate = pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    assert len(generate("word1 word", max_new_tokens=5, do_sample=False)[0]["generated_text"]) >= len("word1 word")


def test_one_of_the_checkpoints_by_its_path_or_the_newest(tmp_path: Path) -> None:
    run = trained(*ZERO_2)
    first = exported(run / "checkpoints" / "step-0000002", tmp_path / "first")
    last = exported(run / "checkpoints" / "step-0000004", tmp_path / "last")
    default = exported(run, tmp_path / "default")
    assert all(torch.equal(last[name], default[name]) for name in last)
    assert not any(torch.equal(first[name], last[name]) for name in last)
    with only_known_classes():
        module = torch.load(run / "checkpoints" / "step-0000002" / "mp_rank_00_model_states.pt")["module"]
    assert all(torch.equal(tensor, module[name]) for name, tensor in first.items())


def test_older_runs_whose_files_say_less_are_exported(tmp_path: Path) -> None:
    run = copied(ZERO_2, tmp_path)
    rewrite(run / "run.json", lambda about: [about.pop(name) for name in ("loss", "order")])
    rewrite(newest(run) / MANIFEST, lambda about: [about.pop(name) for name in ("run", "tokens")])
    rewrite(newest(run) / MANIFEST, lambda about: about["layout"].pop("round_robin"))
    found, expected = exported(run, tmp_path / "hf"), exported(trained(*ZERO_2), tmp_path / "new")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_rows_of_the_embedding_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = with_own_model(UNTIED, "untied", tmp_path)
    rewrite(tmp_path / "model" / "config.json", lambda config: config.update(vocab_size=310))
    export(run, tmp_path / "hf", "fp32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == 400


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(trained(*ZERO_2)), str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{tmp_path / 'hf'}: the weights of step 4, 451200 in bf16, 0.000902 GB."
