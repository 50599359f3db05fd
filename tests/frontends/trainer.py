"""A user's script for Transformers' Trainer: import, and "BalancedAdam" with "auto" betas in the ds_config."""

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import balanced_adam  # noqa: F401

arguments = TrainingArguments(
    output_dir=sys.argv[1],
    per_device_train_batch_size=2,
    max_steps=5,
    adam_beta1=0.95,  # the Trainer fills "betas": "auto" in from these two; its defaults are unequal
    adam_beta2=0.95,
    deepspeed=sys.argv[2],
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
    ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
)
tokens = torch.randint(64, (64, 16))
trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
trainer.train()
engine: Any = trainer.model_wrapped
used = type(engine.basic_optimizer).__name__, engine.world_size, engine.zero_optimization_stage(), engine.global_steps
sys.stdout.write(f"USED {used}\n")  # in one piece: the ranks share a pipe
torch.distributed.barrier()  # nobody leaves before all have said it
