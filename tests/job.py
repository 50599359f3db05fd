"""One rank of a job of tests.ranks.spawn: ``python -m tests.job FOLDER``."""

import os
import pickle
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch

from tests.ranks import backend, device
from train.common.processes import end_with_parent
from train.distributed.launch import exit_process


def main(folder: Path) -> None:
    """Join the others, do the job, and leave what it returned in the folder."""
    end_with_parent()
    # Otherwise init_distributed compiles it, for an operation (inference_all_reduce) that training never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    world = int(os.environ["WORLD_SIZE"])
    if device(world) == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    deepspeed.init_distributed(backend(world), verbose=False)
    job, argument = pickle.loads((folder / "job").read_bytes())
    result = job(argument)
    torch.save(result, folder / f"result{os.environ['RANK']}")
    torch.distributed.barrier()
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
