"""Command-line parsing: tyro builds each command's options from its settings dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import re
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import tyro

from train.common.errors import (
    EXIT_RETRY,
    ConfigError,
    PeerLostError,
    RankError,
    RetryError,
    first_line,
    is_main_process,
    require,
    shown,
)
from train.common.files import load_yaml

Settings = TypeVar("Settings")
LONGEST = "step-0000000-universal/zero/" + "x" * 128
"""About the longest name of a file in a run's folder."""


def exit_code(program: Callable[[], None]) -> int:
    """Run ``program`` and return its exit code: 0, or 2 on a ConfigError, whose message is printed to stderr."""
    try:
        program()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report_on_rank(error: ConfigError) -> int:
    """Print the sentence of an error that ranks have met, on rank 0 or on the rank that alone has met it.

    Returns:
        The exit code: 75 where the same command may be started again, and 2 where that would not help.
    """
    if is_main_process() or isinstance(error, RankError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_RETRY if isinstance(error, PeerLostError | RetryError) else 2


def parse(settings: type[Settings], arguments: list[str], module: str, description: str | None) -> Settings:
    """Parse the arguments of ``python -m MODULE`` into ``settings``. ``--help`` prints the help text and exits.

    If the settings have ``config``, a YAML file of options, those in it that the arguments lack are added to them.
    Settings with a method ``check_given`` are asked whether the options that were given, by name, are right together.

    Args:
        settings: the dataclass to fill.
        arguments: the command-line arguments, without the program's name.
        module: the module's name, for the help text and error messages.
        description: the text at the top of ``--help``.

    Raises:
        ConfigError: on an unknown option or a value of the wrong type.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # the deepspeed launcher adds it
    _check_repeated(settings, arguments)
    file, given = config_of(settings, arguments), _given(arguments)
    alternatives = set(getattr(settings, "ALTERNATIVES", ()))
    dropped = given | (alternatives if alternatives & given else set())
    of_file = {
        name: words for name, words in (options_in(file, settings) if file else {}).items() if name not in dropped
    }
    arguments = [*(word for words in of_file.values() for word in words), *arguments]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                settings,
                prog=f"python -m {module}",
                args=arguments,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        sentence = _plainly(_one_sentence(complaint.getvalue()), settings, arguments)
        named = re.match(r"--([\w-]+)", sentence)
        if named and named[1].replace("-", "_") in of_file:
            sentence = f"config {file} has {sentence.removeprefix('--')}"
        raise ConfigError(f"{sentence}; see python -m {module} --help.") from None
    _check_texts(parsed, arguments)
    if hasattr(parsed, "check_given"):
        parsed.check_given({*of_file, *given})
    return parsed


def _before_rest(arguments: list[str]) -> list[str]:
    """Return the arguments up to a "--", after which they are another program's."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _given(arguments: list[str]) -> set[str]:
    """Return the names of the options among these arguments, as the settings have them."""
    options = [each.partition("=")[0] for each in _before_rest(arguments) if each.startswith("--")]
    names = {option.removeprefix("--").replace("-", "_") for option in options}
    return names | {name.removeprefix("no_") for name in names}


def config_of(settings: type[Any], arguments: list[str]) -> Path | None:
    """Return the file that ``--config`` names; None if there is none, or the settings have no such option.

    Raises:
        ConfigError: if two are given.
    """
    if "config" not in dict(_types(settings)):
        return None
    ours = _before_rest(arguments)
    files = []
    for option, value in zip(ours, [*ours, ""][1:], strict=True):
        name, equals, inner = option.partition("=")
        if name == "--config":
            files.append(inner if equals else value)
    require(len(files) < 2, "--config is given twice; give one file.")
    return Path(files[0]) if files else None


def options_in(file: Path, settings: type[Any]) -> dict[str, list[str]]:
    """Return the options in a YAML file, by name, as words of a command line.

    Raises:
        ConfigError: if the file can't be read, is no mapping of options to values, or has one that there isn't.
    """
    try:
        content = load_yaml(file.read_text(), typed=False)  # a value is what stands there: 010 is no octal number
    except OSError as error:
        raise ConfigError(f"config is {shown(str(file))}, which can't be read: {first_line(error)}.") from None
    except ValueError as error:
        raise ConfigError(f"config is {shown(str(file))}, which is not YAML: {error}.") from None
    require(
        isinstance(content, dict) and all(isinstance(name, str) for name in content),
        f"config is {shown(str(file))}; it must hold options and their values, such as lr: 0.001.",
    )
    kinds, options = dict(_types(settings)), dict[str, list[str]]()
    for given, value in content.items():
        name = given.replace("-", "_")
        require(name != "config", f"config {file} has config; one file can't name another.")
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, 1)
            meant = "".join(f" (did you mean {each}?)" for each in close)
            raise ConfigError(f"config {file} has {shown(given)}, which is not an option{meant}.")
        require(name not in options, f"config {file} has {name} twice; keep one.")
        values = value if isinstance(value, list) else [value]
        require(
            bool(values) and all(isinstance(each, str) and each for each in values),
            f"config {file} has {name} without a value; it must have one, or a list of values.",
        )
        option = f"--{name.replace('_', '-')}"
        if kinds[name] == "bool":
            require(value in ("true", "false"), f"config {file} has {name} = {values[0]}; it must be true or false.")
            options[name] = [option if value == "true" else f"--no-{option[2:]}"]
        elif len(values) == 1:
            options[name] = [f"{option}={values[0]}"]
        else:
            dashed = next((each for each in values if each.startswith("--")), "")
            require(not dashed, f"config {file} has {name} with the value {dashed}, which looks like an option.")
            options[name] = [option, *values]
    return options


def _check_repeated(settings: type[Any], arguments: list[str]) -> None:
    """Check that no option that takes several values is given twice: the values given first would be dropped.

    Raises:
        ConfigError: if one is.
    """
    ours = _before_rest(arguments)
    given = [argument.partition("=")[0].replace("_", "-") for argument in ours]
    for name, kind in _types(settings):
        option = f"--{name.replace('_', '-')}"
        require(
            not kind.startswith("tuple[") or given.count(option) < 2,
            f"{option} is given twice; give all its values after one {option}.",
        )


def _check_texts(settings: Any, arguments: list[str]) -> None:
    """Check that no path of these settings, or of the settings in them, is one that no file can have.

    Raises:
        ConfigError: if it is empty, too long, goes round in circles or through a file; or if a text holds a NUL.
    """
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value):
            _check_texts(value, arguments)
        for text in value if isinstance(value, tuple) else (value,):
            require("\0" not in str(text), f"{each.name} is {shown(str(text))}, which holds a NUL; remove that.")
            if not isinstance(text, Path):
                continue
            require(not _is_empty(each.name, arguments), f"{each.name} is empty; give a path.")
            _check_path(each.name, text, (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR))
            if each.name == "out":  # of what will lie in it
                _check_path(each.name, text, (errno.ENAMETOOLONG,), "/" + LONGEST)


def _is_empty(name: str, arguments: list[str]) -> bool:
    """Return whether the option is given without a value, as a shell variable that is not set leaves it."""
    spellings = {f"--{name}", f"--{name.replace('_', '-')}"}
    given = [
        *zip(arguments, [*arguments, None][1:], strict=True),
        *(each.split("=", 1) for each in arguments if "=" in each),
    ]
    return any(option in spellings and value == "" for option, value in given)


def _check_path(name: str, path: Path, impossible: tuple[int, ...], more: str = "") -> None:
    try:
        Path(f"{path}{more}").stat()
    except OSError as error:
        if error.errno in impossible:  # of the rest, whoever opens it says so
            raise ConfigError(f"{name} is {shown(str(path))}, which can't be a path: {error.strerror}.") from None


TYPES = {"int": "a whole number", "float": "a number", "tuple[int, ...]": "one or more whole numbers"}
TYPES |= {
    "tuple[float, ...]": "one or more numbers",
    "float | tuple[float, float] | str": "one number, two numbers or a rule",
}
"""What values of a type are called."""


def _plainly(complaint: str, settings: type[Any], arguments: list[str]) -> str:
    """Return tyro's complaint about a value in words that are not Python's."""
    names = [name.replace("_", "-") for name, _ in _types(settings)]
    unknown = re.match(r"Unrecognized options: --([\w-]+)", complaint)
    if complaint.startswith("Missing value for argument") and "'--" not in complaint:  # an unknown one before it
        options = (re.match(r"--([\w-]+)", argument) for argument in arguments)
        unknown = next((option for option in options if option and option[1] not in names), None)
    if unknown:
        close = difflib.get_close_matches(unknown[1], names, 1)
        return f"--{unknown[1]} is not an option" + "".join(f" (did you mean --{each}?)" for each in close)
    if extra := re.match(r"Unrecognized options: (.*)", complaint):
        return f"{extra[1]} is neither an option nor the value of one"
    if required := re.match(r"Missing from .*?: --([\w-]+)", complaint):
        return f"--{required[1]} is missing"
    if positional := re.match(r"Missing from .*?: ([A-Z]+) ", complaint):
        return f"{positional[1]} is missing"
    if missing := re.match(r"Missing value for argument '--([\w-]+)'", complaint):
        return f"--{missing[1]} has no value"
    if choice := re.match(r"invalid choice ('.*') for argument '--([\w-]+)'. Expected one of \((.*)\)", complaint):
        return f"--{choice[2]} is {choice[1]}; it must be one of {choice[3]}"
    found = re.fullmatch(r"Error parsing --(\S+?): .*?((?:(?:'[^']*'|\"[^\"]*\")(?:, )?)+|\[\])\]?", complaint)
    if not found:
        return complaint
    option, values = found.groups()
    kind = dict(_types(settings)).get(option.replace("-", "_"), "").removesuffix(" | None")
    given = values.replace("', '", " ") if values != "[]" else "empty"
    return f"--{option} is {given}; it must be {TYPES.get(kind, 'what --help says')}"


def _types(settings: type[Any]) -> Iterator[tuple[str, str]]:
    """Yield name and annotation of each field of these settings, and of the settings in them."""
    for each in dataclasses.fields(settings):
        if isinstance(each.default_factory, type) and dataclasses.is_dataclass(each.default_factory):
            yield from _types(each.default_factory)
        else:
            yield each.name, str(each.type)


def _one_sentence(box: str) -> str:
    """Return the first paragraph of tyro's error box, below its title, as one line."""
    lines = [re.sub(r"[╭╮╰╯│─]+|-{5,}", " ", line).strip() for line in box.splitlines() if not line.startswith("╭")]
    paragraphs = [" ".join(group) for filled, group in groupby(lines, bool) if filled]
    title = "╭" not in box  # without Unicode the title is a paragraph of its own
    return paragraphs[min(int(title), len(paragraphs) - 1)].rstrip(".")
