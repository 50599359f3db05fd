"""A run's whole life, as a user has it; ``python -m tests.perf.end_to_end FOLDER``.

`small` is trained under wsd with chunked loss on two ranks, killed, and resumed; an annealing run branches from its
stable phase on three ranks at stage 3; that is exported, and transformers loads it. Each command is measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from tests.perf.commands import Watched, command, watched
from tests.perf.measure import machine
from tests.perf.own_corpus import tokenizer, write
from train.analysis.plots import markdown_table
from train.checkpoint.manifest import newest_step
from train.distributed.launch import prepare_environment
from train.run.metrics import read_metrics

COMMON = (
    "--model small --batch 12 --sequence-length 256 --schedule wsd --loss chunked --warmup 10 --validation-batches 4"
)
LAST = 90
"""Step at which the branch ends."""


def loss_by_transformers(folder: Path, options: list[str], place: Path) -> float:
    """The mean loss of an exported model on the blocks that a run validates on, by transformers alone."""
    from transformers import AutoModelForCausalLM

    from train.probe.single_rank import single_rank_run

    prepare_environment()
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with single_rank_run("end_to_end", place, LAST, tuple(options)) as trainer, torch.no_grad():
        (held_out,) = trainer.validation
        blocks = held_out.blocks.take(trainer.validated(held_out.blocks))
        return sum(float(network(input_ids=each[None], labels=each[None]).loss) for each in blocks) / len(blocks)


def main() -> None:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "bpe").exists():
        write(place / "text", 20)
        tokenizer(place / "bpe", place / "text")
    for name in ("stable", "annealed", "exported", "exported-bf16"):
        shutil.rmtree(place / name, ignore_errors=True)
    stable, annealed, log = place / "stable", place / "annealed", place / "log.txt"
    data = f"--data {place / 'text'} --tokenizer {place / 'bpe'} --data-cache {place / 'cache'}"
    options = [*COMMON.split(), *data.split(), "--validation-batches", "4"]

    def run(ranks: int, out: Path, *more: object) -> list[str]:
        launcher = command("torch.distributed.run", "--nproc-per-node", ranks, "-m", "train.pretrain", "--out", out)
        return [*launcher, *options, "--save-every", "20", "--keep", "9", *map(str, more)]

    first = run(2, stable, "--steps", 100)
    second = run(3, annealed, "--branch-from", stable / "checkpoints" / "step-0000060", "--steps", LAST, "--decay", 30)
    second += ["--final-lr", "0", "--ds-config", "ds_configs/zero3.json"]
    rows: list[dict[str, str]] = []

    def row(name: str, taken: Watched) -> None:
        rows.append(
            {
                "command": name,
                "seconds": f"{taken.seconds:.0f}",
                "peak memory, MiB": f"{taken.memory:.0f}",
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)

    row(
        "train, 2 ranks, ZeRO-1, killed after step 40 was saved",
        watched(first, lambda: newest_step(stable / "checkpoints") >= 40, log),
    )
    at = newest_step(stable / "checkpoints")
    row(f"the same command: steps {at} to 100", watched(first, log=log))
    row(f"branch at step 60, 3 ranks, ZeRO-3: to step {LAST}", watched(second, log=log))
    row("export, float32", watched(command("train.export", annealed, place / "exported"), log=log))
    export = command("train.export", annealed, place / "exported-bf16", "--dtype", "bf16")
    row("export, bf16", watched(export, log=log))
    print(f"{machine()}\n\n{markdown_table(rows)}")
    ended = json.loads((annealed / "result.json").read_text())["validation_loss"]
    theirs = loss_by_transformers(place / "exported", options, place)
    rounded = loss_by_transformers(place / "exported-bf16", options, place)
    last = [line["lr"] for line in read_metrics(annealed) if "lr" in line][-1]
    print(f"validation loss of the run: {ended:.9f}; of the exported model in transformers: {theirs:.9f},")
    print(f"which is {abs(theirs / ended - 1):.1e} of it away. Exported in bf16: {rounded:.6f}.")
    print(f"The last step's lr was {last:.2e}, {last / 1e-3:.3f} of the peak.")
    whole = json.loads((stable / "result.json").read_text())["validation_loss"]
    print(f"The stable run's own validation loss, after its decay at step 100: {whole:.4f}.")


if __name__ == "__main__":
    main()
