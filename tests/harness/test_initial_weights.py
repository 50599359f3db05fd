"""What weights a run begins with, and how its model is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config, LlamaConfig, PreTrainedModel

from tests.harness.conftest import Make
from tests.harness.runs import change, finish, losses, out_of
from tests.ranks import spawn
from train.checkpoint.resumable_run import pretrain
from train.common.errors import ConfigError
from train.common.files import REPOSITORY
from train.common.schemas import RunFile, read_schema
from train.distributed.launch import join
from train.probe.single_rank import single_rank_run
from train.run import initial_weights, model
from train.run.config import Model
from train.run.presets import PRESETS

SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
SHAPES = {
    "tied": LlamaConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, num_hidden_layers=1),
    "gpt2": GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2),
}


def drawn(config: Any) -> dict[str, torch.Tensor]:
    """The weights as one process draws them that holds all of the model."""
    from transformers.initialization import no_init_weights

    torch.manual_seed(7)
    with no_init_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.initialize_weights()
    network.tie_weights()
    return dict(network.state_dict())


def begun(given: tuple[str, int, bool]) -> tuple[dict[str, torch.Tensor], bool, bool]:
    """Weights of the engine on this rank, whether this rank drew numbers, and whether tied weights share memory."""
    import deepspeed

    shape, stage, bf16 = given
    ranks = join(60)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    fresh = torch.manual_seed(7).get_state()
    network = model.build(SHAPES[shape], Model(model=shape), 7, ds_config, ranks)
    drew = not torch.equal(fresh, torch.get_rng_state())
    engine, *_ = deepspeed.initialize(model=network, model_parameters=list(network.parameters()), config=ds_config)
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        found = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    tied = engine.module.get_output_embeddings().weight is engine.module.get_input_embeddings().weight
    ranks.watchdog.end()
    return found, drew, tied


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("shape", "stage", "world", "bf16"),
    [
        ("tied", 0, 2, False),
        ("tied", 1, 3, False),
        ("untied", 2, 2, False),
        ("gpt2", 1, 2, False),
        ("tied", 3, 2, False),
        ("untied", 1, 2, True),
        ("gpt2", 3, 2, True),
    ],
)
def test_every_rank_begins_with_the_weights_that_one_process_draws_and_only_the_first_draws_them(
    shape: str, stage: int, world: int, bf16: bool
) -> None:
    expected = drawn(SHAPES[shape])
    for rank, (found, drew, tied) in enumerate(spawn(begun, world, (shape, stage, bf16))):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value.to(found[name].dtype)), name
        assert tied == SHAPES[shape].tie_word_embeddings
        assert stage == 3 or drew == (rank == 0)


def test_allocated_weights_take_no_values_and_keep_what_is_not_trained() -> None:
    network = initial_weights.allocate(SHAPES["tied"], torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in [*network.parameters(), *network.buffers()])
    whole = AutoModelForCausalLM.from_config(SHAPES["tied"])
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for (name, mine), (_, theirs) in zip(network.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name


# ---- --init-from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with weights that no seed of a run draws, in two files, and its tokenizer."""
    path = tmp_path / "pretrained"
    torch.manual_seed(99)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )
    network.save_pretrained(path, max_shard_size="60KB")
    ByT5Tokenizer().save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def first_loss(run: list[str], folder: Path) -> float:
    """What the folder's weights give on the first batch of the run, by transformers alone."""
    decided = ("--out", "--ds-config")
    options = [o for pair in zip(run[::2], run[1::2], strict=True) if pair[0] not in decided for o in pair]
    network = AutoModelForCausalLM.from_pretrained(folder)
    with single_rank_run("test", folder.parent / "single", 6, tuple(options)) as trainer, torch.no_grad():
        tokens = trainer.batch_of(0).flatten(0, 1)
        return float(network(input_ids=tokens, labels=tokens).loss)


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (3, 2)])
def test_a_run_begins_with_the_weights_of_a_checkpoint_and_resumes_when_that_is_gone(
    small_run: list[str], folder: Path, stage: int, ranks: int
) -> None:
    options = change(small_run, ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json", init_from=folder)
    expected = first_loss(options, folder)
    code, said = finish(options, ranks)
    assert code == 0, said
    assert losses(options)[0] == pytest.approx(expected, rel=1e-6)
    about = read_schema(RunFile, out_of(options) / "run.json")
    assert set(about.init_from or ()) == {file.name for file in folder.glob("*.safetensors")}
    uncut = losses(options)
    shutil.rmtree(out_of(options) / "checkpoints" / "step-0000006")
    (out_of(options) / "result.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    code, said = finish(options, ranks)
    assert code == 0, said
    assert losses(options) == uncut


def without(folder: Path, name: str) -> None:
    """Remove one weight from the checkpoint."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        content = load_file(file)
        if name in content:
            del content[name]
            save_file(content, file, {"format": "pt"})


def spoilt(folder: Path, value: torch.Tensor) -> None:
    """Replace the norm of the last layer."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        content = load_file(file)
        if "model.norm.weight" in content:
            save_file({**content, "model.norm.weight": value}, file, {"format": "pt"})


def another_tokenizer(folder: Path) -> None:
    ByT5Tokenizer(extra_ids=3).save_pretrained(folder)


def unexpected(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = min(folder.glob("*.safetensors"))
    save_file({**load_file(file), "foo": torch.ones(3)}, file, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["foo"] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def own_code(folder: Path) -> None:
    in_config(folder, auto_map={"AutoConfig": "mine.Mine"}, model_type="mine")
    (folder / "mine.py").write_text("raise SystemExit('executed')\n")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unexpected": (unexpected, "which has foo, which the model hasn't"),
    "quantized": (lambda f: in_config(f, quantization_config={"quant_method": "fp8"}), "whose weights are quantized"),
    "own code": (own_code, "init_from is .*, which can't be loaded"),
    "lacks a weight": (lambda f: without(f, "model.norm.weight"), "lacks model.norm.weight"),
    "another shape": (lambda f: spoilt(f, torch.ones(7)), "has model.norm.weight in another shape"),
    "not finite": (lambda f: spoilt(f, torch.full((32,), torch.nan)), "whose weight model.norm.weight is not finite"),
    "no weights": (lambda f: list(map(Path.unlink, f.glob("*.safetensors"))), "whose weights can't be loaded"),
    "no configuration": (
        lambda f: shutil.move(f / "config.json", f / "elsewhere"),
        "init_from is .*, which can't be loaded",
    ),
    "cut file": (lambda f: min(f.glob("*.safetensors")).write_bytes(b"\0" * 40), "whose weights can't be loaded"),
    "another tokenizer": (another_tokenizer, r"whose tokenizer is another than the run's; give --tokenizer"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_do_not_fit_are_refused_and_nothing_has_begun(wrong: str, make: Make, folder: Path) -> None:
    spoil, sentence = WRONG[wrong]
    spoil(folder)
    run = make("--init-from", str(folder))
    with pytest.raises(ConfigError, match=sentence):
        pretrain(run)
    assert not (run.out / "run.json").exists()


def test_what_is_no_folder_is_refused_and_not_looked_for_on_the_hub(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"init_from is gpt2, which is not a folder"):
        make("--init-from", "gpt2").check()


@pytest.mark.ranks
@pytest.mark.parametrize("wrong", ["unexpected", "another shape", "lacks a weight"])
def test_at_stage_3_weights_that_do_not_fit_are_refused_too(wrong: str, small_run: list[str], folder: Path) -> None:
    spoil, sentence = WRONG[wrong]
    spoil(folder)
    config = REPOSITORY / "ds_configs" / "zero3.json"
    code, said = finish(change(small_run, init_from=folder, ds_config=config))
    assert code == 2 and sentence in said


def test_a_tokenizer_without_its_configuration_is_a_tokenizer(make: Make, folder: Path) -> None:
    from tokenizers import Tokenizer, models

    (folder / "tokenizer_config.json").unlink()
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"whose tokenizer is another than the run's"):
        pretrain(make("--init-from", str(folder)))


def test_weights_that_changed_before_the_first_checkpoint_are_not_taken_for_those_it_began_with(
    make: Make, folder: Path
) -> None:
    run = make("--init-from", str(folder))
    pretrain(run)
    shutil.rmtree(run.out / "checkpoints")
    (run.out / "result.json").unlink()
    spoilt(folder, torch.full((32,), 2.0))
    with pytest.raises(ConfigError, match=r"whose weights have changed since the run in .* began"):
        pretrain(run)


def test_a_model_beside_the_checkpoint_is_refused(make: Make, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model is 'small', and init_from is .* leave out --model"):
        make("--model", "small", "--init-from", str(folder)).check()


@pytest.mark.parametrize("named", ["AutoConfig", "AutoModelForCausalLM"])
def test_code_in_a_models_folder_is_never_run_whatever_is_answered(
    named: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal, for a configuration or a model that it doesn't know."""
    from transformers import T5Config

    folder, ran = tmp_path / "model", tmp_path / "ran"
    T5Config(vocab_size=384, d_model=32, num_layers=1, d_ff=48, num_heads=2).save_pretrained(folder)
    in_config(folder, auto_map={named: "mine.Mine"}, **({"model_type": "mine"} if named == "AutoConfig" else {}))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    with pytest.raises(ConfigError, match=r"model is "):
        pretrain(make("--model", str(folder)))
    assert not ran.exists()


# ---- Presets


@pytest.mark.parametrize(("preset", "rows"), [("tiny", 50_257), ("124m", 50_304), ("7b", 50_304)])
def test_the_vocabulary_of_large_presets_is_padded_and_a_run_that_has_begun_keeps_its_own(
    preset: str, rows: int
) -> None:
    assert model.configuration(Model(model=preset), 50_257, 128).vocab_size == rows
    assert model.configuration(Model(model=preset), 50_257, 128, 50_257).vocab_size == 50_257


def test_a_run_of_an_older_version_goes_on_with_the_rows_that_it_had(make: Make, monkeypatch: Any) -> None:
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"]._replace(multiple=500))
    run = make("--steps", "3", "--warmup", "1")
    pretrain(run)
    about = json.loads((run.out / "run.json").read_text())
    assert about["rows"] == 500
    del about["rows"]
    (run.out / "run.json").write_text(json.dumps(about))
    (run.out / "result.json").unlink()
    with pytest.raises(ConfigError, match="can't be loaded"):  # it is one of 500 rows
        pretrain(run)


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_large_presets_have_grouped_queries(preset: str) -> None:
    config = model.configuration(Model(model=preset), 50_257, 4096)
    assert config.num_attention_heads == {"3b": 24, "7b": 32}[preset] and config.num_key_value_heads == 8


# ---- How the model is computed


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_implementation_of_attention_gives_the_same_losses(make: Make, tmp_path: Path, name: str) -> None:
    data = make().data
    options = f"--data {data.data} --data-cache {data.data_cache} --batch 4 --sequence-length 32 --warmup 1"
    options += " --validation-fraction 0.2 --attention"
    found = []
    for attention in ("auto", name):
        with single_rank_run("test", tmp_path, 30, (*options.split(), attention)) as trainer:
            found.append([trainer.train_step()["loss"] for _ in range(4)])
    assert trainer.engine.module.config._attn_implementation == name
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_attention_that_sees_what_comes_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"in which a token sees those after it"):
        pretrain(make("--attention", "paged|eager"))


def test_an_implementation_of_attention_that_is_not_there_is_refused_by_name(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"--attention nonesuch"):
        pretrain(make("--attention", "nonesuch"))


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "loss"), [(1, "chunked"), (3, "full")])
def test_a_compiled_model_gives_the_same_losses_and_goes_on_uncompiled(
    small_run: list[str], tmp_path: Path, stage: int, loss: str
) -> None:
    options = change(small_run, loss=loss, ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json")
    plain, compiled = (change(options, out=tmp_path / name) for name in ("plain", "compiled"))
    assert finish(plain)[0] == 0
    code, said = finish([*compiled, "--compile"])
    assert code == 0, said
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    shutil.rmtree(tmp_path / "compiled" / "checkpoints" / "step-0000006")
    (tmp_path / "compiled" / "result.json").unlink()
    code, said = finish(compiled)
    assert code == 0, said
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)


def test_where_nothing_can_be_compiled_it_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match=r"torch.compile does not work here \(no C\+\+ compiler\)"):
        pretrain(make("--compile"))
