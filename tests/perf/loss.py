"""Memory and time of the loss, from all logits and by chunks; ``python -m tests.perf loss``.

Forward and backward of a small Llama with a large vocabulary, in bf16. Each in a process of its own, whose peak memory
counts, less what it held before.
"""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from tests.perf.engine import MEGABYTE, status
from tests.perf.measure import machine
from train.analysis.plots import markdown_table

VOCABULARY = 128256
SHAPES = ((2, 256), (8, 256))


def measure(kind: str, dtype: str, sequences: int, length: int) -> None:
    """Print the peak memory in bytes and the seconds of a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.run.loss import use_chunked

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.config.use_cache = False
    if kind == "chunked":
        use_chunked(model)
    tokens = torch.randint(VOCABULARY, (sequences, length))
    model(input_ids=tokens[:1, :8], labels=tokens[:1, :8]).loss.backward()  # the gradients are there from here on
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
    before, began = status("VmRSS"), time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    print((status("VmHWM") - before) * MEGABYTE, time.perf_counter() - began)


def main() -> None:
    print(f"{machine()}\n")
    rows = []
    for dtype, (sequences, length) in product(("bfloat16", "float32"), SHAPES):
        logits = sequences * length * VOCABULARY
        row = {"weights": dtype, "tokens": f"{sequences} x {length}", "logits": f"{logits / 1e6:.0f} M"}
        for kind in ("full", "chunked"):
            line = [sys.executable, "-m", "tests.perf.loss", kind, dtype, str(sequences), str(length)]
            peak, seconds = map(float, subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
            row |= {f"{kind}: peak": f"{peak / 1e9:.2f} GB ({peak / logits:.1f} bytes a logit)"}
            row |= {f"{kind}: seconds": f"{seconds:.1f}"}
        rows.append(row)
    print(markdown_table(rows))


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
