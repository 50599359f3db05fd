"""``python -m tests.parity`` prints the tables of parity as Markdown; docs/parity.md shows them."""

from __future__ import annotations

from math import isnan

import pandas as pd

from balanced_adam.rule import VARIANTS
from tests.parity.cases import PHANTOM, Case, matrix, of_the_wrong, outcomes
from tests.parity.compare import differences
from tests.parity.control import TENSORS
from tests.parity.model import WORLDS
from tests.parity.real import FP32, greatest, plain_run, traces
from tests.parity.relatives import RELATIVES
from tests.parity.test_resume import MORE, SETTINGS_OF_GROUP_0, resumed, uncut


def where(case: Case, world: int) -> dict[str, str]:
    dtype = {"fp32": "fp32", "bf16": "bf16, fp32 master"}[case.dtype] + ", fp32 accumulation" * bool(case.grad_accum)
    return {"stage": str(case.stage), "world": str(world), "dtype": dtype, "offload": "cpu" if case.offload else "no"}


def merged(rows: list[dict[str, str]], over: str) -> list[dict[str, str]]:
    """Rows that agree in all but one column become one row, which lists that column's values."""
    by = [column for column in rows[0] if column != over]
    joined = pd.DataFrame(rows).groupby(by, sort=False)[over].agg(", ".join).reset_index()
    return [dict(row) for row in joined[list(rows[0])].to_dict("records")]


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [" | ".join(row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in [" | ".join(rows[0]), "|".join(["---"] * len(rows[0])), *lines])


def exact() -> list[dict[str, str]]:
    rows = [
        where(case, world)
        | {"clipping": "on" if case.clip else "off"}
        | {key: f"{outcomes(world)[case][key]:.0f}" for key in TENSORS}
        for world in WORLDS
        for case in matrix(world)
        if case.variant == "adam"
    ]
    ways = [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]  # however the step was taken
    return merged(merged(ways, "world"), "clipping")


def relatives() -> list[dict[str, str]]:
    """What is not plain BalancedAdam: variants of AdamW, and its relatives."""
    rows = []
    for variant in (*VARIANTS[1:], *RELATIVES):
        cells = [(case, world) for world in WORLDS for case in matrix(world) if case.variant == variant]
        found = [outcomes(world)[case] for case, world in cells]
        rows.append(
            {
                "optimizer": f"{variant} ({RELATIVES[variant][0]})" if variant in RELATIVES else variant,
                "cells": str(len(cells)),
                "of them packed16": str(sum(case.state != "fp32" for case, _ in cells)),
                "stages": ", ".join(map(str, sorted({case.stage for case, _ in cells}))),
                "ranks": ", ".join(map(str, sorted({world for _, world in cells}))),
            }
            | {key: f"{max(each[key] for each in found):.0f}" for key in TENSORS}
        )
    return rows


def real() -> list[dict[str, str]]:
    found = [(case, world, greatest(traces(world)[case], plain_run())) for case in FP32 for world in (2, 3)]
    return [
        where(case, world) | {key: "n/a" if isnan(ulp) else f"{ulp:.1f}" for key, ulp in apart.items()}
        for case, world, apart in found
    ]


def unpatched() -> list[dict[str, str]]:
    phantom = of_the_wrong()[PHANTOM]
    end = uncut()[0][SETTINGS_OF_GROUP_0._replace(mutant=None)][1]
    settings = differences([resumed(MORE, True)[0][SETTINGS_OF_GROUP_0][1]], end)
    named = {"start-up at stage 0 in bf16": phantom, "universal checkpoint at stage 3, two groups": settings}
    return [{"where": name} | {key: f"{found[key]:.0f}" for key in TENSORS} for name, found in named.items()]


if __name__ == "__main__":
    print("Exact gradients, greatest difference in ulp:\n")
    print(markdown(exact()))
    print("\nOther optimizers, greatest difference in ulp over all of their cells:\n")
    print(markdown(relatives()))
    print("\nA small Llama, greatest difference in ulp of the greatest value:\n")
    print(markdown(real()))
    print("\nWithout the patches, as any optimizer under plain DeepSpeed, in ulp:\n")
    print(markdown(unpatched()))
