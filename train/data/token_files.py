"""Token files of a corpus: tokenized once, cached on disk and memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from train.common.errors import ConfigError, RetryError, first_line, require
from train.common.files import checksum, expanded, write_json
from train.common.schemas import About, guard, read_schema
from train.data import prepared, token_shards, tokenization
from train.data.blocks import Blocks, mapped
from train.data.config import Data
from train.data.corpus import Corpus, described, find_corpus, known_sums, waiting_for
from train.data.readers import Read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 2**29
"""Bytes of text, as they are on disk, that one process tokenizes while all ranks wait: about ten minutes."""
FORMAT = 4  # version of the token files; a new version makes new files
FORMAT_OF_STDLIB = 3  # stays at this version, since published results use these tokens
ABOUT = "about.json"


def prepare(settings: Data, tokenizer: PreTrainedTokenizerBase, begun_on: str = "") -> Path:
    """Tokenize the corpus unless that is done already, verify the token files and return their folder.

    Safe to call from many processes and hosts at once: one of them works under a file lock, in a temporary folder that
    it renames at the end.

    Args:
        settings: the data options.
        tokenizer: the tokenizer.
        begun_on: when a run is resumed, the name of its token folder, which an earlier version may have made; else "".

    Raises:
        ConfigError: if the data can't be read or gives no training or no validation text, or the folder is damaged.
        RetryError: if the tokens can't be read now.
    """
    cache = expanded(settings.data_cache, "data_cache")
    if begun_on and settings.data != "stdlib" and begun_on == _name_of_format_3(settings, tokenizer):
        require(
            (cache / begun_on).exists(),
            f"the run began on the tokens {cache / begun_on}, which an earlier version made and which are gone; "
            "restore that folder, or give another out to begin anew.",
        )
        _verify(cache / begun_on, settings.verify_data, "restore that folder")
        return cache / begun_on
    if prepared.is_prepared(settings):
        return folder_of(settings, prepared.prepare(settings, tokenizer))
    source = find_corpus(settings, fresh=settings.verify_data)
    if source.kind == "tokens":
        return token_shards.prepare(source, settings, tokenizer, cache)
    name = _folder_name(source, settings, tokenizer)
    folder = cache / name
    if not folder.exists():
        _check_size(source, settings, begun_on == name)
        cache.mkdir(parents=True, exist_ok=True)
        with waiting_for(cache / f"{name}.lock", "the tokens"):
            if not folder.exists():
                tmp = cache / f".{name}"
                shutil.rmtree(tmp, ignore_errors=True)  # left by a process that was killed; we hold the lock
                tmp.mkdir()
                about = _tokenize(source, settings, tokenizer, tmp)
                write_json(tmp / ABOUT, guard(about))
                tmp.rename(folder)
    _verify(folder, settings.verify_data, "remove that folder to tokenize anew")
    return folder


def folder_of(settings: Data, name: str) -> Path:
    """Return the path of the token folder of this name."""
    return expanded(settings.data_cache, "data_cache") / name


def fingerprint(settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that decides the tokens: the text, the tokenizer and what is held out.

    Raises:
        ConfigError: if there is no such data.
    """
    if prepared.is_prepared(settings):
        return prepared.prepare(settings, tokenizer)
    source = find_corpus(settings)
    if source.kind == "tokens":
        return token_shards.prepare(source, settings, tokenizer, expanded(settings.data_cache, "data_cache")).name
    _check_size(source, settings, folder_of(settings, _folder_name(source, settings, tokenizer)).exists())
    return _fingerprint_of(source, settings, tokenizer)


def contents(settings: Data) -> dict[str, str]:
    """Return the files that the data consists of: their names, by sums of their content.

    Where they are not summed, the data's name stands for them.
    """
    if prepared.is_prepared(settings):
        return prepared.contents(settings)
    source = find_corpus(settings)
    if source.kind in ("stdlib", "hub"):
        return {settings.data: settings.data}
    return dict(zip(source.description[1], map(str, source.files), strict=True))


def _check_size(source: Corpus, settings: Data, allowed: bool) -> None:
    """Check that one process can tokenize the text in a moment, unless it may be of any size."""
    size = 0 if allowed else source.size(settings)
    fraction = 0.0 if settings.validation_fraction == 1.0 else settings.validation_fraction
    options: dict[str, Any] = {
        "data": settings.data,
        "tokenizer": settings.tokenizer,
        "text-field": settings.text_field,
    }
    options |= {"eos-id": settings.eos_id, "validation-fraction": fraction, "out": "FOLDER"}
    usual: dict[str, Any] = {
        "text-field": Data.text_field,
        "eos-id": None,
        "validation-fraction": Data.validation_fraction,
    }
    given = " ".join(f"--{key} {quote(str(value))}" for key, value in options.items() if usual.get(key, "") != value)
    require(
        size <= LARGEST,
        f"data is {settings.data!r}, {size / 1e9:.1f} GB of text, which would take one process long while all ranks "
        f"wait; make tokens of it first: python -m train.prepare {given}, and then give FOLDER in its place.",
    )


def _folder_name(source: Corpus, settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokens-{_fingerprint_of(source, settings, tokenizer)}"


def _fingerprint_of(source: Corpus, settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    version = FORMAT_OF_STDLIB if source.kind == "stdlib" else FORMAT
    return _digest(version, source.description, settings, tokenizer)


def _digest(version: int, description: list[Any], settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    wanted = {
        "format": version,
        "source": description,
        "text_field": settings.text_field,
        "tokenizer": tokenization.facts(tokenizer),
        "validation_fraction": settings.validation_fraction,
    }
    end = tokenization.end_of_document(settings, tokenizer)
    if end != tokenizer.eos_token_id:
        wanted["end"] = end
    return blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()


def _name_of_format_3(settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token folder's name in earlier versions, which used the paths, sizes and times of the files."""
    if settings.data.startswith("hub:"):
        return f"tokens-{_digest(3, [settings.data], settings, tokenizer)}"
    root = expanded(Path(settings.data), "data")
    kinds = (".txt", ".md", ".py", ".jsonl", ".json", ".gz", ".parquet")
    files = [root] if root.is_file() else [f for f in sorted(root.rglob("*")) if f.suffix in kinds and f.is_file()]
    stamps = [(f, f.stat()) for f in files]
    description = [[str(f), s.st_size, s.st_mtime_ns] for f, s in stamps]
    return f"tokens-{_digest(3, description, settings, tokenizer)}"


def read_about(folder: Path) -> About:
    """Read about.json of a token folder.

    Raises:
        ConfigError: if the file is damaged, or is not there.
        RetryError: if it can't be read now.
    """
    try:
        return read_schema(About, folder / ABOUT)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(_damaged(folder, error)) from None
    except OSError as error:
        raise RetryError(f"data_cache holds {folder}, whose {ABOUT} can't be read now ({error.strerror}).") from None


def _verify(folder: Path, fresh: bool, advice: str) -> None:
    """Verify the checksums of the token files. Unless ``fresh``, files unchanged since they were summed are not read.

    Raises:
        ConfigError: if a file is missing or has changed; ``advice`` says what to do.
        RetryError: if a file can't be read now.
    """
    for part, expected in read_about(folder).sha256.items():
        file, actual = folder / f"{part}.bin", ""
        try:
            if file.exists():
                (actual,) = known_sums([file], folder.parent / f"sums-{folder.name}-{part}.json", fresh)
        except OSError as error:
            raise RetryError(f"data_cache holds {file}, which can't be read now ({error.strerror}).") from None
        require(
            actual == expected,
            f"data_cache holds {folder}, whose {part}.bin has changed since it was written; {advice}.",
        )


def summary(folder: Path, settings: Data) -> str:
    """Describe, in one or two sentences for the user, what was read and what was left out."""
    if folder.name.startswith(token_shards.PREFIX):
        return token_shards.summary(folder)
    if folder.name.startswith(prepared.PREFIX):
        return prepared.summary(settings)
    about = read_about(folder)
    try:
        left_out = find_corpus(settings).left_out
    except ConfigError:  # an old run keeps its tokens even if its corpus would be rejected now
        left_out = {}
    return described(about, about.tokens, left_out)


def _damaged(folder: Path, error: Exception) -> str:
    return f"data_cache holds {folder}, which is damaged ({first_line(error)}); remove that folder to tokenize anew."


def open_tokens(folder: Path, settings: Data, vocabulary: int) -> tuple[Blocks, Blocks]:
    """Memory-map the training and validation tokens of a folder that :func:`prepare` has returned.

    Raises:
        ConfigError: if they have been damaged since, or changed.
    """
    if folder.name.startswith(token_shards.PREFIX):
        return token_shards.open_shards(folder, settings, vocabulary)
    if folder.name.startswith(prepared.PREFIX):
        return prepared.open_prepared(folder.name, settings)
    return open_blocks(folder, settings.sequence_length)


def open_blocks(folder: Path, length: int) -> tuple[Blocks, Blocks]:
    """Memory-map the training and validation tokens as blocks of ``length`` tokens.

    Raises:
        ConfigError: if the folder has been damaged since it was written.
    """
    about = read_about(folder)
    dtype = np.dtype(about.dtype)
    parts = []
    for part in ("train", "validation"):
        file, count = folder / f"{part}.bin", about.tokens[part]
        try:
            size = file.stat().st_size
            if size != count * dtype.itemsize:
                raise ValueError(f"{file.name} has {size} bytes, and {ABOUT} says {count} tokens of {dtype.itemsize}")
            parts.append(Blocks((mapped(file, dtype, 0, count),) if count else (), length))
        except (OSError, ValueError) as error:
            raise ConfigError(_damaged(folder, error)) from None
    return parts[0], parts[1]


def _tokenize(source: Corpus, settings: Data, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write train.bin and validation.bin, and return the content of about.json.

    The documents with the smallest hashes are held out, so that a copy of a held-out document is held out too.

    Raises:
        ConfigError: if there is no text, a part would be empty, or the corpus has changed meanwhile.
    """
    read = Read()
    hashes = [tokenization.hash_of(text) for text in source.documents(settings, read)]
    count = len(set(hashes))
    held_out = round(settings.validation_fraction * count)
    require(count > 0, f"data is {settings.data!r}, which holds no text.")
    require(
        0 < held_out < count or settings.validation_fraction in (0.0, 1.0),
        f"validation_fraction is {settings.validation_fraction}, which holds out {held_out} of {count} documents; "
        "both parts need at least one.",
    )
    threshold = sorted(set(hashes))[held_out - 1] if held_out else -1
    dtype = tokenization.dtype_for(len(tokenizer))
    tokens = {"train": 0, "validation": 0}
    end = tokenization.end_of_document(settings, tokenizer)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        again = Read()
        numbered = zip(hashes, source.documents(settings, again), strict=False)
        while batch := list(islice(numbered, 256)):
            arrays = tokenization.encode(tokenizer, [text for _, text in batch], end, source.kind != "stdlib")
            for (hashed, _), array in zip(batch, arrays, strict=True):
                part, file = ("validation", validation) if hashed <= threshold else ("train", train)
                array.tofile(file)
                tokens[part] += len(array)
        for file in (train, validation):
            file.flush()
            os.fsync(file.fileno())
    require(
        read.bytes == again.bytes and find_corpus(settings).description == source.description,
        f"data is {settings.data!r}, which has changed while it was read; "
        "start the same command again once it no longer changes.",
    )
    sums = {part: checksum(folder / f"{part}.bin")[1] for part in tokens}
    return {
        "source": source.description,
        "dtype": dtype.name,
        "tokens": tokens,
        "sha256": sums,
        "documents": {"train": count - held_out, "validation": held_out},
        **read.facts(),
        "left_out": source.left_out,
    }
