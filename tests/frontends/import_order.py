"""Two steps under ZeRO-1, where DeepSpeed is imported before or after ours: ``torchrun ... import_order.py ORDER``.

Every gradient is a small dyadic number, so that the weights are those of a single process bit for bit.
"""

import sys
from importlib import import_module

import torch

ORDERS = {
    "ours_first": ("balanced_adam", "deepspeed"),
    "deepspeed_first": ("deepspeed", "balanced_adam"),
    "optimizer_built_first": ("balanced_adam", "build", "deepspeed"),
}
SETTINGS = {"lr": 0.5, "betas": 0.75}
STEPS = 2


def model() -> torch.nn.Linear:
    """Two weights whose gradients are the inputs."""
    linear = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(linear.weight, 1.0)
    return linear


def main(order: str) -> None:
    network, optimizer = model(), None
    for name in ORDERS[order]:
        if name == "build":
            assert "deepspeed" not in sys.modules
            optimizer = sys.modules["balanced_adam"].BalancedAdam(network.parameters(), **SETTINGS)
        else:
            import_module(name)
    import deepspeed

    from balanced_adam.zero import describe

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which takes a minute to compile
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}
    named = {"optimizer": {"type": "BalancedAdam", "params": SETTINGS}} if optimizer is None else {}
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, model_parameters=network.parameters(), config={**config, **named}
    )
    for _ in range(STEPS):
        engine.backward(engine(torch.tensor([[0.5, -2.0]])).sum())
        engine.step()
    weights = [float(weight) for weight in network.weight.detach().flatten()]
    sys.stdout.write(f"{describe(engine.optimizer)}: {weights}\n")  # in one piece: the ranks share a pipe
    torch.distributed.barrier()  # nobody leaves before all have said it


if __name__ == "__main__":
    main(sys.argv[1])
