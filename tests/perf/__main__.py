"""``python -m tests.perf [step] [engine] [harness] [scaling] [formats] [loss]`` prints tables of docs/ as Markdown."""

import sys

from tests.perf import engine, formats, harness, loss, scaling, step

PARTS = {
    "step": step.main,
    "engine": engine.main,
    "harness": harness.main,
    "scaling": scaling.main,
    "formats": formats.main,
    "loss": loss.main,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
