"""The text of a corpus: which files it is made of, what each document is, and what it is known by again.

A corpus is known by the content of its files, in the order of their names: the same bytes in another place, or staged anew, are the same
corpus. Sums of files are taken once and kept by path, size and time of change.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import sys
import sysconfig
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from train.folder import checksum, write_json
from train.schemas import SumsFile, guard, read_schema
from train.settings import Data, SettingsError, first_line, require

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
UNREADABLE = {".zst", ".zstd", ".lz4", ".lzma", ".br", ".z", ".zip", ".7z"}
"""Compressions that are refused where they hold a kind of file that is read, since a part of the corpus would be missing."""
TWICE = "there twice, under another name"
BATCH = 256  # rows of a parquet file that are held at once


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


@dataclass(frozen=True)
class Corpus:
    """Where documents come from."""

    kind: str
    """text, json, parquet, hub or stdlib."""
    files: tuple[Path, ...]
    description: list[Any]
    """Changes with the text; see the module's docstring."""
    left_out: dict[str, list[str]]
    """Reason: files in its folder that are not read."""

    def documents(self, settings: Data, read: Read) -> Iterator[str]:
        """All documents that hold text, in order.

        Raises:
            SettingsError: if one can't be read, naming file and row.
        """
        if self.kind == "hub":
            yield from _kept(_of_hub(settings), Path(settings.data), read)
            return
        rows = {"text": _of_text, "json": _of_json, "parquet": _of_parquet, "stdlib": _of_stdlib}[self.kind]
        read.files = len(self.files)
        for file in self.files:
            try:
                yield from _kept(rows(file, settings.text_field), file, read)
            except OSError as error:
                raise SettingsError(
                    f"data is {settings.data!r}, whose {file} can't be read: {error.strerror or first_line(error)}."
                ) from None
            except (EOFError, lzma.LZMAError, zlib.error) as error:
                raise SettingsError(f"data is {settings.data!r}, whose {file} can't be read: {error}.") from None


Row = tuple[int, "str | bool | None"]
"""The number of a row, from 1, and its text; None for a null, False for a row that lacks the field."""


def find(settings: Data, *, fresh: bool = False) -> Corpus:
    """The corpus that the settings name.

    Args:
        settings: what is trained on.
        fresh: sum every file again, whatever is known of it.

    Raises:
        SettingsError: if there is no such data.
    """
    if settings.data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        none_of = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        files = tuple(f for f in sorted(root.rglob("*.py")) if not none_of & set(f.relative_to(root).parts))
        # By names and sizes, as ever: results are published on these tokens.
        described = ["stdlib", sys.version, [[str(f.relative_to(root)), f.stat().st_size] for f in files]]
        return Corpus("stdlib", files, described, {})
    if settings.data.startswith("hub:"):
        require(len(settings.data) > 4, f"data is {settings.data!r}; give hub:NAME or hub:NAME:CONFIGURATION.")
        return Corpus("hub", (), [settings.data], {})
    root = expanded(Path(settings.data), "data")
    cache, real_root = expanded(settings.data_cache, "data_cache").resolve(), root.resolve()
    if cache.is_relative_to(real_root) and not any(part[0] == "." for part in cache.relative_to(real_root).parts):
        raise SettingsError(
            f"data_cache is {cache}, within data, of which its files would become a part; give another folder."
        )
    try:
        files, left_out = _files(root, settings.data, cache)
    except OSError as error:
        raise SettingsError(f"data is {settings.data!r:.200}, which can't be read: {error.strerror}.") from None
    kinds = {kind_of(file) for file in files}
    named = ", ".join(f"{len(names)} {reason} ({names[0]})" for reason, names in left_out.items())
    require(
        bool(files) and "" not in kinds,
        f"data is {settings.data!r}, which holds no text; known are {', '.join(KINDS)}"
        f"{f', and left out is {named}' if named else ''}.",
    )
    require(
        len(kinds) == 1,
        f"data is {settings.data!r}, which mixes {' and '.join(sorted(kinds))} files; give one kind.",
    )
    kind = kinds.pop()
    printable = {reason: [shown(name) for name in names] for reason, names in left_out.items()}
    return Corpus(kind, files, [kind, _sums(files, root, cache, fresh)], printable)


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


def expanded(path: Path, name: str) -> Path:
    """With a home folder in place of a tilde; raises :class:`SettingsError`, naming the setting."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise SettingsError(f"{name} is {path}, whose user does not exist.") from None


def _files(root: Path, data: str, cache: Path) -> tuple[tuple[Path, ...], dict[str, list[str]]]:
    """The files that are read, in order, and those that aren't, by reason."""
    require(
        root.exists(),
        f'data is {data!r}, which does not exist; give a file, a folder, "stdlib" or "hub:NAME".',
    )
    if not root.is_dir():
        require(root.is_file(), f"data is {data!r}, which is neither a file nor a folder.")
        return (root,), {}
    left_out: dict[str, list[str]] = {}
    candidates: list[Path] = []
    seen_folders: set[Path] = set()
    above = {root.resolve(), *root.resolve().parents}  # a link upwards would bring in what lies beside the corpus

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(root, followlinks=True, onerror=stop):
        within = Path(place).relative_to(root)
        hidden = [f"{within / name}/" for name in folders if name[0] == "."]
        hidden += [str(within / name) for name in names if name[0] == "."]
        if hidden:
            left_out.setdefault("hidden", []).extend(hidden)
        here = Path(place).resolve()
        if here.is_relative_to(cache):  # by a link
            raise SettingsError(
                f"data_cache is {cache}, which a link in data leads to; its files would become a part of it."
            )
        seen_folders.add(here)
        # A link back into what has been seen would be read twice, or for ever.
        again = {name for name in folders if (Path(place) / name).resolve() in seen_folders | above}
        if again:
            left_out.setdefault(TWICE, []).extend(f"{within / name}/" for name in sorted(again))
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in again)
        candidates += [Path(place) / name for name in names if name[0] != "."]
    files: list[Path] = []
    seen: set[Path] = set()
    for file in sorted(candidates):
        name = str(file.relative_to(root))
        require(
            file.suffix.lower() not in UNREADABLE or not kind_of(file.with_suffix("")),
            f"data is {data!r}, which holds {name}, compressed in a way that is not read here; decompress it, or remove it.",
        )
        if not kind_of(file):
            left_out.setdefault("of another kind", []).append(name)
            continue
        require(file.is_file(), f"data is {data!r}, which holds {name}, which is no file (or a link to none).")
        if file.resolve() in seen:
            left_out.setdefault(TWICE, []).append(name)
            continue
        seen.add(file.resolve())
        files.append(file)
    return tuple(files), left_out


def _sums(files: tuple[Path, ...], root: Path, cache: Path, fresh: bool) -> list[str]:
    """The SHA-256 of each file, taken where it isn't known by path, size and time of change."""
    cache.mkdir(parents=True, exist_ok=True)
    name = blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    return known_sums(files, cache / f"sums-{name}.json", fresh)


def known_sums(files: Sequence[Path], kept: Path, fresh: bool = False) -> list[str]:
    """The SHA-256 of each file; those that ``kept`` knows by path, size and time of change are not read, unless ``fresh``."""
    stamps = {str(file.resolve()): file.stat() for file in files}
    wanted = {name: (stamp.st_size, stamp.st_mtime_ns) for name, stamp in stamps.items()}
    kept_as = {name: shown(name) for name in wanted}

    def known() -> dict[str, list[Any]]:
        try:
            return {} if fresh else read_schema(SumsFile, kept).files
        except (OSError, ValueError):  # not there yet, or damaged
            return {}

    def find_in(before: dict[str, list[Any]]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, stamp in wanted.items():
            of_stamp = [summed for *was, summed in before.get(kept_as[name], []) if tuple(was) == stamp]
            if of_stamp:
                found[name] = of_stamp[0]
        return found

    sums = find_in(known())
    if sums.keys() != wanted.keys():
        with waiting_for(kept.with_suffix(".lock"), f"the sums of {len(files)} files"):
            before = known()
            sums = find_in(before)
            sums |= {name: checksum(Path(name))[1] for name in wanted if name not in sums}
            # A file that was written to just now may be again, and have the same time; where hosts have files of their own, one
            # name stands for several.
            settled = time.time_ns() - 2 * 10**9
            now = {
                kept_as[name]: [
                    *([[*stamp, sums[name]]] if stamp[1] < settled else []),
                    *[list(each) for each in before.get(kept_as[name], []) if tuple(each[:2]) != stamp][:63],
                ]
                for name, stamp in wanted.items()
            }
            with suppress(OSError):  # a cache that can't be written to costs time alone
                write_json(kept, guard({"files": now}))
    return [sums[str(file.resolve())] for file in files]


@contextmanager
def waiting_for(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock; say so where another process has it. Where there can be no lock, go on without."""
    with ExitStack() as held:
        with suppress(OSError):
            try:
                held.enter_context(FileLock(lock, timeout=5))
            except Timeout:
                print(f"Waiting for another process, which takes {what} ({lock}).", file=sys.stderr, flush=True)
                held.enter_context(FileLock(lock))
        yield


def _kept(rows: Iterator[Row], file: Path, read: Read) -> Iterator[str]:
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
        raise SettingsError(
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


def _of_stdlib(file: Path, _: str) -> Iterator[Row]:
    yield 1, file.read_text(encoding="utf-8", errors="replace")


def _of_text(file: Path, _: str) -> Iterator[Row]:
    """One document: all of the file."""
    with _open(file) as opened:
        yield 1, _decoded(opened.read(), file).replace("\r\n", "\n").replace("\r", "\n")


def _of_json(file: Path, field: str) -> Iterator[Row]:
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
            raise SettingsError(f"{shown(file)} row {row} is no JSON: {first_line(error)}.") from None
        yield row, value


def _parsed(text: str, file: Path, row: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file} row {row} is no JSON: {first_line(error)}.") from None


def _of_parquet(file: Path, field: str) -> Iterator[Row]:
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
        raise SettingsError(
            f"{shown(file)} holds text that is no UTF-8 between rows {row + 1} and {row + BATCH}."
        ) from None
    except pyarrow.ArrowException as error:
        raise SettingsError(f"{file} is no Parquet file that can be read: {first_line(error)}.") from None


def _of_hub(settings: Data) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    _, name, *configuration = settings.data.split(":")
    try:
        loaded = datasets.load_dataset(name, *configuration, split="train")
    except Exception as error:  # whatever the network runs into
        raise SettingsError(f"data is {settings.data!r}, which can't be read: {first_line(error)}") from None
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
    raise SettingsError(f"text_field is {field!r}, which holds {_shown(value)} in {file} row {row}; it must hold text.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _lacks(file: object, field: str, columns: Any) -> str:
    return f"text_field is {field!r}, but {file} has the columns {', '.join(map(str, sorted(columns)))}."
