"""A folder of token shards that :mod:`train.prepare` has made: recognised, checked and memory-mapped.

prepared.json          what the tokens are, and the sums of the shards
train-00000.bin, …     to train on, in the format of llm.c: 256 int32 (magic, version, number of tokens), and tokens
validation-00000.bin   held out
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import ConfigError, RetryError, require
from train.common.files import expanded, load_file
from train.common.schemas import PreparedFile
from train.data import tokenization
from train.data.blocks import Blocks, mapped
from train.data.config import Data, Text
from train.data.corpus import PREPARED, described, known_sums
from train.data.token_shards import HEADER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX, WORK = "prepared-", ".prepare"


def is_prepared(settings: Text) -> bool:
    """Return whether data is such a folder.

    Raises:
        ConfigError: if train.prepare has begun to make it, and not finished.
    """
    if settings.data == "stdlib":
        return False
    root = expanded(Path(settings.data), "data")
    if (root / PREPARED).is_file():
        return True
    require(
        not (root / WORK).exists(),
        f"data is {settings.data!r}, which train.prepare has not finished; start the same train.prepare again.",
    )
    return False


def prepare(settings: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Check the folder, and return a name that stands for its tokens.

    Shards of the size and time that prepared.json says are not read, unless settings.verify_data says so. Others are
    read once, since a copy has other times.

    Raises:
        ConfigError: if it was made with another tokenizer, or a shard is missing or has changed.
        RetryError: if a shard can't be read now.
    """
    root, about = _read(settings)
    facts = tokenization.digest(tokenizer)
    require(
        facts == about.tokenizer,
        f"data is {settings.data!r}, which was prepared with the tokenizer {about.tokenizer_name!r}, and tokenizer is "
        f"{settings.tokenizer!r}, which is another or has changed; give the same.",
    )
    end = tokenization.end_of_document(settings, tokenizer)
    require(
        end == about.eos_id or (settings.eos_id is None and not settings.document_mask),
        f"data is {settings.data!r}, where documents end with {about.eos_id}, and eos_id is {end}; make them agree.",
    )
    held_out = about.tokens["validation"]
    require(
        held_out == 0 or settings.validation_fraction not in (0.0, 1.0),
        f"data is {settings.data!r}, of which {held_out} tokens were held out when it was prepared, and here "
        f"{'nothing' if settings.validation_fraction == 0.0 else 'all'} of it should be; "
        "prepare it with --validation-fraction 0.",
    )
    require(
        held_out > 0 or settings.validation_fraction in (0.0, 1.0),
        f"data is {settings.data!r}, of which nothing was held out when it was prepared; give a --validation set and "
        "--validation-fraction 0, or prepare it with another --validation-fraction.",
    )
    check_sizes(root, about, settings.data)
    for shard in about.shards:
        file = root / shard.name
        try:
            if settings.verify_data or file.stat().st_mtime_ns != shard.modified:
                cache = expanded(settings.data_cache, "data_cache")
                cache.mkdir(parents=True, exist_ok=True)
                kept = cache / f"sums-{blake2b(os.fsencode(file.resolve()), digest_size=8).hexdigest()}.json"
                require(
                    known_sums([file], kept, settings.verify_data) == [shard.sha256],
                    f"data is {settings.data!r}, whose {shard.name} has changed since it was prepared; copy it again.",
                )
        except OSError as error:
            raise RetryError(
                f"data is {settings.data!r}, whose {shard.name} can't be read now ({error.strerror})."
            ) from None
    return _name(about)


def check_sizes(root: Path, about: PreparedFile, name: str) -> None:
    """Check that all shards are there and of the size they should have.

    Raises:
        ConfigError: if one is not; ``name`` is what the user calls the folder.
        RetryError: if that can't be found out now.
    """
    itemsize = int(about.dtype.removeprefix("uint")) // 8
    for shard in about.shards:
        wanted = HEADER + shard.tokens * itemsize
        try:
            size = (root / shard.name).stat().st_size
        except FileNotFoundError:
            raise ConfigError(f"data is {name!r}, whose {shard.name} is missing; copy it again.") from None
        except OSError as error:
            raise RetryError(f"data is {name!r}, whose {shard.name} can't be read now ({error.strerror}).") from None
        require(
            size == wanted,
            f"data is {name!r}, whose {shard.name} has {size} bytes and should have {wanted}; copy it again.",
        )


def open_prepared(name: str, settings: Data) -> tuple[Blocks, Blocks]:
    """Memory-map the tokens to train on, and those that are held out.

    All of them are held out if the settings' ``validation_fraction`` is 1.

    Raises:
        ConfigError: if they are not those that :func:`prepare` has checked.
    """
    root, about = _read(settings)
    require(
        _name(about) == name,
        f"data is {settings.data!r}, which has changed while it was read; start the same command again.",
    )
    parts: dict[str, list] = {"train": [], "validation": []}
    try:
        for shard in about.shards:
            parts[shard.name.split("-")[0]].append(mapped(root / shard.name, about.dtype, HEADER, shard.tokens))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data is {settings.data!r}, which can't be read: {error}.") from None
    if settings.validation_fraction == 1.0:
        parts = {"train": [], "validation": [*parts["train"], *parts["validation"]]}
    train, validation = (Blocks(tuple(parts[part]), settings.sequence_length) for part in ("train", "validation"))
    return train, validation


def contents(settings: Data) -> dict[str, str]:
    """Return the names of the shards by their sums."""
    root, about = _read(settings)
    return {shard.sha256: str(root / shard.name) for shard in about.shards}


def summary(settings: Data) -> str:
    """Describe, in a sentence or two for the user, what was prepared and what was left out then."""
    about = _read(settings)[1]
    return described(about, about.tokens, about.left_out)


def _read(settings: Data) -> tuple[Path, PreparedFile]:
    root = expanded(Path(settings.data), "data")
    return root, load_file(PreparedFile, root / PREPARED)


def _name(about: PreparedFile) -> str:
    """Of what decides the tokens, wherever they are and whenever they were written."""
    content = [about.dtype, about.tokenizer, about.eos_id, [[s.name, s.tokens, s.sha256] for s in about.shards]]
    return PREFIX + blake2b(repr(content).encode(), digest_size=8).hexdigest()
