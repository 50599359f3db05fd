"""A corpus: the files it consists of, its documents, and the description that identifies it.

The content of its files, in the order of their names, identifies a corpus: the same bytes in another place, or copied
again, are the same corpus. Each file is summed once; the sum is cached by path, size and modification time.
"""

from __future__ import annotations

import lzma
import os
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.common.errors import ConfigError, first_line, require
from train.common.files import checksum, expanded, write_json
from train.common.schemas import ReadText, SumsFile, guard, read_schema
from train.data.config import Text
from train.data.readers import (
    KINDS,
    Read,
    kept_rows,
    kind_of,
    rows_of_hub,
    rows_of_json,
    rows_of_parquet,
    rows_of_stdlib,
    rows_of_text,
    shown,
    size_of_hub,
)

UNREADABLE = {".lz4", ".lzma", ".br", ".z", ".zip", ".7z"}
"""Unsupported compressions. A corpus file with one of these suffixes is an error, since its text would be missing."""
TOKENS = (".bin", ".npy", ".ds")
"""Suffixes of files of tokens (train.data.token_shards). Beside text they are left out."""
PREPARED = "prepared.json"
"""In a folder that train.prepare has made (train.data.prepared)."""
TWICE = "there twice, under another name"


@dataclass(frozen=True)
class Corpus:
    """The source of the documents."""

    kind: str
    """text, json, parquet, hub, stdlib or tokens."""
    files: tuple[Path, ...]
    description: list[Any]
    """Identifies the text, and changes with it; see the module's docstring."""
    left_out: dict[str, list[str]]
    """Files in the folder that are not read, by reason."""

    def size(self, settings: Text) -> int:
        """Return the bytes of the text as it is stored: of files those on disk.

        Raises:
            ConfigError: if they can't be found out.
        """
        try:
            return size_of_hub(settings) if self.kind == "hub" else sum(file.stat().st_size for file in self.files)
        except OSError as error:
            raise ConfigError(f"data is {settings.data!r}, which can't be read: {error.strerror}.") from None

    def documents(self, settings: Text, read: Read) -> Iterator[str]:
        """Yield all documents that hold text, in order, and count them in ``read``.

        They begin after those that ``read`` has counted before.

        Raises:
            ConfigError: if a document can't be read; it names file and row.
        """
        if self.kind == "hub":
            yield from kept_rows(rows_of_hub(settings), Path(settings.data), read, read.within)
            return
        rows = {"text": rows_of_text, "json": rows_of_json, "parquet": rows_of_parquet, "stdlib": rows_of_stdlib}[
            self.kind
        ]
        read.files = len(self.files)
        while read.file < len(self.files):
            file = self.files[read.file]
            try:
                yield from kept_rows(rows(file, settings.text_field), file, read, read.within)
                read.file, read.within, read.before = read.file + 1, 0, read.bytes
            except OSError as error:
                raise ConfigError(
                    f"data is {settings.data!r}, whose {file} can't be read: {error.strerror or first_line(error)}."
                ) from None
            except (EOFError, lzma.LZMAError, zlib.error) as error:
                raise ConfigError(f"data is {settings.data!r}, whose {file} can't be read: {error}.") from None


def find_corpus(settings: Text, *, fresh: bool = False) -> Corpus:
    """Find the corpus that the settings name.

    Args:
        settings: the data options.
        fresh: sum every file again, even if its sum is cached.

    Raises:
        ConfigError: if there is no such data, or a file of it is unsuitable.
    """
    if settings.data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        excluded = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        files = tuple(f for f in sorted(root.rglob("*.py")) if not excluded & set(f.relative_to(root).parts))
        # Identified by names and sizes, as in earlier versions: published results use these tokens.
        described = ["stdlib", sys.version, [[str(f.relative_to(root)), f.stat().st_size] for f in files]]
        return Corpus("stdlib", files, described, {})
    if settings.data.startswith("hub:"):
        require(len(settings.data) > 4, f"data is {settings.data!r}; give hub:NAME or hub:NAME:CONFIGURATION.")
        return Corpus("hub", (), [settings.data], {})
    root, cache = expanded(Path(settings.data), "data"), expanded(settings.data_cache, "data_cache").resolve()
    kind, files, left_out = _kind_and_files(settings)
    printable = {reason: [shown(name) for name in names] for reason, names in left_out.items()}
    return Corpus(kind, files, [kind, _sums(files, root, cache, fresh)], printable)


def files_of(settings: Text) -> tuple[Path, ...]:
    """Return the files of a corpus in a path, in order.

    Raises:
        ConfigError: as :func:`find_corpus`.
    """
    return _kind_and_files(settings)[1]


def _kind_and_files(settings: Text) -> tuple[str, tuple[Path, ...], dict[str, list[str]]]:
    """Return the kind of a corpus in a path, the files that are read, in order, and those that aren't, by reason."""
    root = expanded(Path(settings.data), "data")
    cache, real_root = expanded(settings.data_cache, "data_cache").resolve(), root.resolve()
    if cache.is_relative_to(real_root) and not any(part[0] == "." for part in cache.relative_to(real_root).parts):
        raise ConfigError(
            f"data_cache is {cache}, inside data, so its files would become part of the corpus; give another folder."
        )
    try:
        files, left_out = _files(root, settings.data, cache, kind_of)
        made = next((f for f in files if f.name == PREPARED and (f.parent / "train-00000.bin").exists()), root)
        require(
            made == root,
            f"data is {settings.data!r}, which holds {made.relative_to(root)}; give the folder of that file, or a "
            "mixture of several, since some of its tokens are held out.",
        )
        if not any(map(kind_of, files)):
            tokens, not_tokens = _files(root, settings.data, cache, _kind_of_tokens)
            if any(map(_kind_of_tokens, tokens)):
                indexes = {str(file.relative_to(root).with_suffix(".idx")) for file in tokens if file != root}
                others = [name for name in not_tokens.pop("of another kind", []) if name not in indexes]
                lone = next((name for name in others if name.endswith(".idx")), "")
                require(not lone, f"data is {settings.data!r}, which holds {lone} without its .bin.")
                return "tokens", tokens, {**not_tokens, **({"of another kind": others} if others else {})}
    except OSError as error:
        raise ConfigError(f"data is {settings.data!r:.200}, which can't be read: {error.strerror}.") from None
    kinds = {kind_of(file) for file in files}
    named = ", ".join(f"{len(names)} {reason} ({names[0]})" for reason, names in left_out.items())
    require(
        bool(files) and "" not in kinds,
        f"data is {settings.data!r}, which holds no text; known are {', '.join((*KINDS, *TOKENS))}"
        f"{f', and left out is {named}' if named else ''}.",
    )
    require(
        len(kinds) == 1,
        f"data is {settings.data!r}, which mixes {' and '.join(sorted(kinds))} files; give one kind.",
    )
    return kinds.pop(), files, left_out


def _kind_of_tokens(file: Path) -> str:
    return "tokens" if file.suffix.lower() in TOKENS else ""


def _files(
    root: Path, data: str, cache: Path, kind_of: Callable[[Path], str]
) -> tuple[tuple[Path, ...], dict[str, list[str]]]:
    """Return the files that are read, in order, and those that aren't, by reason."""
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
    above = {root.resolve(), *root.resolve().parents}  # a link to one of these would include files beside the corpus

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(root, followlinks=True, onerror=stop):
        within = Path(place).relative_to(root)
        hidden = [f"{within / name}/" for name in folders if name[0] == "."]
        hidden += [str(within / name) for name in names if name[0] == "."]
        if hidden:
            left_out.setdefault("hidden", []).extend(hidden)
        here = Path(place).resolve()
        if here.is_relative_to(cache):  # through a link
            raise ConfigError(
                f"data_cache is {cache}, which a link in data leads to, so its files would become part of the corpus; "
                "give another folder."
            )
        seen_folders.add(here)
        # A link to a folder that has been seen would be read twice, or forever.
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
            f"data is {data!r}, which holds {name}, compressed in a way that is not supported; "
            "decompress it, or remove it.",
        )
        if not kind_of(file):
            left_out.setdefault("of another kind", []).append(name)
            continue
        require(file.is_file(), f"data is {data!r}, which holds {name}, which is not a file (or links to none).")
        if file.resolve() in seen:
            left_out.setdefault(TWICE, []).append(name)
            continue
        seen.add(file.resolve())
        files.append(file)
    return tuple(files), left_out


def _sums(files: tuple[Path, ...], root: Path, cache: Path, fresh: bool) -> list[str]:
    """Return the SHA-256 of each file. Sums are cached by path, size and modification time."""
    cache.mkdir(parents=True, exist_ok=True)
    name = blake2b(os.fsencode(root.resolve()), digest_size=8).hexdigest()
    return known_sums(files, cache / f"sums-{name}.json", fresh)


def known_sums(files: Sequence[Path], kept: Path, fresh: bool = False) -> list[str]:
    """Return the SHA-256 of each file.

    Args:
        files: the files to sum.
        kept: the cache file. A file whose path, size and modification time it knows is not read.
        fresh: read every file, and ignore the cached sums.

    Raises:
        OSError: if a file can't be read.
    """
    stamps = {str(file.resolve()): file.stat() for file in files}
    wanted = {name: (stamp.st_size, stamp.st_mtime_ns) for name, stamp in stamps.items()}
    kept_as = {name: shown(name) for name in wanted}

    def known() -> dict[str, list[Any]]:
        try:
            return {} if fresh else read_schema(SumsFile, kept).files
        except (OSError, ValueError):  # not there yet, or damaged
            return {}

    def matching(before: dict[str, list[Any]]) -> dict[str, str]:
        sums: dict[str, str] = {}
        for name, stamp in wanted.items():
            of_stamp = [summed for *was, summed in before.get(kept_as[name], []) if tuple(was) == stamp]
            if of_stamp:
                sums[name] = of_stamp[0]
        return sums

    sums = matching(known())
    if sums.keys() != wanted.keys():
        with waiting_for(kept.with_suffix(".lock"), f"the sums of {len(files)} files"):
            before = known()
            sums = matching(before)
            sums |= {name: checksum(Path(name))[1] for name in wanted if name not in sums}
            # A file written just now may be written again within the resolution of its time, so its sum is not cached.
            # Where hosts have files of their own, one name stands for several, so other entries are kept.
            settled = time.time_ns() - 2 * 10**9
            now = {
                kept_as[name]: [
                    *([[*stamp, sums[name]]] if stamp[1] < settled else []),
                    *[list(each) for each in before.get(kept_as[name], []) if tuple(each[:2]) != stamp][:63],
                ]
                for name, stamp in wanted.items()
            }
            with suppress(OSError):  # a cache that can't be written only costs time
                write_json(kept, guard({"files": now}))
    return [sums[str(file.resolve())] for file in files]


@contextmanager
def waiting_for(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock during the block, and print a message while another process has it.

    Where no lock can be made, as on a read-only file system, the block runs without one.
    """
    with ExitStack() as held:
        with suppress(OSError):
            try:
                held.enter_context(FileLock(lock, timeout=5))
            except Timeout:
                print(f"Waiting for another process, which takes {what} ({lock}).", file=sys.stderr, flush=True)
                held.enter_context(FileLock(lock))
        yield


def described(read: ReadText, tokens: dict[Any, int], left_out: dict[str, list[str]]) -> str:
    """Describe, in one or two sentences for the user, what was read of a text and what was left out."""
    distinct = sum(read.documents.values())
    documents = read.read or distinct
    text = f"{documents} documents" + (f" ({distinct} different)" if documents != distinct else "")
    text += f" from {read.files} files" if read.files else ""
    text += f" ({read.bytes} bytes)" if read.bytes else ""
    sentences = [f"data: {text}, {tokens['train']} tokens to train on and {tokens['validation']} held out."]
    missing = [f"{count} {reason} (such as {read.first.get(reason, '?')})" for reason, count in read.dropped.items()]
    missing += [f"{len(names)} files {reason} (such as {names[0]})" for reason, names in left_out.items()]
    if missing:
        sentences.append(f"Left out: {', '.join(missing)}.")
    return " ".join(sentences)
