"""A corpus as fixed blocks of tokens: read, tokenized once, memory-mapped, and served by index arithmetic.

The batch at step t is a pure function of (seed, t): it depends neither on the number of ranks nor on how the batch is
split into micro-batches, so that a resumed run needs no loader state and runs with other betas see the same batches.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from train.folder import checksum
from train.settings import Data, SettingsError, first_line, require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".gz": "json",
    ".parquet": "parquet",
}
FORMAT = 3  # of the token files; a change makes new ones


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of ``length`` tokens in one long array (a rest that fills no block is left out)."""

    tokens: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Tokens of the blocks with these numbers: int64, shape [len(indices), length]."""
        blocks = self.tokens[: len(self) * self.length].reshape(-1, self.length)
        return torch.from_numpy(blocks[indices].astype(np.int64))


def batch_indices(step: int, batch: int, blocks: int, seed: int) -> np.ndarray:
    """Which blocks make the global batch of step ``step`` (counted from 0): shape [batch].

    Every epoch is a fresh permutation (random reshuffling), a function of (seed, epoch) alone; a batch may span two.
    """
    where = np.arange(step * batch, (step + 1) * batch)
    result = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(where // blocks):
        here = where // blocks == epoch
        result[here] = _order(seed, int(epoch), blocks)[where[here] % blocks]
    return result


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """ "byt5" (bytes, no download) or any tokenizer of transformers.

    Raises:
        SettingsError: if there is none of that name.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == "byt5":
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a tokenizer's files run into
        raise SettingsError(f"tokenizer is {name!r}, which transformers can't load: {first_line(error)}") from None


def prepare(settings: Data, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Tokenize the corpus unless that is done already, and return the folder of its token files.

    Safe to call from many processes and hosts at once: one of them works under a file lock, writes aside and renames.

    Raises:
        SettingsError: if the data can't be read or gives no training or no validation text.
    """
    folder = folder_of(settings, fingerprint(settings, tokenizer))
    cache, name = folder.parent, folder.name
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if not folder.exists():
            aside = cache / f".{name}"
            shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed; the lock is ours
            aside.mkdir()
            source = _Source.of(settings)
            counts = _tokenize(source.read(settings), settings, tokenizer, aside)
            (aside / "about.json").write_text(json.dumps({"source": source.description, **counts}, indent=1))
            aside.rename(folder)
    return folder


def folder_of(settings: Data, fingerprint: str) -> Path:
    """Where the tokens of the text with this fingerprint are, or are to be."""
    return _expanded(settings.data_cache, "data_cache") / f"tokens-{fingerprint}"


def fingerprint(settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with whatever decides the tokens: the text, the tokenizer, what is held out.

    Raises:
        SettingsError: if there is no such data.
    """
    wanted = {
        "format": FORMAT,
        "source": _Source.of(settings).description,
        "text_field": settings.text_field,
        "tokenizer": _whole(tokenizer),
        "validation_fraction": settings.validation_fraction,
    }
    return blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()


def verify(folder: Path) -> None:
    """See whether the token files are as they were written.

    Raises:
        SettingsError: if one isn't.
    """
    for part, expected in _about(folder)["sha256"].items():
        try:
            found = checksum(folder / f"{part}.bin")[1]
        except OSError as error:
            found = error.strerror or "unreadable"
        require(
            found == expected,
            f"data_cache holds {folder}, whose {part}.bin has changed since it was written; remove that folder to tokenize anew.",
        )


def _about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        if not {"dtype", "tokens", "sha256"} <= about.keys():
            raise ValueError("about.json is not what this program writes")
    except (OSError, ValueError, AttributeError) as error:
        raise SettingsError(_damaged(folder, error)) from None
    return about


def _damaged(folder: Path, error: Exception) -> str:
    return f"data_cache holds {folder}, which is damaged ({first_line(error)}); remove that folder to tokenize anew."


def _whole(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Everything that decides which tokens it makes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of the fast ones: normalizer, merges, vocabulary
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, content, tokenizer.eos_token_id, str(tokenizer.special_tokens_map)]


def open_blocks(folder: Path, length: int) -> tuple[Blocks, Blocks]:
    """The training and the validation blocks, memory-mapped.

    Raises:
        SettingsError: if the folder has been damaged since it was written.
    """
    about = _about(folder)
    try:
        dtype = np.dtype(about["dtype"])
        train, validation = (
            Blocks(np.memmap(folder / f"{part}.bin", dtype, "r", shape=(about["tokens"][part],)), length)
            for part in ("train", "validation")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(_damaged(folder, error)) from None
    return train, validation


def _expanded(path: Path, field: str) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise SettingsError(f"{field} is {path}, whose user does not exist.") from None


@dataclass(frozen=True)
class _Source:
    """Where documents come from, and a description that changes when they do."""

    kind: str
    files: tuple[Path, ...]
    description: list[Any]

    @staticmethod
    def of(settings: Data) -> _Source:
        if settings.data == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
            files = tuple(f for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts))
            return _Source(
                "text", files, ["stdlib", sys.version, [[str(f.relative_to(root)), f.stat().st_size] for f in files]]
            )
        if settings.data.startswith("hub:"):
            require(len(settings.data) > 4, f"data is {settings.data!r}; give hub:NAME or hub:NAME:CONFIGURATION.")
            return _Source("hub", (), [settings.data])
        root = _expanded(Path(settings.data), "data")
        require(
            root.exists(),
            f'data is {settings.data!r}, which does not exist; give a file, a folder, "stdlib" or "hub:NAME".',
        )
        files = (
            (root,)
            if root.is_file()
            else tuple(f for f in sorted(root.rglob("*")) if f.suffix in KINDS and f.is_file())
        )
        kinds = {KINDS.get(f.suffix, "") for f in files}
        require(
            bool(files) and "" not in kinds,
            f"data is {settings.data!r}, which holds no text; known are {', '.join(KINDS)}.",
        )
        require(
            len(kinds) == 1,
            f"data is {settings.data!r}, which mixes {' and '.join(sorted(kinds))} files; give one kind.",
        )
        return _Source(kinds.pop(), files, [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files])

    def read(self, settings: Data) -> Dataset:
        """All documents, as a data set with the text in ``settings.text_field``."""
        import datasets

        datasets.disable_progress_bars()
        if self.kind == "text":
            texts = [f.read_text(encoding="utf-8", errors="replace") for f in self.files]
            return datasets.Dataset.from_dict({settings.text_field: [text for text in texts if text.strip()]})
        try:
            if self.kind == "hub":
                _, name, *configuration = settings.data.split(":")
                loaded = datasets.load_dataset(name, *configuration, split="train")
            else:
                loaded = datasets.load_dataset(self.kind, data_files=[str(f) for f in self.files], split="train")
        except Exception as error:  # whatever a broken file, an empty one or the network runs into
            raise SettingsError(f"data is {settings.data!r}, which can't be read: {first_line(error)}") from None
        require(
            settings.text_field in loaded.column_names,
            f"text_field is {settings.text_field!r}, but {settings.data!r} has the columns {', '.join(loaded.column_names)}.",
        )
        return loaded


def _tokenize(documents: Dataset, settings: Data, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write train.bin and validation.bin; return what is to be known about them.

    The documents with the smallest hashes are held out, so that a copy of a held-out document is held out too.
    """
    hashes = [blake2b(text.encode(), digest_size=8).digest() for text in _texts(documents, settings)]
    count = len(set(hashes))
    held_out = round(settings.validation_fraction * count)
    require(count > 0, f"data is {settings.data!r}, which holds no text.")
    require(
        0 < held_out < count,
        f"validation_fraction is {settings.validation_fraction}, which holds out {held_out} of {count} documents; "
        "both parts need at least one.",
    )
    threshold = sorted(set(hashes))[held_out - 1]
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    tokens = {"train": 0, "validation": 0}
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        numbered = zip(hashes, _texts(documents, settings), strict=True)
        while batch := list(islice(numbered, 256)):
            encoded = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for (hashed, _), ids in zip(batch, encoded, strict=True):
                part, file = ("validation", validation) if hashed <= threshold else ("train", train)
                np.array(ids + end, dtype).tofile(file)
                tokens[part] += len(ids) + len(end)
        for file in (train, validation):
            file.flush()
            os.fsync(file.fileno())
    sums = {part: checksum(folder / f"{part}.bin")[1] for part in tokens}
    return {
        "dtype": dtype.name,
        "tokens": tokens,
        "sha256": sums,
        "documents": {"train": count - held_out, "validation": held_out},
    }


def _texts(documents: Dataset, settings: Data) -> Iterator[str]:
    for batch in documents.select_columns([settings.text_field]).iter(batch_size=256):
        for text in batch[settings.text_field]:
            require(
                text is None or isinstance(text, str),
                f"text_field is {settings.text_field!r}, which holds {text!r:.40} in {settings.data!r}; it must hold text.",
            )
            yield text or ""
