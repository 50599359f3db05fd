"""train.pretrain where memory that nobody has written holds NaN: torch's own debugging aid."""

import torch

from train.pretrain import main
from train.ranks import leave

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    assert torch.empty(3).isnan().all()
    leave(main())
