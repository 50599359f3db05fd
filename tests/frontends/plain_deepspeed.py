"""A user's DeepSpeed script: the two lines are the import and the optimizer's type in the ds_config."""

import sys

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import balanced_adam  # noqa: F401  (the first line)

config = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "BalancedAdam", "params": {"lr": 1e-3, "betas": 0.95}},  # the second
}
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for _ in range(5):
    tokens = torch.randint(64, (2, 16), device=engine.device)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
used = type(engine.basic_optimizer).__name__, engine.world_size, engine.zero_optimization_stage(), engine.global_steps
sys.stdout.write(f"USED {used}\n")  # in one piece: the ranks share a pipe
torch.distributed.barrier()  # nobody leaves before all have said it
