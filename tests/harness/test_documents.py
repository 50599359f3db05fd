"""With --document-mask a document sees itself alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.conftest import Make
from tests.harness.runs import change, finish, losses
from tests.harness.test_token_shards import raw
from tests.harness.texts import jsonl
from train.checkpoint.resumable_run import pretrain
from train.common.errors import ConfigError
from train.data.config import Data
from train.probe.pilot import draw
from train.probe.single_rank import single_rank_run
from train.run.documents import end_of, inputs, predicted
from train.run.loss import IGNORED

END = 1
ROWS = torch.tensor(
    [[5, 6, END, 7, 8, 9, END, END, 4, 3], [END, 5, 6, 7, 8, 9, 4, 3, 5, END], [9, 8, 7, 6, 5, 4, 3, 2, 9, 8]]
)
"""Documents of one token and of many, that end with the row and that don't."""


def documents(row: list[int]) -> list[list[int]]:
    """What lies between two ends."""
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == END:
            found.append([])
    return [document for document in found if document]


def test_positions_and_labels_are_those_of_the_documents_alone() -> None:
    given = inputs(ROWS, END)
    for row, positions, labels in zip(
        ROWS.tolist(), *(given[k].tolist() for k in ("position_ids", "labels")), strict=True
    ):
        apart = documents(row)
        assert positions == [place for document in apart for place in range(len(document))]
        expected = [label for document in apart for label in (IGNORED, *document[1:])]
        assert labels == [row[0], *expected[1:]]  # the first of a row is never predicted
    assert predicted(ROWS, END) == sum(len(document) - 1 for row in ROWS.tolist() for document in documents(row))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()  # without dropout


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_loss_and_gradient_of_documents_in_a_row_are_those_of_each_alone(build: Any, attention: str) -> None:
    """Also that a document's loss does not depend on its neighbours, since alone it has none."""
    torch.manual_seed(0)
    model = build().double()
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as in a run; with a cache transformers makes no mask of positions
    parameters = list(model.parameters())
    together = model(**inputs(ROWS, END), num_items_in_batch=1.0).loss
    ours = torch.autograd.grad(together, parameters)
    alone = sum(
        model(input_ids=torch.tensor([document]), labels=torch.tensor([document])).loss * (len(document) - 1)
        for row in ROWS.tolist()
        for document in documents(row)
        if len(document) > 1
    )
    theirs = torch.autograd.grad(alone, parameters)
    assert float(together) == pytest.approx(float(alone), rel=1e-6)  # transformers takes the loss in float32
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    without = model(input_ids=ROWS, labels=ROWS).loss * ROWS[:, 1:].numel()
    assert abs(float(without - alone)) > 1.0  # so that the test can fail


def short(place: Path) -> Path:
    """Documents of 3 to 120 bytes, so that some rows of 32 hold many and some none whole."""
    random = np.random.default_rng(0)
    jsonl(place, ["".join(random.choice(list("abcdef "), int(size))) + "." for size in random.integers(2, 120, 300)])
    return place


@pytest.mark.ranks
def test_the_loss_of_a_step_is_the_mean_over_all_predicted_tokens_on_any_ranks(
    small_run: list[str], tmp_path: Path
) -> None:
    options = change(small_run, data=short(tmp_path / "short.jsonl"), batch=12, clip=0.3)
    found: list[list[float]] = []
    for ranks, more in ((None, {}), (2, {}), (3, {"micro_batch": 2}), (None, {"micro_batch": 1})):
        own = [*change(options, out=tmp_path / f"run-{len(found)}", **more), "--document-mask"]
        code, said = finish(own, ranks)
        assert code == 0, said
        found.append(losses(own))
    assert all(each == pytest.approx(found[0], rel=1e-5) for each in found)
    plain = change(options, out=tmp_path / "plain")
    assert finish(plain, None)[0] == 0
    assert losses(plain)[0] != found[0][0]
    identities = [
        json.loads((tmp_path / name / "run.json").read_text())["identity"]["data"] for name in ("plain", "run-1")
    ]
    assert "document_mask" not in identities[0] and identities[1]["document_mask"] is True


def test_validation_is_the_mean_over_the_documents_of_the_chosen_blocks(make: Make, tmp_path: Path) -> None:
    data = make().data
    options = f"--data {short(tmp_path / 'short.jsonl')} --data-cache {data.data_cache} --batch 4 --sequence-length 32"
    options += " --warmup 1 --validation-fraction 0.2 --validation-batches 0 --document-mask"
    with single_rank_run("test", tmp_path, 30, tuple(options.split())) as trainer:
        blocks = trainer.validation[0].blocks
        rows = blocks.take(np.arange(len(blocks) // 4 * 4) * len(blocks) // (len(blocks) // 4 * 4))
        total = count = 0.0
        with torch.no_grad():
            for document in (each for row in rows.tolist() for each in documents(row) if len(each) > 1):
                tokens = torch.tensor([document])
                total += float(trainer.engine.module(input_ids=tokens, labels=tokens).loss) * (len(document) - 1)
                count += len(document) - 1
        assert trainer.validate()["validation_loss"] == pytest.approx(total / count, rel=1e-5)
        # A pilot's gradients are of the same loss.
        module, chosen = trainer.engine.module, trainer.train.sample(np.random.default_rng([trainer.run.seed, 0]), 4)
        (drawn,) = draw(trainer, 1)
        module.zero_grad()
        module(**inputs(trainer.train.take(chosen), END)).loss.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-6)


def config(place: Path, **content: Any) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(content))
    return place


def test_a_model_in_which_documents_see_each_other_is_refused(make: Make, tmp_path: Path) -> None:
    small = {"vocab_size": 384, "hidden_size": 32, "n_layer": 1, "n_head": 2, "num_hidden_layers": 1, "state_size": 4}
    for kind in ("bloom", "mamba"):
        model = config(tmp_path / kind, model_type=kind, **small)
        run = make(
            "--data",
            str(short(tmp_path / "short.jsonl")),
            "--model",
            str(model),
            "--out",
            str(tmp_path / f"{kind}-run"),
        )
        pretrain(run)
        masked = make(
            "--data",
            str(tmp_path / "short.jsonl"),
            "--model",
            str(model),
            "--document-mask",
            "--out",
            str(tmp_path / "no"),
        )
        with pytest.raises(ConfigError, match=r"document_mask is set, and (in )?model .*; leave it out"):
            pretrain(masked)


def test_without_ends_it_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    raw(tmp_path / "data" / "a", np.random.default_rng(0).integers(3, 259, 5000))
    arguments = ("--data", str(tmp_path / "data"), "--document-mask")
    with pytest.raises(ConfigError, match=r"the first 4000 tokens of the training text hold no 1, which should end"):
        pretrain(make(*arguments))
    pretrain(make(*arguments, "--eos-id", "65", "--out", str(tmp_path / "fine")))
    raw(tmp_path / "a", np.random.default_rng(0).integers(100, 259, 5000))
    with pytest.raises(
        ConfigError, match=r"the first 5000 tokens of the a validation text hold no 65, which should end"
    ):
        pretrain(
            make(*arguments, "--eos-id", "65", "--validation", f"a={tmp_path / 'a.bin'}", "--out", str(tmp_path / "b"))
        )
    with pytest.raises(ConfigError, match=r"eos_id is 384, and tokenizer 'byt5' has 384 tokens"):
        pretrain(make(*arguments, "--eos-id", "384", "--out", str(tmp_path / "beyond")))
    endless = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ConfigError, match=r"has no token that ends a document; give --eos-id"):
        end_of(Data(document_mask=True), endless)  # type: ignore[arg-type]
