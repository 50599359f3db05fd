"""``python -m tests.perf [step] [engine]`` prints the benchmarks' tables as Markdown; README.md shows them."""

import sys

from tests.perf import engine, step

PARTS = {"step": step.main, "engine": engine.main}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
