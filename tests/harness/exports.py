"""Runs that are exported, and ways to change them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import session
from tests.corpus import write_corpus
from tests.harness.runs import finish
from train.checkpoint.export import export
from train.checkpoint.load import only_known_classes
from train.checkpoint.manifest import MANIFEST
from train.common.files import REPOSITORY
from train.common.schemas import guard

OPTIONS = (
    "--steps 4 --warmup 1 --lr 1e-2 --clip 0 --batch 6 --sequence-length 32 --validation-fraction 0.2 "
    "--validation-batches 0 --save-every 2 --validate-every 0"
)
ZERO_2 = (2, 2)
ONE_RANK = (0, 1)
UNTIED = (1, 2, "--model", "+untied", "--tokenizer", "+bpe")
SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@session.shared
def place() -> Path:
    """A folder with a corpus, models' configurations, and a tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast, RoFormerConfig

    folder = session.folder() / "exported"
    folder.mkdir()
    corpus = write_corpus(folder / "corpus")
    llama: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 1}
    LlamaConfig(**SMALL, **llama, tie_word_embeddings=False).save_pretrained(folder / "untied")
    GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64).save_pretrained(folder / "gpt2")
    # Its positions are weights that nobody trains.
    roformer: dict[str, Any] = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 48, "is_decoder": True}
    RoFormerConfig(**SMALL, **roformer).save_pretrained(folder / "frozen")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>"])
    bpe.train([str(file) for file in sorted(corpus.iterdir())], trainer)
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens).save_pretrained(folder / "bpe")
    return folder


@session.shared
def trained(stage: int, ranks: int, *more: str) -> Path:
    """The folder of a run. A ``+`` in an option stands for the folder of :func:`place`."""
    given = [option.replace("+", f"{place()}/") for option in more]
    name = hashlib.sha256(repr((stage, ranks, more)).encode()).hexdigest()[:12]
    config = REPOSITORY / "ds_configs" / f"zero{stage}.json"
    text = f"{OPTIONS} --data {place()}/corpus --data-cache {place()}/cache --ds-config {config} --out {place()}/{name}"
    code, said = finish([*text.split(), *given], ranks)
    assert code == 0, said
    return place() / name


def exported(run: Path, out: Path, dtype: str = "fp32", **more: Any) -> dict[str, torch.Tensor]:
    """The weights in the files of an export."""
    export(run, out, dtype, **more)
    files = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
    assert sum(map(len, files)) == len({name for file in files for name in file})
    return {name: tensor for file in files for name, tensor in file.items()}


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def copied(cell: tuple[Any, ...], tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(trained(*cell), run)
    return run


def rewrite(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a file of JSON, with its own sum where it has one."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(guard(content) if "sum" in content else content))


def resave(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a file of tensors, and make its sum in the manifest right again."""
    with only_known_classes():
        content = torch.load(file)
    edit(content)
    torch.save(content, file)
    summed = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    rewrite(file.parent / MANIFEST, lambda about: about["files"].update({file.name: summed}))


def with_own_model(cell: tuple[Any, ...], model: str, tmp_path: Path) -> Path:
    """A copy of a run whose model's configuration is a folder of its own, ``tmp_path / "model"``."""
    run, own = copied(cell, tmp_path), tmp_path / "model"
    shutil.copytree(place() / model, own)
    rewrite(run / "run.json", lambda about: about["identity"]["model"].update(model=str(own)))
    rewrite(newest(run) / MANIFEST, lambda about: about["run"]["model"].update(model=str(own)))
    return run
