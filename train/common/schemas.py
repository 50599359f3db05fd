"""Schemas of the files that this program writes, used to validate them when they are read.

A file may hold more fields than its schema names, since versions differ in their fields.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

PILOT_FILE = "pilot.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
"""What a source or a validation set may be called: it is a part of the names of metrics."""
SHA256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Part = Literal["train", "validation"]
Step = Annotated[int, Field(ge=0, lt=2**63)]  # what numpy takes
Count = Annotated[int, Field(ge=1, lt=2**63)]
SizeAndSum = Annotated[tuple[NonNegativeInt, SHA256], Field(strict=False)]  # in JSON a list
Stamped = Annotated[tuple[NonNegativeInt, int, SHA256], Field(strict=False)]  # size, time of change in ns, sum


class Schema(BaseModel):
    """Base of all schemas. Types are strict: a number is never read from a string, nor a string from a number."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class Guarded(Schema):
    """A file that stores its own checksum, so that any change is detected. Files of earlier versions have none."""

    @model_validator(mode="before")
    @classmethod
    def _is_as_it_was_written(cls, content: Any) -> Any:
        if isinstance(content, dict) and "sum" in content and content["sum"] != guard(content)["sum"]:
            raise ValueError("it has changed since it was written")
        return content


def guard(content: dict[str, Any]) -> dict[str, Any]:
    """Return ``content`` with its checksum added, as a :class:`Guarded` file stores it."""
    plain = {key: value for key, value in json.loads(json.dumps(content, default=str)).items() if key != "sum"}
    return {**plain, "sum": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


Kind = TypeVar("Kind", bound=Schema)


def parse_schema(kind: type[Kind], text: str | bytes) -> Kind:
    """Parse JSON ``text`` into ``kind``.

    Raises:
        ValueError: if the text does not fit the schema, in one line that names the field.
    """
    try:
        # Not pydantic's own parser: it rejects the lone surrogates of file names that are not UTF-8.
        content = json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON at line {error.lineno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"it has no {where}") from None
        message = re.sub(r" or instance of \w+", "", first["msg"].removeprefix("Value error, "))
        raise ValueError(f"{where + ': ' if where else ''}{message}") from None


def read_schema(kind: type[Kind], path: Path) -> Kind:
    """Read a JSON file into ``kind``.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it does not fit the schema, in one line that names the field.
    """
    return parse_schema(kind, path.read_bytes())


class Layout(Schema):
    """How a checkpoint's state is partitioned over the ranks."""

    world: PositiveInt
    stage: Annotated[int, Field(ge=0, le=3)]
    dtype: Literal["fp32", "bf16", "fp16"]
    accumulation: str | None
    round_robin: bool | None = None
    """None in checkpoints of older versions."""


class CheckpointFile(Guarded):
    """complete.json, the manifest of a checkpoint."""

    step: Step
    parameters: PositiveInt
    layout: Layout
    files: Annotated[dict[str, SizeAndSum], Field(min_length=1)]
    run: dict[str, Any] | None = None
    """Identity of the run that wrote the checkpoint. None in checkpoints of older versions."""
    tokens: str | None = None
    """Name of the token folder that run trains on, as in run.json. None in checkpoints of older versions."""

    @field_validator("files")
    @classmethod
    def _names_lie_within(cls, files: dict[str, Any]) -> dict[str, Any]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name or str(path) != name:
                raise ValueError(f"{name!r} is not the name of a file within the checkpoint")
        return files


Order = Literal["permutation", "feistel"]
"""How the blocks of an epoch are shuffled: by a permutation in memory, or by a function of the index."""


Loss = Literal["full", "chunked"]
"""How the loss is computed: from all logits at once, or from a few at a time."""


class Parent(Schema):
    """The checkpoint of another run that a run began from."""

    checkpoint: str
    step: Step
    files: dict[str, SizeAndSum]


class RunFile(Schema):
    """run.json: which run a folder belongs to, and what it trains on."""

    identity: dict[str, Any]
    tokens: str
    order: Order = "permutation"
    """How the data is shuffled (train.data.blocks). Older runs don't say so."""
    loss: Loss = "full"
    """How the loss is computed. Older runs don't say so."""
    rows: PositiveInt | None = None
    """Of the model's embedding. None in older runs: as many as the tokenizer has tokens."""
    tokenizer: str | None = None
    """Digest of the tokenizer. Older runs don't say so."""
    parent: Parent | None = None
    """The checkpoint of another run that this one began from (``--branch-from``)."""
    init_from: dict[str, SHA256] | None = None
    """The files of weights that this run began from (``--init-from``)."""


class WandbFile(Schema):
    """wandb.json: the run's id in Weights & Biases."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_-]{1,128}$")]


class TrainedModel(Schema):
    """The model options of a run."""

    model: str
    init_from: str | None = None


class TrainedData(Schema):
    """The data options of a run, as far as they matter to its model."""

    tokenizer: str
    sequence_length: Count
    eos_id: Step | None = None


class TrainedOptions(Schema):
    """The identity of a run, as far as it says what its model is."""

    model: TrainedModel
    data: TrainedData


class TrainedRun(Schema):
    """run.json, as far as it says what the run's model is."""

    identity: TrainedOptions


class ResultFile(Schema):
    """result.json: how a run ended."""

    status: Literal["finished", "diverged"]
    step: Step
    validation_loss: float | None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    parameters: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    validation_blocks: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    device: str | None = None

    @model_validator(mode="after")
    def _finished_with_a_loss(self) -> ResultFile:
        if self.status == "finished" and (self.validation_loss is None or not math.isfinite(self.validation_loss)):
            raise ValueError(f"status is finished and validation_loss is {self.validation_loss}")
        return self


class MetricsLine(Schema):
    """A line of metrics.jsonl: one training step, or one validation. A number that was not finite is None."""

    step: Step
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    update_max: float | None = None
    update_rms: float | None = None
    projected: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    skipped_steps: int | None = None
    memory_gib: float | None = None
    mfu: float | None = None
    validation_loss: float | None = None


class PlannedRun(Schema):
    """One run in manifest.json of a comparison."""

    name: str
    arm: str
    lr: float
    seed: Step
    arguments: list[str] = []


class PlanFile(Schema):
    """manifest.json of a comparison: its runs, how they are started, and what a report needs."""

    runs: list[PlannedRun]
    steps: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    ranks: PositiveInt | None = None
    launcher: str | None = None
    lr_from: list[str] = []
    command: list[str] = []
    packages: dict[str, str | None] = {}


class PilotFile(Schema):
    """pilot.json, written by train.choose_beta."""

    beta: float | None
    steps: Count
    tokens_per_step: Count
    parameters: Count


class SumsFile(Guarded):
    """Cached checksums of a corpus' files, by name, size and modification time.

    A name has several entries where hosts keep their own copies under the same path.
    """

    files: dict[str, list[Stamped]]


class ShardsFile(Guarded):
    """about.json of tokens that were made elsewhere: which shards they are, and that their ids were looked at."""

    shards: list[list[Any]]
    """Dtype, offset in bytes and number of tokens of each."""
    greatest: list[NonNegativeInt]
    """The greatest id in each."""
    tokens: dict[Part, NonNegativeInt]
    left_out: dict[str, list[str]] = {}


def _number(value: Any) -> Any:
    """Return a text such as 1e-3, which is no number in YAML 1.1, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class MixtureSource(Schema):
    """One source in the file of a mixture."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    path: Annotated[str, Field(min_length=1)]
    """As of --data; a relative one begins at the folder of the file."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
    """The share of its sequences, after division by the sum of all weights."""
    text_field: str | None = None
    token_dtype: Literal["uint16", "uint32"] | None = None
    """These two as the options of their name, for this source."""


class MixtureFile(Schema):
    """The file of a mixture, which is a list of sources."""

    sources: Annotated[list[MixtureSource], Field(min_length=1)]


class ReadText(Guarded):
    """What was read of a text, and what was left out."""

    documents: dict[Part, NonNegativeInt] = {}
    files: NonNegativeInt = 0
    read: NonNegativeInt = 0
    """Number of documents read. ``documents`` counts duplicates once."""
    bytes: NonNegativeInt = 0
    dropped: dict[str, NonNegativeInt] = {}
    first: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}


class About(ReadText):
    """about.json of a token folder: its format, sizes and checksums."""

    dtype: Literal["uint16", "uint32"]
    tokens: dict[Part, NonNegativeInt]
    sha256: dict[Part, SHA256]

    @model_validator(mode="after")
    def _has_both_parts(self) -> About:
        for name, parts in (("tokens", self.tokens), ("sha256", self.sha256)):
            if len(parts) != 2:
                raise ValueError(f"{name} lacks a part")
        return self


class PreparedShard(Schema):
    """A file of tokens in a folder that train.prepare has made."""

    name: Annotated[str, Field(pattern=r"^(train|validation)-\d{5,}\.bin$")]
    tokens: PositiveInt
    sha256: SHA256
    modified: int
    """When it was written: st_mtime_ns. A file of this time has not been changed since."""


class PreparedFile(ReadText):
    """prepared.json of a folder that train.prepare has made."""

    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    """Digest of everything that decides its tokens."""
    tokenizer_name: str
    eos_id: NonNegativeInt | None
    """The token at the end of each document."""
    tokens: dict[Part, NonNegativeInt]
    shards: list[PreparedShard]
    """In the order of their tokens, those to train on first."""
    digest: str
    """Of the text, the tokenizer and the settings that the tokens were made of."""


class PreparedPart(Guarded):
    """about.json of a part of the text that train.prepare has tokenized, before it is done with all."""

    documents: PositiveInt
    tokens: NonNegativeInt
    read: dict[str, Any]
    """What had been read at its end; the fields of train.data.readers.Read."""
