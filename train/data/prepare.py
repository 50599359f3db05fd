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
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from train.common.errors import ConfigError, RetryError, require
from train.common.files import expanded, load_file, make_folder, sync, write_json, write_text
from train.common.progress import Progress
from train.common.schemas import PreparedFile, PreparedPart, guard
from train.data import shard_writer, tokenization
from train.data.config import Prepare
from train.data.corpus import PREPARED, Corpus, find_corpus
from train.data.prepared import WORK, check_sizes, is_prepared
from train.data.readers import Read, shown
from train.data.shard_writer import PARTS, write_shards
from train.data.sources import YAML

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART, LARGEST_PART = 2**24, 2**29
"""Bytes of text that a process tokenizes in one part, and that all of them do at most."""


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
    text = blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
    wanted = f"{text}-{settings.validation_fraction!r}"
    make_folder(out, "out")
    try:
        (out / WORK).mkdir(exist_ok=True)
        with FileLock(out / WORK / "lock", timeout=0):
            if not (out / PREPARED).exists():
                _make(settings, source, tokenizer, end, out, text, wanted)
        shutil.rmtree(out / WORK)
    except Timeout:
        raise ConfigError(f"out is {out}, where another train.prepare is at work; wait for it.") from None
    except UnicodeEncodeError:
        raise ConfigError(f"out is {shown(out)}, which is no UTF-8; give a folder of another name.") from None
    except OSError as error:
        raise RetryError(f"out is {out}, which can't be written: {error.strerror or error}.") from None
    about = load_file(PreparedFile, out / PREPARED)
    require(about.digest == wanted, f"out is {out}, which holds other tokens; give another folder.")
    check_sizes(out, about, str(out))
    return _summary(out, about)


def _make(
    settings: Prepare,
    source: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    end: int | None,
    out: Path,
    text: str,
    wanted: str,
) -> None:
    """Make the tokens, or go on making them. ``text`` stands for the parts, and ``wanted`` for the shards.

    Raises:
        ConfigError: as :func:`prepare`.
    """
    begun = out / WORK / "text"
    ours = r"\.prepare" if not begun.exists() else r"\.prepare|(train|validation)-\d+\.bin"
    strangers = sorted(path.name for path in out.iterdir() if not re.fullmatch(ours, path.name))
    if strangers:
        shutil.rmtree(out / WORK)
        raise ConfigError(f"out is {out}, which holds {shown(strangers[0])}; give a new or an empty folder.")
    if begun.exists():
        require(
            begun.read_text() == text,
            f"out is {out}, where other text (or with other settings) has been begun; give another folder.",
        )
    else:
        write_text(begun, text)
    for left in out.glob("*.bin"):  # of shards that were cut by another fraction
        left.unlink()
    parts, read = _tokenize(settings, source, tokenizer, end, out / WORK)
    require(
        find_corpus(settings).description == source.description,
        f"data is {settings.data!r}, which has changed while it was read; remove {out / WORK} and start again once it "
        "no longer changes.",
    )
    content = {
        **write_shards(parts, out, tokenization.dtype_for(len(tokenizer)), settings.validation_fraction),
        "digest": wanted,
        "tokenizer": tokenization.digest(tokenizer),
        "tokenizer_name": settings.tokenizer,
        "eos_id": end,
        **read.facts(),
        "left_out": source.left_out,
    }
    write_json(out / PREPARED, guard(content))


def _summary(out: Path, about: PreparedFile) -> str:
    counts = " and ".join(f"{about.tokens[part]} tokens {what}" for part, what in PARTS.items())
    return f"{out}: {counts}, of {about.read} documents, in {len(about.shards)} shards. Train on it with --data {out}."


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
    import multiprocess

    datasets.disable_progress_bars()
    tmp = part.with_name(f".{part.name}")
    tmp.mkdir()
    text = datasets.Dataset.from_dict(
        {"text": texts}, features=datasets.Features({"text": datasets.Value("large_string")})
    )
    try:
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
    except (RuntimeError, multiprocess.ProcessError) as error:
        cause: BaseException | None = error
        while cause is not None:  # datasets waits for its processes meanwhile, and not for long
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            cause = cause.__context__
        raise RetryError("a process that tokenizes has died (for want of memory?); the same command goes on.") from None
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
    require(
        int(documents[0].max()) < shard_writer.LONGEST,
        f"document {read.documents - len(hashes) + int(documents[0].argmax()) + 1} has {documents[0].max()} tokens, "
        f"more than a shard's {shard_writer.LONGEST}; divide it.",
    )
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
        "hash": np.array([tokenization.hash_of(text) for text in batch["text"]], np.uint64),
    }


def _read_of(part: Path) -> Read:
    """Return what had been read when a part was written.

    Raises:
        ConfigError: if the part is damaged.
    """
    read = load_file(PreparedPart, part / "about.json").read
    return Read(**{**read, "dropped": Counter(read["dropped"])})
