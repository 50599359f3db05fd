"""--loss chunked is the loss of all logits, with few of them at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.conftest import Make
from tests.harness.runs import change, cut, finish, losses, out_of
from train.checkpoint.resumable_run import pretrain
from train.common.errors import ConfigError
from train.common.files import write_json
from train.run import loss
from train.run.loss import IGNORED, resolved, use_chunked

SHAPE = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def model_of(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SHAPE, "hidden_size": 32, "intermediate_size": 48, **more})
    config.use_cache = False
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


TOKENS = torch.randint(50, (3, 21), generator=torch.Generator().manual_seed(1))
MASKED = torch.where(TOKENS % 5 == 0, IGNORED, TOKENS)


@pytest.mark.parametrize("chunk", [1, 50 * 7, 50 * 63, 10**6], ids=["one token", "seven", "all", "more than all"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("gpt2", {}), ("phi", {})],
    ids=["tied", "untied", "gpt2", "with bias"],
)
def test_loss_and_gradient_are_those_of_all_logits(kind: str, more: dict[str, Any], chunk: int) -> None:
    model = model_of(kind, **more)
    parameters = list(model.parameters())
    cases: list[dict[str, Any]] = [
        {"labels": TOKENS},
        {"labels": MASKED},
        {"labels": MASKED, "num_items_in_batch": 7.0},
    ]
    full = [model(input_ids=TOKENS, **case).loss for case in cases]
    theirs = [torch.autograd.grad(each, parameters) for each in full]
    use_chunked(model, chunk)
    for case, expected, gradients in zip(cases, full, theirs, strict=True):
        ours = model(input_ids=TOKENS, **case).loss
        assert float(ours) == pytest.approx(float(expected), rel=1e-6)
        for one, two in zip(torch.autograd.grad(ours, parameters), gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
        with torch.no_grad():
            assert float(model(input_ids=TOKENS, **case).loss) == pytest.approx(float(expected), rel=1e-6)
    assert model(input_ids=TOKENS).logits.shape == (3, 21, 50)  # without labels as ever


class Largest(TorchDispatchMode):
    """The largest tensor with as many columns as there are tokens in the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        weight = isinstance(result, torch.Tensor) and result.shape == (32, 50)  # of the head, transposed
        if isinstance(result, torch.Tensor) and result.ndim and result.shape[-1] == 50 and not weight:
            self.rows = max(self.rows, result.numel() // 50)
        return result


@pytest.mark.parametrize("tokens", [1, 8, 63])
def test_no_more_logits_are_held_than_a_chunk(tokens: int) -> None:
    model = model_of("llama")
    use_chunked(model, 50 * tokens)
    with Largest() as largest:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert largest.rows == tokens


def config(place: Path, kind: str, **more: Any) -> str:
    place.mkdir()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 8}
    write_json(place / "config.json", {"model_type": kind, **SHAPE, **small, "vocab_size": 384, **more})
    return str(place)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 10.0}),
    ],
)
def test_a_model_that_does_more_to_its_logits_is_refused(
    kind: str, more: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    name = config(tmp_path / "model", kind, **more)
    with pytest.raises(ConfigError, match=r"loss is chunked, and model .* does more to its logits, or adds"):
        pretrain(make("--model", name, "--loss", "chunked"))


@pytest.mark.parametrize("way", ["full", "chunked"])
def test_a_model_that_would_learn_to_copy_is_refused(way: str, make: Make, tmp_path: Path) -> None:
    """The decoder of Marian takes labels as they are."""
    from transformers import AutoConfig

    shape = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    more = {"vocab_size": 384, "max_position_embeddings": 64, "pad_token_id": 0, "is_decoder": True}
    AutoConfig.for_model("marian", **shape, **more).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"whose loss in transformers is on the token that it is given and not"):
        pretrain(make("--model", str(tmp_path / "model"), "--loss", way))


def test_a_model_that_sees_the_future_is_refused(make: Make, tmp_path: Path) -> None:
    name = config(tmp_path / "model", "bert", intermediate_size=48)
    with pytest.raises(ConfigError, match=r"in which a token sees those after it"):
        pretrain(make("--model", name))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "mixtral", "gpt2"])
def test_a_model_that_predicts_the_next_token_is_taken_whatever_it_adds(kind: str, make: Make, tmp_path: Path) -> None:
    more = {"output_router_logits": True, "router_aux_loss_coef": 10.0} if kind == "mixtral" else {}
    pretrain(make("--model", config(tmp_path / "model", kind, **more), "--steps", "2"))


def test_it_is_chosen_by_the_logits_of_a_sequence_and_a_run_keeps_what_it_began_with(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolved("auto", 1024, 50000, None) == "full" and resolved("auto", 2048, 50000, None) == "chunked"
    assert resolved("full", 10**6, 10**6, "chunked") == "full" and resolved("chunked", 2, 2, "full") == "chunked"
    run = make()
    assert "loss" not in run.identity()["model"]
    pretrain(run)
    about = json.loads((run.out / "run.json").read_text())
    assert about["loss"] == "full"
    del about["loss"]  # which runs of before do not have
    write_json(run.out / "run.json", about)
    cut(run.out)
    monkeypatch.setattr(loss, "FULL_BELOW", 1)
    monkeypatch.setattr(loss, "use_chunked", None)
    pretrain(run)


@pytest.mark.ranks
def test_a_run_has_the_losses_of_all_logits_at_every_stage_and_goes_on_with_other_ranks(
    small_run: list[str], tmp_path: Path
) -> None:
    from train.common.files import REPOSITORY

    small_run = change(small_run, batch=12)
    full = change(small_run, out=tmp_path / "full", loss="full")
    assert finish(full)[0] == 0
    for stage in range(4):
        options = change(
            small_run,
            out=tmp_path / f"stage-{stage}",
            loss="chunked",
            ds_config=REPOSITORY / "ds_configs" / f"zero{stage}.json",
            micro_batch=2,
        )
        code, said = finish(options)
        assert code == 0, said
        assert losses(options) == pytest.approx(losses(full), rel=2e-5)
        assert json.loads((out_of(options) / "run.json").read_text())["loss"] == "chunked"
    cut(out_of(options))
    code, said = finish([*options, "--activation-checkpointing"], 3)
    assert code == 2, said  # that belongs to the run
    code, said = finish(options, 3)
    assert code == 0 and losses(options) == pytest.approx(losses(full), rel=2e-5), said
