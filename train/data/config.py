"""The data options of a run, as the user gives them."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.common.errors import first_line, require, shown
from train.common.schemas import NAME


@dataclass(frozen=True, kw_only=True)
class Text:
    """What decides the tokens of a text."""

    data: str = "stdlib"
    """The text: "stdlib", a path, "hub:NAME" or "hub:NAME:CONFIGURATION". "stdlib" is Python's standard library.
    Or tokens: a folder that train.prepare made, or a file or a folder of .bin (llm.c's, Megatron's, or without a
    header), .npy or .ds files. Or a mixture: a .yaml file with name, path and weight of each of its sources.
    A path is a file or a folder of .txt/.md/.py, .jsonl/.json or .parquet files.
    All but .parquet may be compressed (.gz, .zst, .bz2 or .xz).
    "hub:" takes the train split of a Hugging Face hub dataset."""
    text_field: str = "text"
    """Name of the column that holds the text, in JSON, Parquet and hub data."""
    tokenizer: str = "byt5"
    """"byt5" (UTF-8 bytes, nothing to download), or the path or hub name of a transformers tokenizer."""
    eos_id: int | None = None
    """The token that ends a document: it is put after each text, and looked for in tokens with --document-mask.
    Default: the tokenizer's end-of-sequence token, if it has one."""
    validation_fraction: float = 0.05
    """Fraction of the documents, between 0 and 1, that is held out for validation and never trained on.
    Of tokens it is the end; of a folder that train.prepare made, what was held out there.
    It may be 0 where there is a --validation set."""
    data_cache: Path = Path("~/.cache/balanced_adam")
    """Folder where tokenized data is cached. All runs on the same data share it."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.data != "", 'data is empty; give a file, a folder, "stdlib" or "hub:NAME".')
        require("\0" not in self.data, f"data is {shown(self.data)}, which holds a NUL; remove that.")
        require(self.eos_id is None or self.eos_id >= 0, f"eos_id is {self.eos_id}; it must be at least 0.")
        try:
            is_file = self.data_cache.exists() and not self.data_cache.is_dir()
            Path(self.data).exists()
        except OSError as error:  # of the rest, the rank that needs it says so
            too_long = error.errno == errno.ENAMETOOLONG
            require(not too_long, f"data is {shown(self.data)}, which can't be read: {first_line(error)}.")
            is_file = False
        require(not is_file, f"data_cache is {self.data_cache}, which is no folder; give one.")


@dataclass(frozen=True, kw_only=True)
class Data(Text):
    """The training data."""

    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Of files of tokens that have no header. Default: uint16, or uint32 for tokenizers of more than 65536."""
    sequence_length: int = 128
    """Tokens in one training sequence; at least 2."""
    document_mask: bool = False
    """Let each document see itself alone: at its first token positions begin anew, attention ends, and no loss is
    taken, since nothing before it could predict it."""
    validation: tuple[str, ...] = ()
    """NAME=PATH of texts or tokens to validate on as well, each with a column of its own in the metrics.
    A PATH is one as of --data, but no mixture; nothing of it is trained on."""
    verify_data: bool = False
    """Read all files of the corpus and all tokens again and compare their checksums.
    By default only files whose size or modification time has changed are read again."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        super().check()
        require(self.sequence_length >= 2, f"sequence_length is {self.sequence_length}; it must be at least 2.")
        names = [each.partition("=")[0] for each in self.validation]
        for name, each in zip(names, self.validation, strict=True):
            require(
                re.fullmatch(rf"{NAME}=.+", each) is not None,
                f"validation is {shown(each)}; it must be NAME=PATH, with letters, digits and . _ - in the name.",
            )
            require(names.count(name) == 1, f"validation has {name} twice; give each set a name of its own.")
        require(
            0.0 < self.validation_fraction < 1.0 or (self.validation_fraction == 0.0 and bool(names)),
            f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1"
            f"{'' if names else ' (or be 0, with a --validation set)'}.",
        )


@dataclass(frozen=True, kw_only=True)
class Prepare(Text):
    """The text, and where its tokens go."""

    out: Path
    """Folder for the tokens, to be given as --data of train.pretrain. While they are made it takes twice their size."""
    processes: int | None = None
    """Number of processes that tokenize. Default: as many as there are cores."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        super().check()
        require(
            0.0 <= self.validation_fraction < 1.0,
            f"validation_fraction is {self.validation_fraction}; it must lie in [0, 1).",
        )
        require(self.processes is None or self.processes >= 1, f"processes is {self.processes}; it must be at least 1.")
