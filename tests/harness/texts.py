"""Documents to make a corpus of, files of them, and what becomes of a corpus as tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from train.data import token_files, tokenization
from train.data.config import Data

TEXTS = [f"doc number {i} " * 5 for i in range(20)]
MORE = [f"second number {i} " * 5 for i in range(20)]


def jsonl(path: Path, rows: list[Any], opener: Callable[..., Any] = open) -> None:
    """One object a line; a string is a row's text, and bytes are a line as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as file:
        for row in rows:
            line = (
                row if isinstance(row, bytes) else json.dumps({"text": row} if isinstance(row, str) else row).encode()
            )
            file.write(line + b"\n")


def tokens_of(place: Path, cache: Path, **settings: Any) -> tuple[Path, list[str]]:
    """The folder of the tokens, and the documents in it: what lies between two ends."""
    wanted = Data(data=str(place), data_cache=cache, validation_fraction=0.1, **settings)
    folder = token_files.prepare(wanted, tokenization.load_tokenizer("byt5"))
    ids = np.concatenate([part.parts[0] for part in token_files.open_blocks(folder, 2)])
    assert ((ids == 1) | (ids >= 3)).all()
    documents = np.split(ids, np.flatnonzero(ids == 1) + 1)[:-1]
    return folder, [bytes((d[:-1] - 3).astype(np.uint8)).decode() for d in documents]


def zstd(content: bytes) -> bytes:
    """One Zstandard frame."""
    compressed: bytes = pyarrow.compress(content, "zstd", asbytes=True)
    return compressed
