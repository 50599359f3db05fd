"""What a run is trained on, as the user says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import require


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it is trained on."""

    data: str = "stdlib"
    """"stdlib" (the sources of Python's standard library), a file or folder of .txt/.md/.py, .jsonl/.json or .parquet (the former also as .gz,
    .bz2 or .xz), or "hub:NAME" or "hub:NAME:CONFIGURATION" for a data set of the Hugging Face hub (its train split)."""
    text_field: str = "text"
    """The column that holds the text, in json, parquet and hub data."""
    tokenizer: str = "byt5"
    """"byt5" (UTF-8 bytes, nothing to download), or the path or hub name of any tokenizer of transformers."""
    sequence_length: int = 128
    """Tokens in one training sequence."""
    validation_fraction: float = 0.05
    """The share of documents that is held out for validation and never trained on."""
    data_cache: Path = Path("~/.cache/balanced_adam")
    """Where tokenized data is kept; shared by all runs that read the same data."""
    verify_data: bool = False
    """Read all files of the corpus and all tokens again, and see whether they are what they were; otherwise only what has another size or time
    of change than when it was last read."""

    def check(self) -> None:
        """Raise :class:`ConfigError` on a value out of range."""
        require(self.sequence_length >= 2, f"sequence_length is {self.sequence_length}; it must be at least 2.")
        require(
            0.0 < self.validation_fraction < 1.0,
            f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.",
        )
