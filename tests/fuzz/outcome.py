"""What becomes of one drawn input, and what would be wrong about that."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

LONGEST = 500
"""Characters of a sentence, beside the path of a file in it."""


@dataclass(frozen=True)
class Outcome:
    """One input, and what was said to it."""

    given: str
    wrong: bool | None
    """Whether the input has to be refused, by its construction. None where only a traceback would be wrong."""
    names: str = ""
    """What a refusal has to name: the field."""
    said: str = ""
    """The refusal; empty if the input was taken."""
    error: BaseException | None = None
    """What was raised that is no refusal."""

    @property
    def problem(self) -> str:
        """What is wrong about it; empty if nothing is."""
        if self.error is not None:
            return f"a traceback: {self.error!r:.300}"
        if not self.said:
            return "wrong, and taken in silence" if self.wrong else ""
        if self.wrong is False:
            return f"right, and refused: {self.said}"
        if "\n" in self.said or len(re.sub(r"/\S+", "", self.said)) > LONGEST:
            return f"no sentence: {self.said}"
        said, *sections, last = self.said.replace("-", "_"), *self.names.replace("-", "_").split(".")
        whole = ".".join([*sections, last])  # an option is a field
        within = [".".join(sections[:count]) for count in range(1, len(sections) + 1)]
        if whole not in said and not any(re.search(f"has {section}(, which| at )", said) for section in within):
            return f"does not name {self.names}: {self.said}"
        return ""

    @property
    def kind(self) -> str:
        """The sentence without numbers, names of files and what is quoted: alike for inputs of one kind."""
        return re.sub(r"/[\w/.-]+|'[^']*'|\"[^\"]*\"|-?\d[\d.e+-]*", "…", self.said)


def attempt(
    given: str,
    do: Callable[[], object],
    refusals: tuple[type[BaseException], ...],
    wrong: bool | None = None,
    names: str = "",
) -> Outcome:
    """Give an input to ``do``; ``refusals`` are the exceptions with which it may refuse it."""
    try:
        do()
    except refusals as error:
        return Outcome(given, wrong, names, str(error) or type(error).__name__)
    except (Exception, SystemExit) as error:
        return Outcome(given, wrong, names, error=error)
    return Outcome(given, wrong, names)
