"""The sources of a run's data: one, or those of a mixture, and the sets that it is validated on beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from train.common.errors import ConfigError, require
from train.common.files import expanded, load_yaml
from train.common.schemas import MixtureFile, Order, parse_schema
from train.data import token_files
from train.data.blocks import Blocks
from train.data.config import Data, Text
from train.data.mixture import PERIOD, Mixture, order_of_all, shares_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

YAML = (".yaml", ".yml")


class Source(NamedTuple):
    """Text or tokens in one place."""

    name: str
    """Empty for the data of a run without a mixture."""
    settings: Data
    """As of a run on this source alone."""
    weight: float
    """Of its sequences among those that are trained on; 0 for what is only validated on."""


class ValidationSet(NamedTuple):
    """Text that the model is validated on."""

    name: str
    """Of its own column; empty for the held-out text of a run without a mixture."""
    blocks: Blocks
    weight: float
    """Of its loss in the run's validation loss; 0 if that is without it."""


@dataclass(frozen=True)
class Sources:
    """All that a run reads, as its settings say."""

    settings: Data
    training: tuple[Source, ...]
    only: tuple[Source, ...]
    """The sets that are only validated on."""

    @classmethod
    def of(cls, settings: Data) -> Sources:
        """Find them.

        Raises:
            ConfigError: if the file of a mixture is damaged, or two sets have one name.
        """
        training = [Source("", replace(settings, validation=()), 1.0)]
        if Path(settings.data).suffix.lower() in YAML:
            training = _mixture(settings)
        only: list[Source] = []
        for name, _, place in (each.partition("=") for each in settings.validation):
            require(
                Path(place).suffix.lower() not in YAML,
                f"validation is {name}={place}, which is a mixture; give each of its sources a name here.",
            )
            require(
                name not in [source.name for source in training],
                f"validation has {name}, which is a source of {settings.data}, too; give it another name.",
            )
            # Everything in it is held out.
            only.append(Source(name, replace(settings, data=place, validation=(), validation_fraction=1.0), 0.0))
        return cls(settings, tuple(training), tuple(only))

    @property
    def plain(self) -> bool:
        """Whether this is one source without a name, and no set beside it."""
        return not self.training[0].name and not self.only

    @property
    def shares(self) -> tuple[int, ...]:
        """The training sources' shares of the sequences; see :class:`train.data.mixture.Mixture`."""
        return shares_of([source.weight for source in self.training])

    def prepare(self, tokenizer: PreTrainedTokenizerBase, begun_on: str = "") -> list[str]:
        """Make all tokens ready (:func:`train.data.token_files.prepare`), and return the names of their folders.

        Raises:
            ConfigError: if a source is not what it should be.
        """
        return self._each(
            lambda settings: token_files.prepare(settings, tokenizer, begun_on if self.plain else "").name
        )

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a digest of everything that decides the tokens. No text is tokenized.

        Raises:
            ConfigError: if there is no such data.
        """
        return self.name(self._each(lambda settings: token_files.fingerprint(settings, tokenizer)))

    def _each(self, work: Callable[[Data], str]) -> list[str]:
        names = []
        for source in (*self.training, *self.only):
            with _named(source.name):
                names.append(work(source.settings))
        self._check_overlap()
        return names

    def _check_overlap(self) -> None:
        """Check that no file of a validation set is one that is trained on.

        Raises:
            ConfigError: if one is.
        """
        trained = {each for source in self.training if self.only for each in token_files.contents(source.settings)}
        for held_out in self.only:
            for summed, file in token_files.contents(held_out.settings).items():
                require(
                    summed not in trained,
                    f"validation has {held_out.name}, whose {file} is trained on as well; "
                    "leave it out of one of the two.",
                )

    def name(self, folders: list[str]) -> str:
        """Return the name that stands for all tokens in run.json; ``folders`` is of :meth:`prepare`."""
        if self.plain:
            return folders[0]
        names = [source.name for source in (*self.training, *self.only)]
        shares = [*self.shares, *(0 for _ in self.only)]
        wanted = json.dumps([self.settings.validation_fraction == 0.0, *zip(names, shares, folders, strict=True)])
        return f"mixture-{blake2b(wanted.encode(), digest_size=8).hexdigest()}"

    def open(
        self, folders: list[str], vocabulary: int, order: Order | None = None
    ) -> tuple[Mixture, list[ValidationSet]]:
        """Memory-map all tokens.

        Args:
            folders: names of their folders, of :meth:`prepare`.
            vocabulary: number of different tokens.
            order: how a run that has begun shuffles them; None for one that begins now.

        Raises:
            ConfigError: if a source has changed since, or holds not a single sequence.
        """
        blocks: list[Blocks] = []
        sets: list[ValidationSet] = []
        nothing_held_out = self.settings.validation_fraction == 0.0
        for source, name in zip((*self.training, *self.only), folders, strict=True):
            folder = token_files.folder_of(source.settings, name)
            train, held_out = token_files.open_tokens(folder, source.settings, vocabulary)
            if source.weight:
                blocks.append(train)
                require(
                    len(train) > 0,
                    f"data is {source.settings.data!r}, whose training text is less than one sequence of "
                    f"{train.length} tokens; give more text, or a shorter sequence_length.",
                )
            if not (source.weight and nothing_held_out):
                sets.append(ValidationSet(source.name, held_out, source.weight))
        if nothing_held_out:
            sets[0] = sets[0]._replace(weight=1.0)
        names = tuple(source.name for source in self.training)
        return Mixture(names, tuple(blocks), self.shares, order or order_of_all(tuple(blocks))), sets

    def summary(self, folders: list[str]) -> str:
        """Describe, in a line or two for each source, what was read and what was left out."""
        lines = []
        for source, name in zip((*self.training, *self.only), folders, strict=True):
            text = token_files.summary(token_files.folder_of(source.settings, name), source.settings)
            lines.append(f"{source.name}: {text}" if source.name else text)
        return "\n".join(lines)


def _mixture(settings: Data) -> list[Source]:
    file = expanded(Path(settings.data), "data")
    try:
        content = load_yaml(file.read_text())
        mixture = parse_schema(MixtureFile, json.dumps({"sources": content}, default=str))
    except OSError as error:
        raise ConfigError(f"data is {settings.data!r}, which can't be read: {error.strerror}.") from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data is {settings.data!r}, which is no mixture: {reason}; it must be a list of sources, each with name, "
            "path and weight."
        ) from None
    names = [source.name for source in mixture.sources]
    sources = []
    for source, share in zip(mixture.sources, shares_of([each.weight for each in mixture.sources]), strict=True):
        require(names.count(source.name) == 1, f"data is {settings.data!r}, which has the source {source.name} twice.")
        require(
            share > 0,
            f"data is {settings.data!r}, where {source.name} has the weight {source.weight:g}, less than one in "
            f"{PERIOD} of all; leave it out, or give it more.",
        )
        require(
            Path(source.path).suffix.lower() not in YAML,
            f"data is {settings.data!r}, where the path of {source.name} is a mixture itself; give its sources here.",
        )
        is_path = source.path != "stdlib" and not source.path.startswith("hub:")
        place = str(file.parent / expanded(Path(source.path), "path")) if is_path else source.path
        own = replace(
            settings,
            data=place,
            text_field=source.text_field or settings.text_field,
            token_dtype=source.token_dtype or settings.token_dtype,
            validation=(),
        )
        with _named(source.name):
            Text.check(own)
        sources.append(Source(source.name, own, source.weight))
    return sources


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let an error in the block say which source it is of."""
    try:
        yield
    except ConfigError as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from None
