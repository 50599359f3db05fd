"""Schemas of what launchers say in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from train.common.errors import RankError


def _digits(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):  # int() takes more than launchers write: "1_0", " 3"
        raise ValueError(text)
    return int(text)


Number = Annotated[int, BeforeValidator(_digits)]
Index = Annotated[Number, Field(ge=0, description="a whole number, at least 0")]
Count = Annotated[Number, Field(ge=1, description="a whole number, at least 1")]
Port = Annotated[Number, Field(ge=1, lt=65536, description="a port, from 1 to 65535")]


TASKS = r"[0-9]{1,6}(\(x[0-9]{1,6}\))?"


class _Environment(BaseModel):
    """Base of both."""

    model_config = ConfigDict(frozen=True)


class Srun(_Environment):
    """What srun sets in each task."""

    SLURM_STEP_NUM_TASKS: Count = 1
    SLURM_PROCID: Index = 0
    SLURM_LOCALID: Index = 0
    SLURM_NODEID: Index = 0
    SLURM_STEP_TASKS_PER_NODE: Annotated[
        str, Field(pattern=f"^{TASKS}(,{TASKS})*$", description='a list of the tasks on each host, as "4(x2),3"')
    ] = "1"


class Launched(_Environment):
    """What torchrun, deepspeed and accelerate set in each rank."""

    RANK: Index = 0
    LOCAL_RANK: Index = 0
    WORLD_SIZE: Count = 1
    LOCAL_WORLD_SIZE: Count = 1
    LOCAL_SIZE: Count = 1
    MASTER_ADDR: Annotated[str, Field(min_length=1, description="a host name or an address")] = "127.0.0.1"
    MASTER_PORT: Port = 29500


BELOW = (
    ("RANK", "WORLD_SIZE"),
    ("LOCAL_RANK", "WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def check(kind: type[_Environment], environment: Mapping[str, str]) -> None:
    """Check the variables of one kind that are set.

    Raises:
        RankError: naming the variable, its value and what would be right. It is on whichever rank has it: RANK may be
            what is wrong.
    """
    optional = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # empty is as good as unset
    given = {
        name: environment[name]
        for name in kind.model_fields
        if name in environment and not (name in optional and not environment[name])
    }
    try:
        found = kind.model_validate(given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise RankError(_sentence(name, given[name], kind.model_fields[name].description or "a number")) from None
    for rank, ranks in BELOW:
        if rank in given and ranks in given and getattr(found, rank) >= getattr(found, ranks):
            raise RankError(_sentence(rank, given[rank], f"less than {ranks}, which is {given[ranks]}"))


def _sentence(name: str, value: str, right: str) -> str:
    return (
        f"{name} is {value!r} in the environment; it must be {right}: unset it, or start the ranks with torchrun, "
        "deepspeed, accelerate or srun."
    )
