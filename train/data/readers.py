"""Read documents from plain text, JSON, Parquet and the Hugging Face hub, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from train.common.errors import ConfigError, first_line, require
from train.data.config import Text

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}


def open_zstd(file: Path, _: str) -> IO[bytes]:
    """Open a Zstandard file, of one frame or several; one that has been cut short raises OSError when it is read."""
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file.open("rb")), "zstd"))


COMPRESSED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((".gz", ".gzip"), gzip.open),
    **dict.fromkeys((".zst", ".zstd"), open_zstd),
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
BATCH = 256  # rows of a Parquet file that are held in memory at once
Row = tuple[int, "str | bool | None"]
"""A row's number, counted from 1, and its text; None for a null, False for a row without the text field."""


@dataclass
class Read:
    """Statistics of what was read, for the user."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    """Size of the text as UTF-8."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped documents, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """File and row of the first dropped document, by reason."""
    file: int = 0
    """Number of the file that is being read, counted from 0."""
    within: int = 0
    """How many of its documents have been read."""
    before: int = 0
    """Bytes of text in the files before it."""

    def facts(self) -> dict[str, Any]:
        """Return what a file of ours says of what was read (train.common.schemas.ReadText)."""
        return {
            "files": self.files,
            "read": self.documents,
            "bytes": self.bytes,
            "dropped": dict(self.dropped),
            "first": self.first,
        }

    def drop(self, reason: str, file: Path, row: int) -> None:
        """Count a row that is dropped."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{shown(file)} row {row}")


def kind_of(file: Path) -> str:
    """Return "text", "json" or "parquet" by the file's suffix, ignoring case; "" for any other file."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    if last not in COMPRESSED:
        return KINDS.get(last, "")
    if inner in (".tar", ".parquet"):
        return ""
    return KINDS.get(inner, "json")


def shown(path: object) -> str:
    """Return a file name that can be printed and stored, with bytes that are not UTF-8 escaped."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


def kept_rows(rows: Iterator[Row], file: Path, read: Read, skip: int = 0) -> Iterator[str]:
    """Yield the texts of the rows that hold any, and count them and the others in ``read``.

    The first ``skip`` texts, and the rows before them, have been read before: they are neither yielded nor counted.
    """
    before = Read()
    for row, text in rows:
        into = before if before.documents < skip else read
        if not isinstance(text, str):
            into.drop("without the field" if text is False else "null", file, row)
        elif not text:
            into.drop("empty", file, row)
        elif not text.strip():
            into.drop("blank", file, row)
        else:
            try:
                into.bytes += len(text.encode())
                into.documents += 1
            except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
                into.drop("not Unicode", file, row)
                continue
            if into is read:
                read.within += 1
                yield text


def _open(file: Path) -> IO[bytes]:
    opened: IO[bytes] = COMPRESSED.get(file.suffix.lower(), open)(file, "rb")
    return opened


def _decoded(content: bytes, file: Path, row: int = 1) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte order mark. ``row`` is that of the content's first line."""
    encoding = _encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 at row {row + content[: error.start].count(10)} (byte 0x{content[error.start]:02x}); "
            "convert it, for example with iconv -f latin1 -t utf-8."
        ) from None
    require(
        text.count("\0") <= len(text) // 10,
        f"{shown(file)} holds {text.count(chr(0))} NUL bytes; it is not text, or is UTF-16 without a byte order mark.",
    )
    return text


def _encoding(begin: bytes) -> str:
    if begin.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def rows_of_stdlib(file: Path, _: str) -> Iterator[Row]:
    """Yield one document: a complete Python source file."""
    yield 1, file.read_text(encoding="utf-8", errors="replace")


def rows_of_text(file: Path, _: str) -> Iterator[Row]:
    """Yield one document: the complete file."""
    with _open(file) as opened:
        yield 1, _decoded(opened.read(), file).replace("\r\n", "\n").replace("\r", "\n")


def rows_of_json(file: Path, field: str) -> Iterator[Row]:
    """Yield one document per object: one per line, or one per element if the file is an array."""
    columns: set[str] = set()
    has_field = False
    for row, value in _objects(file):
        require(
            isinstance(value, dict), f"{file} row {row} is {_shown(value)}; it must be an object with {field!r} in it."
        )
        columns |= value.keys()
        if field not in value:
            yield row, False
            continue
        has_field = True
        yield row, _text(value[field], field, file, row)
    require(has_field or not columns, _lacks(file, field, columns))


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
    except (ValueError, RecursionError):  # not one object per line: concatenated objects of any number of lines
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
            raise ConfigError(f"{shown(file)} row {row} is not JSON: {first_line(error)}.") from None
        yield row, value


def _parsed(text: str, file: Path, row: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} row {row} is not JSON: {first_line(error)}.") from None


def rows_of_parquet(file: Path, field: str) -> Iterator[Row]:
    """Yield one document per row."""
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
            f"{shown(file)} holds text that is not UTF-8 between rows {row + 1} and {row + BATCH}."
        ) from None
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file} is not a readable Parquet file: {first_line(error)}.") from None


def rows_of_hub(settings: Text) -> Iterator[Row]:
    """Yield one document per row of the train split of a Hugging Face hub dataset."""
    loaded, field = _hub(settings), settings.text_field
    require(field in loaded.column_names, _lacks(settings.data, field, loaded.column_names))
    row = 0
    for batch in loaded.select_columns([field]).iter(batch_size=BATCH):
        for value in batch[field]:
            row += 1
            yield row, _text(value, field, settings.data, row)


def size_of_hub(settings: Text) -> int:
    """Return the bytes of that split."""
    return int(_hub(settings).data.nbytes)


def _hub(settings: Text) -> Any:
    import datasets

    datasets.disable_progress_bars()
    _, name, *configuration = settings.data.split(":")
    try:
        return datasets.load_dataset(name, *configuration, split="train")
    except Exception as error:  # of any class, depending on the network
        raise ConfigError(f"data is {settings.data!r}, which can't be read: {first_line(error)}") from None


def _text(value: Any, field: str, file: object, row: int) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f"text_field is {field!r}, which holds {_shown(value)} in {file} row {row}; it must hold text.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _lacks(file: object, field: str, columns: Any) -> str:
    return f"text_field is {field!r}, but {file} has the columns {', '.join(map(str, sorted(columns)))}."
