"""A user's script for Accelerate: import, and "BalancedAdam" in the ds_config of its DeepSpeed plugin."""

import sys
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DummyOptim
from transformers import LlamaConfig, LlamaForCausalLM

import balanced_adam  # noqa: F401

plugin = DeepSpeedPlugin(hf_ds_config=sys.argv[1])
backend = "nccl" if torch.cuda.is_available() else "gloo"
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend=backend)])
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
)
optimizer = DummyOptim(model.parameters(), lr=1e-3)
rows: Any = list(torch.randint(64, (20, 16)))
loader: Any = torch.utils.data.DataLoader(rows, batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for tokens in loader:
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    optimizer.zero_grad()
used = type(model.basic_optimizer).__name__, model.world_size, model.zero_optimization_stage(), model.global_steps
sys.stdout.write(f"USED {used}\n")  # in one piece: the ranks share a pipe
torch.distributed.barrier()  # nobody leaves before all have said it
