"""Tokens that were made elsewhere: recognised, checked once, and memory-mapped where they are.

Known, by their content, are

* the shards of llm.c and modded-nanogpt: 256 int32 before the tokens, of which the first is 20240520 (uint16) or
  20240801 (uint32), and the third the number of tokens;
* Megatron's .bin, with its .idx beside it;
* .npy, of one dimension;
* files without a header, whose dtype ``--token-dtype`` tells: .bin, datatrove's .ds, and what dolma calls .npy.

In the order of their names they are one stream of tokens, of which the last are held out.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from train.common.errors import ConfigError, first_line, require
from train.common.files import load_file, write_json
from train.common.schemas import ShardsFile, guard
from train.data.blocks import Blocks, mapped
from train.data.config import Data
from train.data.corpus import Corpus, files_of, waiting_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX, ABOUT = "shards-", "about.json"
HEADERS = {20240520: "uint16", 20240801: "uint32"}
"""The first number in a header of llm.c's, and what follows it."""
HEADER = 1024
"""Its size in bytes."""
VERSIONS = {"uint16": 1, "uint32": 7}
"""The second number, by the tokens' type."""
NUMPY = b"\x93NUMPY"
MEGATRON, MEGATRON_DTYPES = b"MMIDIDX\0\0", {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CHUNK = 2**24
"""Tokens that are looked at at once."""


def header(dtype: str, tokens: int) -> bytes:
    """Return the header of a shard of so many tokens, as llm.c's tools write it."""
    magic = next(number for number, known in HEADERS.items() if known == dtype)
    return np.array([magic, VERSIONS[dtype], tokens] + [0] * 253, "<i4").tobytes()


class Shard(NamedTuple):
    """A file of tokens."""

    file: Path
    dtype: str
    offset: int
    """Bytes before the tokens."""
    length: int
    """In tokens."""

    def tokens(self) -> np.ndarray:
        """Memory-map them, for reading all: [length]."""
        return np.memmap(self.file, self.dtype, "r", self.offset, (self.length,))

    def about(self) -> list[Any]:
        """What it is, whatever it is called, as plain data."""
        return [self.dtype, self.offset, self.length]


def read_shard(file: Path, headerless: str, whole: bool) -> Shard:
    """Recognise a file by its content.

    Args:
        file: .bin, .ds or .npy.
        headerless: the dtype of one that has neither header nor index.
        whole: look at all of an index, not at its header alone.

    Raises:
        ConfigError: if it is damaged, or holds no tokens in one dimension.
        OSError: if it can't be read.
    """
    index = file.with_suffix(".idx")
    with file.open("rb") as opened:
        header = opened.read(HEADER)
    if header.startswith(NUMPY):
        shard = _numpy(file)
    elif index.is_file():
        shard = _megatron(file, index, whole)
    else:
        magic, _, count = np.frombuffer(header[:12], "<i4") if len(header) == HEADER else (0, 0, 0)
        if int(magic) in HEADERS:
            shard = Shard(file, HEADERS[int(magic)], HEADER, int(count))
        else:
            shard = _headerless(file, headerless)
    size, wanted = file.stat().st_size, shard.offset + shard.length * np.dtype(shard.dtype).itemsize
    require(size == wanted, f"{file} has {size} bytes, and its header tells of {wanted}; it is cut short, or damaged.")
    require(shard.length > 0, f"{file} holds no tokens.")
    return shard


def _headerless(file: Path, dtype: str) -> Shard:
    size, each = file.stat().st_size, np.dtype(dtype).itemsize
    require(
        size % each == 0,
        f"{file} has {size} bytes and no header, which is no number of {dtype}; give its --token-dtype.",
    )
    if dtype == "uint16" and size >= 4:
        first = np.memmap(file, np.uint16, "r", 0, (min(size // 4 * 2, 2**16),))
        require(
            bool(first[1::2].any()) or not first.any(),
            f"{file} is read as uint16, and this looks like uint32, since every other number is 0; give --token-dtype.",
        )
    return Shard(file, dtype, 0, size // each)


def _numpy(file: Path) -> Shard:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{file} is not a .npy file: {first_line(error)}.") from None
    require(
        array.ndim == 1 and array.dtype.kind in "ui",
        f"{file} holds {array.dtype} of shape {array.shape}; it must be integers in one dimension.",
    )
    return Shard(file, array.dtype.str, file.stat().st_size - array.nbytes, len(array))


def _megatron(file: Path, index: Path, whole: bool) -> Shard:
    """Of Megatron's index only what tells that its sequences follow one another, as they do where it writes them."""
    head = len(MEGATRON) + 8 + 1 + 8 + 8
    with index.open("rb") as opened:
        content = opened.read(head)
    require(content[: len(MEGATRON)] == MEGATRON, f"{index} is not an index of Megatron's.")
    require(len(content) == head, f"{index} is cut short.")
    code, sequences = content[len(MEGATRON) + 8], int(np.frombuffer(content, "<u8", 1, len(MEGATRON) + 9)[0])
    require(code in MEGATRON_DTYPES, f"{index} has the dtype {code}, which holds no tokens.")
    require(index.stat().st_size >= head + 12 * sequences, f"{index} is cut short.")
    dtype = np.dtype(MEGATRON_DTYPES[code])
    count = file.stat().st_size // dtype.itemsize
    if whole and sequences:
        lengths = np.memmap(index, "<i4", "r", head, (sequences,))
        pointers = np.memmap(index, "<i8", "r", head + 4 * sequences, (sequences,))
        count = 0
        for begin in range(0, sequences, CHUNK):
            here = lengths[begin : begin + CHUNK].astype(np.int64)
            begins = (count + np.cumsum(here) - here) * dtype.itemsize
            require(
                bool((here >= 0).all()) and np.array_equal(pointers[begin : begin + CHUNK], begins),
                f"{index} has sequences that do not follow one another in {file.name}, which is not supported.",
            )
            count += int(here.sum())
    return Shard(file, dtype.str, 0, count)


def shards_of(settings: Data, files: tuple[Path, ...], vocabulary: int, whole: bool = True) -> list[Shard]:
    """Return the shards in these files, in their order; see :func:`read_shard`.

    Raises:
        ConfigError: if one of them is not what it should be.
    """
    headerless = settings.token_dtype
    if headerless == "auto":
        headerless = "uint16" if vocabulary <= 2**16 else "uint32"
    try:
        return [read_shard(file, headerless, whole) for file in files]
    except OSError as error:
        raise ConfigError(f"data is {settings.data!r}, which can't be read: {error.strerror}.") from None


def prepare(source: Corpus, settings: Data, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Path:
    """Check the ids of all tokens, unless that is done already, and return the folder that says so.

    Raises:
        ConfigError: if a token is none of the tokenizer's, or one part would be empty.
    """
    vocabulary = len(tokenizer)
    shards = shards_of(settings, source.files, vocabulary)
    # Everything that decides the tokens.
    wanted = json.dumps([1, source.description, [shard.dtype for shard in shards], settings.validation_fraction])
    folder = cache / (PREFIX + blake2b(wanted.encode(), digest_size=8).hexdigest())
    if not (folder / ABOUT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_for(cache / f"{folder.name}.lock", "the tokens' ids"):
            if not (folder / ABOUT).exists():
                greatest = list(map(_greatest, shards))
                count = sum(shard.length for shard in shards)
                held_out = round(settings.validation_fraction * count)
                content = {"shards": [shard.about() for shard in shards], "greatest": greatest}
                tokens = {"train": count - held_out, "validation": held_out}
                write_json(folder / ABOUT, guard({**content, "tokens": tokens, "left_out": source.left_out}))
    about = load_file(ShardsFile, folder / ABOUT)
    for shard, last in zip(shards, about.greatest, strict=True):
        require(
            last < vocabulary,
            f"data is {settings.data!r}, whose {shard.file.name} holds the token {last}, and tokenizer "
            f"{settings.tokenizer!r} has {vocabulary}; give the --tokenizer that made it (or its --token-dtype).",
        )
    return folder


def _greatest(shard: Shard) -> int:
    """Return the greatest id.

    Raises:
        ConfigError: if one is negative.
    """
    tokens = shard.tokens()
    parts = [tokens[begin : begin + CHUNK] for begin in range(0, shard.length, CHUNK)]
    least, greatest = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
    require(least >= 0, f"{shard.file} holds the token {least}; tokens are numbers from 0.")
    return greatest


def open_shards(folder: Path, settings: Data, vocabulary: int) -> tuple[Blocks, Blocks]:
    """Memory-map the tokens to train on and those that are held out.

    Raises:
        ConfigError: if they are not those that were checked.
    """
    about = load_file(ShardsFile, folder / ABOUT)
    shards = shards_of(settings, files_of(settings), vocabulary, whole=False)
    require(
        [shard.about() for shard in shards] == about.shards,
        f"data is {settings.data!r}, which has changed while it was read; start the same command again.",
    )
    training: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    left = about.tokens["train"]
    for shard in shards:
        tokens = mapped(shard.file, shard.dtype, shard.offset, shard.length)
        here = min(left, shard.length)
        training += [tokens[:here]] if here else []
        held_out += [tokens[here:]] if here < shard.length else []
        left -= here
    length = settings.sequence_length
    return Blocks(tuple(training), length), Blocks(tuple(held_out), length)


def summary(folder: Path) -> str:
    """Describe, in a sentence or two for the user, what is read and what is left out."""
    about = load_file(ShardsFile, folder / ABOUT)
    text = f"data: {len(about.shards)} token shards, {about.tokens['train']} tokens to train on and the last "
    text += f"{about.tokens['validation']} held out."
    missing = [f"{len(names)} files {reason} (such as {names[0]})" for reason, names in about.left_out.items()]
    return text + (f" Left out: {', '.join(missing)}." if missing else "")
