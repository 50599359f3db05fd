"""One's own corpus, from text to a run that is killed and resumed; ``python -m tests.perf.own_corpus FOLDER``.

The text is the Python sources of this environment, as .jsonl and .jsonl.zst. A BPE tokenizer is trained on a part of
it. train.prepare makes shards of 50, 100 and 200 MB of it; each is measured. The largest, mixed with prose in another
format, is trained on by two ranks, killed, and resumed on three; a second run is not killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow

from tests.perf.commands import command, watched
from tests.perf.measure import machine
from train.analysis.plots import markdown_table
from train.checkpoint.manifest import newest_step
from train.run.metrics import read_metrics

SIZES = (50, 100, 200)
VOCABULARY = 16384


def sources() -> Iterator[Path]:
    """All Python files of this environment, in a fixed order."""
    for place in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        yield from sorted(Path(place).rglob("*.py"))


def write(place: Path, megabytes: int) -> None:
    """So many MB of different documents, in files of 10 MB, every other one compressed."""
    place.mkdir()
    held, total, number = bytearray(), 0, 0
    seen: set[bytes] = set()
    for file in sources():
        text = file.read_bytes()
        if not text.strip() or text in seen:
            continue
        seen.add(text)
        held += json.dumps({"text": text.decode(errors="replace"), "path": file.name}).encode() + b"\n"
        total += len(text)
        done = total >= megabytes * 10**6
        if len(held) >= 10**7 or done:
            target = place / f"{number:03}.jsonl{'.zst' * (number % 2)}"
            target.write_bytes(pyarrow.compress(bytes(held), "zstd", asbytes=True) if number % 2 else held)
            held, number = bytearray(), number + 1
        if done:
            return
    raise SystemExit(f"this environment has only {total / 1e6:.0f} MB of Python")


def tokenizer(place: Path, corpus: Path) -> None:
    """A byte-level BPE, trained on the first file."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    with (corpus / "000.jsonl").open() as lines:
        trained = ByteLevelBPETokenizer()
        texts = (json.loads(line)["text"] for line in lines)
        trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>").save_pretrained(place)


def prepared(place: Path) -> None:
    """Prepare each size twice, by all cores and by one process, and print the table."""
    rows: list[dict[str, str]] = []
    for size in SIZES:
        write(place / f"text-{size}", size)
        if not (place / "bpe").exists():
            tokenizer(place / "bpe", place / f"text-{size}")
        for processes in (1, os.cpu_count() or 1):
            out = place / f"tokens-{size}"
            shutil.rmtree(out, ignore_errors=True)
            options: tuple[object, ...] = ("--data", place / f"text-{size}", "--tokenizer", place / "bpe", "--out", out)
            options += ("--data-cache", place / "cache", "--processes", processes, "--validation-fraction", 0.005)
            seconds, cpu, memory = watched(command("train.prepare", *options))
            about = json.loads((out / "prepared.json").read_text())
            tokens = sum(about["tokens"].values())
            rows.append(
                {
                    "text, MB": f"{size}",
                    "documents": f"{about['read']}",
                    "tokens": f"{tokens / 1e6:.1f} M",
                    "processes": f"{processes}",
                    "seconds": f"{seconds:.0f}",
                    "CPU seconds": f"{cpu:.0f}",
                    "peak memory, MiB": f"{memory:.0f}",
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    print(markdown_table(rows))


def killed_and_resumed(place: Path) -> None:
    """Train on the largest mixed with prose, killed on two ranks and resumed on three, and print how losses differ."""
    import pydoc_data.topics

    prose, other = place / "prose", place / "other"
    for folder in (prose, other):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for number, (name, text) in enumerate(pydoc_data.topics.topics.items()):
        ((prose if number % 8 else other) / f"{name.replace('/', '_')}.txt").write_text(text)
    mix = place / "mix.yaml"
    mix.write_text(
        f"- {{name: code, path: tokens-{SIZES[-1]}, weight: 0.9}}\n- {{name: prose, path: prose, weight: 0.1}}\n"
    )
    options = "--steps 120 --warmup 12 --batch 12 --sequence-length 256 --save-every 20 --validate-every 60"
    options += f" --validation-batches 4 --model small --data {mix} --tokenizer {place / 'bpe'} --document-mask"
    options += f" --data-cache {place / 'cache'} --validation other={other}"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def start(out: Path, ranks: int) -> subprocess.Popen[bytes]:
        line = command("torch.distributed.run", "--nproc-per-node", ranks, "-m", "train.pretrain", "--out", out)
        log = (place / f"{out.name}-{ranks}.log").open("wb")
        return subprocess.Popen([*line, *options.split()], env=environment, stdout=log, stderr=log)

    for name in ("killed", "uncut"):
        shutil.rmtree(place / name, ignore_errors=True)
    process = start(place / "killed", 2)
    while newest_step(place / "killed" / "checkpoints") < 40:
        if process.poll() is not None:
            raise SystemExit(f"see {place}/killed-2.log")
        time.sleep(0.5)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.wait()
    at = newest_step(place / "killed" / "checkpoints")
    for out, ranks in ((place / "killed", 3), (place / "uncut", 2)):
        if start(out, ranks).wait():
            raise SystemExit(f"see {place}/{out.name}-{ranks}.log")
    one, two = (
        {line["step"]: line["loss"] for line in read_metrics(place / name) if "loss" in line}
        for name in ("killed", "uncut")
    )
    results = [json.loads((place / name / "result.json").read_text()) for name in ("killed", "uncut")]
    same = sum(one[step] == two[step] for step in two if step <= at)
    away = max(abs(one[step] / two[step] - 1) for step in two)
    print(
        f"killed on two ranks, resumed on three from step {at}: {same} of the {at} losses before are equal in all bits,"
    )
    print(f"all {len(two)} differ by {away:.1e} of the loss at most. Both ended with:")
    for name, value in results[0].items():
        if "/" in name or name == "validation_loss":
            print(f"  {name}: {value:.6g} and {results[1][name]:.6g}")


def main() -> None:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}\n")
    if not (place / f"tokens-{SIZES[-1]}" / "prepared.json").exists():
        prepared(place)
    killed_and_resumed(place)


if __name__ == "__main__":
    main()
