"""Documents from files: plain text, JSON, Parquet, the Hugging Face hub; compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from train.common.errors import ConfigError, first_line, require
from train.data.config import Data

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".gzip": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BATCH = 256  # rows of a parquet file that are held at once
Row = tuple[int, "str | bool | None"]
"""The number of a row, from 1, and its text; None for a null, False for a row that lacks the field."""


@dataclass
class Read:
    """What was read, for the user."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    """Of UTF-8."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason: number of documents."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason: the first of them, by file and row."""

    def drop(self, reason: str, file: Path, row: int) -> None:
        """Count a document that is none."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{shown(file)} row {row}")


def kind_of(file: Path) -> str:
    """text, json or parquet, by the suffix in any case; empty if it is none of them."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    if last not in COMPRESSED:
        return KINDS.get(last, "")
    if inner in (".tar", ".parquet"):
        return ""
    return KINDS.get(inner, "json")


def shown(path: object) -> str:
    """A name as it can be printed and written, whatever bytes it is made of."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


def kept_rows(rows: Iterator[Row], file: Path, read: Read) -> Iterator[str]:
    """The rows that hold text; the others are counted."""
    for row, text in rows:
        if not isinstance(text, str):
            read.drop("without the field" if text is False else "null", file, row)
        elif not text:
            read.drop("empty", file, row)
        elif not text.strip():
            read.drop("blank", file, row)
        else:
            try:
                read.bytes += len(text.encode())
                read.documents += 1
            except UnicodeEncodeError:  # half of a pair, as JSON can have it
                read.drop("not Unicode", file, row)
                continue
            yield text


def _open(file: Path) -> IO[bytes]:
    opened: IO[bytes] = COMPRESSED.get(file.suffix.lower(), open)(file, "rb")
    return opened


def _decoded(content: bytes, file: Path, row: int = 1) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark."""
    encoding = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is no UTF-8 at row {row + content[: error.start].count(10)} (byte 0x{content[error.start]:02x}); convert it, such as "
            f"with iconv -f latin1 -t utf-8."
        ) from None
    require(
        text.count("\0") <= len(text) // 10,
        f"{shown(file)} holds {text.count(chr(0))} NUL bytes; it is no text, or UTF-16 without a byte order mark.",
    )
    return text


def _encoding(begin: bytes) -> str:
    if begin.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def rows_of_stdlib(file: Path, _: str) -> Iterator[Row]:
    """One document: all of a source file of Python's."""
    yield 1, file.read_text(encoding="utf-8", errors="replace")


def rows_of_text(file: Path, _: str) -> Iterator[Row]:
    """One document: all of the file."""
    with _open(file) as opened:
        yield 1, _decoded(opened.read(), file).replace("\r\n", "\n").replace("\r", "\n")


def rows_of_json(file: Path, field: str) -> Iterator[Row]:
    """One document a line; or one an element, where the file is an array."""
    columns: set[str] = set()
    found = False
    for row, value in _objects(file):
        require(
            isinstance(value, dict), f"{file} row {row} is {_shown(value)}; it must be an object with {field!r} in it."
        )
        columns |= value.keys()
        if field not in value:
            yield row, False
            continue
        found = True
        yield row, _text(value[field], field, file, row)
    require(found or not columns, _lacks(file, field, columns))


def _objects(file: Path) -> Iterator[tuple[int, Any]]:
    with _open(file) as opened:
        begin = opened.read(4096)
    if _encoding(begin) != "utf-8-sig" or begin.lstrip(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        with _open(file) as opened:
            text = _decoded(opened.read(), file)
        if text.lstrip().startswith("["):
            yield from enumerate(_parsed(text, file, 1), 1)
            return
        yield from ((row, _parsed(line, file, row)) for row, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    with _open(file) as opened:
        first = next((line for line in opened if line.strip()), b"")
    try:
        json.loads(_decoded(first, file)) if first else None
    except (ValueError, RecursionError):  # not an object a line: one after the other, over as many lines as each takes
        with _open(file) as opened:
            yield from _stream(_decoded(opened.read(), file), file)
        return
    with _open(file) as opened:
        for row, line in enumerate(opened, 1):
            if line.strip():
                yield row, _parsed(_decoded(line, file, row), file, row)


def _stream(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        row = text.count("\n", 0, at) + 1
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{shown(file)} row {row} is no JSON: {first_line(error)}.") from None
        yield row, value


def _parsed(text: str, file: Path, row: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} row {row} is no JSON: {first_line(error)}.") from None


def rows_of_parquet(file: Path, field: str) -> Iterator[Row]:
    """One document a row."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns = opened.schema_arrow.names
            require(field in columns, _lacks(file, field, columns))
            require(
                columns.count(field) == 1,
                f"text_field is {field!r}, and {shown(file)} has {columns.count(field)} columns of that name.",
            )
            for batch in opened.iter_batches(BATCH, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield row, _text(value, field, file, row)
    except UnicodeDecodeError:
        raise ConfigError(
            f"{shown(file)} holds text that is no UTF-8 between rows {row + 1} and {row + BATCH}."
        ) from None
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file} is no Parquet file that can be read: {first_line(error)}.") from None


def rows_of_hub(settings: Data) -> Iterator[Row]:
    """One document a row of a data set of the Hugging Face hub."""
    import datasets

    datasets.disable_progress_bars()
    _, name, *configuration = settings.data.split(":")
    try:
        loaded = datasets.load_dataset(name, *configuration, split="train")
    except Exception as error:  # whatever the network runs into
        raise ConfigError(f"data is {settings.data!r}, which can't be read: {first_line(error)}") from None
    field = settings.text_field
    require(field in loaded.column_names, _lacks(settings.data, field, loaded.column_names))
    row = 0
    for batch in loaded.select_columns([field]).iter(batch_size=BATCH):
        for value in batch[field]:
            row += 1
            yield row, _text(value, field, settings.data, row)


def _text(value: Any, field: str, file: object, row: int) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f"text_field is {field!r}, which holds {_shown(value)} in {file} row {row}; it must hold text.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _lacks(file: object, field: str, columns: Any) -> str:
    return f"text_field is {field!r}, but {file} has the columns {', '.join(map(str, sorted(columns)))}."
