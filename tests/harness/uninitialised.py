"""train.pretrain where memory that nobody has written holds NaN: torch's own debugging aid."""

import torch

from train import pretrain
from train.distributed.launch import exit_process

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    assert torch.empty(3).isnan().all()
    exit_process(pretrain.main())
