"""Text to token shards, on all cores of a host, in memory that does not depend on the size of the text.

The text is read in order and tokenized in parts, which are kept in a hidden folder, so that a run that was cut goes on
after the last of them. Then the documents with the smallest hashes are held out, as :mod:`train.data.token_files` does,
and all tokens are written once more, in their order, as the shards of :mod:`train.data.prepared`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from train.common.errors import ConfigError, RetryError, first_line, require
from train.common.files import checksum, expanded, load_file, make_folder, sync, write_json, write_text
from train.common.progress import Progress
from train.common.schemas import PreparedFile, PreparedPart, guard
from train.data import tokenization
from train.data.config import Prepare
from train.data.corpus import PREPARED, Corpus, find_corpus
from train.data.prepared import HEADER, VERSIONS, WORK, is_prepared
from train.data.readers import Read
from train.data.sources import YAML

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART, LARGEST_PART = 2**24, 2**29
"""Bytes of text that a process tokenizes in one part, and that all of them do at most."""
SHARD = 10**8
"""Tokens after which a shard ends, at the end of a document."""
BUCKETS = 256
"""Parts of the range of hashes that are looked at one after the other."""


def prepare(settings: Prepare) -> str:
    """Make the folder ``settings.out``, and return what it holds in a sentence or two.

    Raises:
        ConfigError: if the settings are invalid, the text can't be read or changes meanwhile, or the folder holds other
            things.
        RetryError: if something failed that may succeed later, such as a write to a full disk.
    """
    settings.check()
    out = expanded(settings.out, "out")
    tokenizer = tokenization.load_tokenizer(settings.tokenizer)
    end = tokenization.end_of_document(settings, tokenizer)
    require(
        Path(settings.data).suffix.lower() not in YAML,
        f"data is {settings.data!r}, which is a mixture; prepare each of its sources that is text.",
    )
    tokens = is_prepared(settings) or (source := find_corpus(settings)).kind == "tokens"
    require(not tokens, f"data is {settings.data!r}, which holds tokens already; give it as --data of train.pretrain.")
    is_path = source.kind not in ("hub", "stdlib")
    root = expanded(Path(settings.data), "data").resolve()
    require(
        not is_path or not out.resolve().is_relative_to(root),
        f"out is {out}, inside data, so its files would become part of the corpus; give another folder.",
    )
    described = [source.description, settings.text_field, tokenization.digest(tokenizer), end]
    wanted = blake2b(json.dumps([*described, settings.validation_fraction]).encode(), digest_size=16).hexdigest()
    make_folder(out, "out")
    begun = out / WORK / "text"
    if (out / PREPARED).exists():
        about = load_file(PreparedFile, out / PREPARED)
        require(about.digest == wanted, f"out is {out}, which holds other tokens; give another folder.")
        shutil.rmtree(out / WORK, ignore_errors=True)  # if it was cut just before it did so
        return _summary(out, about)
    ours = r"\.prepare" if not begun.exists() else r"\.prepare|(train|validation)-\d+\.bin"
    strangers = sorted(path.name for path in out.iterdir() if not re.fullmatch(ours, path.name))
    require(not strangers, f"out is {out}, which holds {', '.join(strangers[:1])}; give a new or an empty folder.")
    try:
        (out / WORK).mkdir(exist_ok=True)
        with ExitStack() as held:
            held.enter_context(FileLock(out / WORK / "lock", timeout=0))
            if begun.exists():
                require(
                    begun.read_text() == wanted,
                    f"out is {out}, where other text (or with other settings) has been begun; give another folder.",
                )
            else:
                write_text(begun, wanted)
            parts, read = _tokenize(settings, source, tokenizer, end, out / WORK)
            require(
                find_corpus(settings).description == source.description,
                f"data is {settings.data!r}, which has changed while it was read; remove {out / WORK} and start again "
                "once it no longer changes.",
            )
            content = {
                **_write_shards(settings, out, parts, tokenizer),
                "digest": wanted,
                "tokenizer": tokenization.digest(tokenizer),
                "tokenizer_name": settings.tokenizer,
                "eos_id": end,
                "files": read.files,
                "read": read.documents,
                "bytes": read.bytes,
                "dropped": dict(read.dropped),
                "first": read.first,
                "left_out": source.left_out,
            }
            write_json(out / PREPARED, guard(content))
        shutil.rmtree(out / WORK)
    except Timeout:
        raise ConfigError(f"out is {out}, where another train.prepare is at work; wait for it.") from None
    except RuntimeError as error:  # of datasets
        raise RetryError(f"a process that tokenizes has died: {first_line(error)}; the same command goes on.") from None
    except OSError as error:
        raise RetryError(f"out is {out}, which can't be written: {error.strerror or error}.") from None
    return _summary(out, load_file(PreparedFile, out / PREPARED))


def _summary(out: Path, about: PreparedFile) -> str:
    counts = " and ".join(f"{about.tokens[part]} tokens {what}" for part, what in _PARTS.items())
    return f"{out}: {counts}, of {about.read} documents, in {len(about.shards)} shards. Train on it with --data {out}."


_PARTS: dict[Any, str] = {"train": "to train on", "validation": "held out"}


def _tokenize(
    settings: Prepare, source: Corpus, tokenizer: PreTrainedTokenizerBase, end: int | None, work: Path
) -> tuple[list[Path], Read]:
    """Tokenize the text in parts, but for those that are there, and return their folders and what was read."""
    processes = settings.processes or len(os.sched_getaffinity(0))
    size = min(PART * processes, LARGEST_PART)
    parts = sorted(work.glob("part-*"))
    read = _read_of(parts[-1]) if parts else Read()
    for left in work.glob(".part-*"):
        shutil.rmtree(left)
    sizes = np.cumsum([0, *([file.stat().st_size for file in source.files] or [source.size(settings)])])
    with Progress(int(sizes[-1]) // 10**6, 0, "MB of text", enabled=True) as progress:
        for texts in _batches(source.documents(settings, read), size):
            part = work / f"part-{len(parts):06}"
            _make_part(part, texts, tokenizer, end, source.kind != "stdlib", processes, read)
            parts.append(part)
            # Compressed files hold more text than bytes, and JSON less.
            within = min(
                int(sizes[read.file]) + read.bytes - read.before, int(sizes[min(read.file + 1, len(sizes) - 1)])
            )
            progress.show(within // 10**6, f"{len(parts)} parts, {read.documents} documents")
        progress.show(int(sizes[-1]) // 10**6, f"{len(parts)} parts, {read.documents} documents")
    require(bool(parts), f"data is {settings.data!r}, which holds no text.")
    return parts, read


def _batches(documents: Iterator[str], size: int) -> Iterator[list[str]]:
    """Yield documents in lists of ``size`` bytes of text or more, but for the last."""
    texts: list[str] = []
    held = 0
    for text in documents:
        texts.append(text)
        held += len(text)
        if held >= size:
            yield texts
            texts, held = [], 0
    if texts:
        yield texts


def _make_part(
    part: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    end: int | None,
    as_text: bool,
    processes: int,
    read: Read,
) -> None:
    """Write a part: tokens.bin; documents.npy, the length and hash of each; hashes.npy, those hashes, sorted."""
    import datasets

    datasets.disable_progress_bars()
    tmp = part.with_name(f".{part.name}")
    tmp.mkdir()
    text = datasets.Dataset.from_dict(
        {"text": texts}, features=datasets.Features({"text": datasets.Value("large_string")})
    )
    encoded = text.map(
        _encoded,
        batched=True,
        batch_size=256,
        num_proc=min(processes, len(texts)) if processes > 1 else None,
        remove_columns=["text"],
        features=datasets.Features({"ids": datasets.Value("large_binary"), "hash": datasets.Value("uint64")}),
        fn_kwargs={"tokenizer": tokenizer, "end": end, "as_text": as_text},
        cache_file_name=str(tmp / "encoded.arrow"),
        new_fingerprint=part.name,
    )
    itemsize = tokenization.dtype_for(len(tokenizer)).itemsize
    lengths = []
    with (tmp / "tokens.bin").open("wb") as file:
        for chunk in encoded.data.column("ids").chunks:
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if offsets[-1] > offsets[0]:
                file.write(memoryview(chunk.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
            lengths.append(np.diff(offsets) // itemsize)
    hashes = np.concatenate([np.asarray(chunk) for chunk in encoded.data.column("hash").chunks])
    documents = np.stack([np.concatenate(lengths).astype(np.uint64), hashes])
    del encoded
    for left in tmp.glob("encoded*"):
        left.unlink()
    np.save(tmp / "documents.npy", documents)
    np.save(tmp / "hashes.npy", np.unique(hashes))
    about = {
        "documents": len(hashes),
        "tokens": int(documents[0].sum()),
        "read": {**dataclasses.asdict(read), "dropped": dict(read.dropped)},
    }
    for name in ("tokens.bin", "documents.npy", "hashes.npy"):
        sync(tmp / name)
    write_json(tmp / "about.json", guard(about))
    tmp.rename(part)
    sync(part.parent)


def _encoded(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, end: int | None, as_text: bool
) -> dict[str, Any]:
    arrays = tokenization.encode(tokenizer, batch["text"], end, as_text)
    return {
        "ids": [array.tobytes() for array in arrays],
        "hash": np.array([hash_of(text) for text in batch["text"]], np.uint64),
    }


def hash_of(text: str) -> int:
    """Return the hash that decides whether a document is held out: the first 64 bits of its BLAKE2b."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _read_of(part: Path) -> Read:
    """Return what had been read when a part was written.

    Raises:
        ConfigError: if the part is damaged.
    """
    read = load_file(PreparedPart, part / "about.json").read
    return Read(**{**read, "dropped": Counter(read["dropped"])})


def _threshold(parts: list[Path], settings: Prepare) -> tuple[int, int, int]:
    """Return the greatest hash that is held out (-1 for none), and how many different documents are, of how many.

    Raises:
        ConfigError: if the documents are too few to hold any out.
    """
    sorted_hashes = [np.load(part / "hashes.npy", mmap_mode="r") for part in parts]
    edges = np.arange(1, BUCKETS, dtype=np.uint64) * np.uint64(2**64 // BUCKETS)
    cuts = [[0, *np.searchsorted(each, edges), len(each)] for each in sorted_hashes]

    def bucket(number: int) -> np.ndarray:
        pieces = [each[cut[number] : cut[number + 1]] for each, cut in zip(sorted_hashes, cuts, strict=True)]
        return np.unique(np.concatenate(pieces))

    counts = np.cumsum([len(bucket(number)) for number in range(BUCKETS)])
    count = int(counts[-1])
    held_out = round(settings.validation_fraction * count)
    require(
        0 < held_out < count or settings.validation_fraction == 0.0,
        f"validation_fraction is {settings.validation_fraction}, which holds out {held_out} of {count} documents; "
        "both parts need at least one.",
    )
    if not held_out:
        return -1, 0, count
    number = int(np.searchsorted(counts, held_out))
    before = int(counts[number - 1]) if number else 0
    return int(bucket(number)[held_out - before - 1]), held_out, count


def _write_shards(
    settings: Prepare, out: Path, parts: list[Path], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Write the shards of both parts, and return what prepared.json says of them."""
    threshold, held_out, count = _threshold(parts, settings)
    dtype = tokenization.dtype_for(len(tokenizer))
    tmp = out / WORK / "shards"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    written = {part: _Shards(tmp, part, dtype) for part in _PARTS}
    whole = sum(load_file(PreparedPart, part / "about.json").tokens for part in parts)
    with Progress(whole // 10**6, 0, "M tokens written", enabled=True) as progress:
        for part in parts:
            about = load_file(PreparedPart, part / "about.json")
            lengths, hashes = np.load(part / "documents.npy")
            size = (part / "tokens.bin").stat().st_size // dtype.itemsize
            tokens = np.memmap(part / "tokens.bin", dtype, "r", shape=(size,)) if size else np.empty(0, dtype)
            require(
                len(hashes) == about.documents and len(tokens) == about.tokens == int(lengths.sum()),
                f"{part} is damaged; remove {out / WORK}, and start again.",
            )
            held = hashes <= threshold if threshold >= 0 else np.zeros(len(hashes), bool)
            ends = np.cumsum(lengths.astype(np.int64))
            # Documents in a row that go to the same part are written at once.
            turns = np.flatnonzero(np.diff(held)) + 1
            for first, last in zip([0, *turns], [*turns, len(held)], strict=True):
                begin = int(ends[first - 1]) if first else 0
                written["validation" if held[first] else "train"].write(tokens, begin, ends[first:last])
            progress.show(sum(each.total for each in written.values()) // 10**6)
    shards = list(chain.from_iterable(each.close() for each in written.values()))
    for shard in shards:
        (tmp / shard["name"]).rename(out / shard["name"])
    sync(out)
    return {
        "dtype": dtype.name,
        "tokens": {part: each.total for part, each in written.items()},
        "documents": {"train": count - held_out, "validation": held_out},
        "shards": shards,
    }


class _Shards:
    """Writes tokens to train-00000.bin and so on, or to validation-00000.bin."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype) -> None:
        self.folder, self.part, self.dtype = folder, part, dtype
        self.total = self.within = 0
        self.files: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None

    def write(self, tokens: np.ndarray, begin: int, ends: np.ndarray) -> None:
        """Write the documents of ``tokens`` that begin at ``begin`` and end at ``ends``; a shard ends with one."""
        while begin < ends[-1]:
            if self.file is None:
                self.file, self.within = (self.folder / self._name()).open("wb"), 0
                self.file.write(bytes(HEADER))
            room = np.searchsorted(ends, begin + SHARD - self.within)  # the document that fills the shard is its last
            end = int(ends[min(int(room), len(ends) - 1)])
            tokens[begin:end].tofile(self.file)
            self.within, self.total, begin = self.within + end - begin, self.total + end - begin, end
            if self.within >= SHARD:
                self._end()

    def close(self) -> list[dict[str, Any]]:
        """End the last shard, and return what prepared.json says of all: sums are of what is read back."""
        if self.file is not None:
            self._end()
        for about in self.files:
            path = self.folder / about["name"]
            about["sha256"], about["modified"] = checksum(path)[1], path.stat().st_mtime_ns
        return self.files

    def _name(self) -> str:
        return f"{self.part}-{len(self.files):05}.bin"

    def _end(self) -> None:
        assert self.file is not None
        magic, version = VERSIONS[self.dtype.name]
        self.file.seek(0)
        self.file.write(np.array([magic, version, self.within] + [0] * 253, "<i4").tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.files.append({"name": self._name(), "tokens": self.within})
        self.file = None
