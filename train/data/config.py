"""The data options of a run, as the user gives them."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.common.errors import first_line, require, shown


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training data."""

    data: str = "stdlib"
    """The text: "stdlib", a path, "hub:NAME" or "hub:NAME:CONFIGURATION". "stdlib" is Python's standard library.
    Or tokens: a file or a folder of .bin (llm.c's, Megatron's, or without a header) or .npy files.
    A path is a file or a folder of .txt/.md/.py, .jsonl/.json or .parquet files.
    All but .parquet may be compressed (.gz, .zst, .bz2 or .xz).
    "hub:" takes the train split of a Hugging Face hub dataset."""
    text_field: str = "text"
    """Name of the column that holds the text, in JSON, Parquet and hub data."""
    tokenizer: str = "byt5"
    """"byt5" (UTF-8 bytes, nothing to download), or the path or hub name of a transformers tokenizer."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Of .bin files of tokens that have no header. Default: uint16, or uint32 for tokenizers of more than 65536."""
    sequence_length: int = 128
    """Tokens in one training sequence; at least 2."""
    validation_fraction: float = 0.05
    """Fraction of the documents, between 0 and 1, that is held out for validation and never trained on."""
    data_cache: Path = Path("~/.cache/balanced_adam")
    """Folder where tokenized data is cached. All runs on the same data share it."""
    verify_data: bool = False
    """Read all files of the corpus and all tokens again and compare their checksums.
    By default only files whose size or modification time has changed are read again."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.data != "", 'data is empty; give a file, a folder, "stdlib" or "hub:NAME".')
        require(self.sequence_length >= 2, f"sequence_length is {self.sequence_length}; it must be at least 2.")
        try:
            is_file = self.data_cache.exists() and not self.data_cache.is_dir()
            Path(self.data).exists()
        except OSError as error:  # of the rest, the rank that needs it says so
            too_long = error.errno == errno.ENAMETOOLONG
            require(not too_long, f"data is {shown(self.data)}, which can't be read: {first_line(error)}.")
            is_file = False
        require(not is_file, f"data_cache is {self.data_cache}, which is no folder; give one.")
        require(
            0.0 < self.validation_fraction < 1.0,
            f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.",
        )
