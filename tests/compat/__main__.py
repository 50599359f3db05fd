"""Which DeepSpeed this works with: ``python -m tests.compat 0.16.9 0.19.8``.

Each version's source archive is unpacked in build/compat and comes before the installed DeepSpeed. Then it is tried
what ZeRO does at each stage (``python -m balanced_adam``), and the tests of the optimizer and of parity are run, with
one pass among them. ``--write`` keeps the outcome in tests/compat/outcomes and makes docs/compatibility.md's table of
all that are there. Four to eight minutes a version.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Annotated

import pandas as pd
import tyro
from packaging.version import Version

from tests.compat.archives import environment
from train.common.files import REPOSITORY

TESTS = ("tests/optimizer", "tests/parity")
PAGE = REPOSITORY / "docs" / "compatibility.md"
OUTCOMES = REPOSITORY / "tests" / "compat" / "outcomes"
BEGIN, END = "<!-- made by python -m tests.compat: begin -->\n", "<!-- end -->\n"
COLUMNS = ("DeepSpeed", "torch", "Python", "tried on")


@dataclass(frozen=True, kw_only=True)
class Compat:
    """Which versions, and what to do with the tables."""

    versions: tyro.conf.Positional[tuple[str, ...]] = ()
    """DeepSpeed's versions. None: the one that is installed."""
    tests: tuple[str, ...] = TESTS
    """Files and folders to run with each. None: only try ZeRO's stages."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3
    """Processes that run the tests."""
    write: bool = False
    """Keep the outcomes, and put all that were kept in docs/compatibility.md."""


@dataclass
class Outcome:
    """One DeepSpeed."""

    about: dict[str, str]
    """What was tried, by column."""
    stages: dict[str, str] = field(default_factory=dict)
    """How each stage takes its steps."""
    tests: str = "not run"
    skipped: list[str] = field(default_factory=list)
    """Reasons, of whatever isn't skipped with the version this is developed with."""
    failed: list[str] = field(default_factory=list)


def outcome(version: str | None, settings: Compat) -> Outcome:
    """Try one version; None is the one that is installed."""
    settled = environment(version)
    line = [sys.executable, "-m", "balanced_adam"]
    doctor = subprocess.run(line, env=settled, capture_output=True, text=True, cwd=REPOSITORY)
    said = doctor.stdout
    versions = re.search(r", torch (\S+), Python (\S+)\nDeepSpeed: (\S+)", said)
    if versions is None:
        raise RuntimeError(f"DeepSpeed {version} can't be tried:\n{said}{doctor.stderr[-3000:]}")
    values = (versions[3], versions[1], versions[2], date.today().isoformat())
    found = Outcome(dict(zip(COLUMNS, values, strict=True)))
    found.stages = dict(re.findall(r"^  (ZeRO-[^:]*): (.*)$", said, re.MULTILINE))
    if settings.tests:
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEs", "-n", str(settings.workers)]
        line += ["--dist", "worksteal", *settings.tests]
        run = subprocess.run(line, env=settled, capture_output=True, text=True, cwd=REPOSITORY)
        summary = re.search(r"^\W*(\d+ .*) in [\d.]+s", run.stdout, re.MULTILINE)
        if summary is None:
            raise RuntimeError(
                f"the tests with DeepSpeed {version} did not end:\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
            )
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary[1])
        found.tests = ", ".join(f"{number} {what}" for number, what in counts)
        found.failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
        found.skipped = sorted(set(re.findall(r"^SKIPPED \[\d+\] [^:]+:\d*:? ?(.*)$", run.stdout, re.MULTILINE)))
    return found


def tables(outcomes: list[Outcome]) -> str:
    """Both tables, and what was left out of the tests, as Markdown."""
    rows = [{**each.about, **each.stages, "tests": each.tests} for each in outcomes]
    frame = pd.DataFrame(rows).fillna("")
    lines = [[*map(str, frame.columns)], ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    for each in outcomes:
        for what, reasons in (("Left out", each.skipped), ("Failed", each.failed)):
            if reasons:
                text += f"\n{what} with {each.about['DeepSpeed']} and torch {each.about['torch']}:\n"
                text += "".join(f"- {reason}\n" for reason in reasons)
    return text


def main() -> int:
    """Run it; 1 if a test failed."""
    settings = tyro.cli(Compat, description=__doc__)
    versions = sorted(settings.versions, key=Version)
    outcomes = [outcome(version, settings) for version in versions] or [outcome(None, settings)]
    print(tables(outcomes))
    if settings.write:
        for each in outcomes:
            name = f"deepspeed-{each.about['DeepSpeed']}-torch-{each.about['torch'].partition('+')[0]}.json"
            (OUTCOMES / name).write_text(json.dumps(asdict(each), indent=1) + "\n")
        kept = [Outcome(**json.loads(file.read_text())) for file in OUTCOMES.glob("*.json")]
        text = tables(sorted(kept, key=lambda each: [Version(each.about[name]) for name in COLUMNS[:2]]))
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    return int(any(each.failed for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
