"""Convert a DeepSpeed checkpoint to the universal format, which any number of ranks at ZeRO stage 1, 2 or 3 can load.

It runs in a process of its own (``python -m train.checkpoint.universal FROM TO``), since DeepSpeed's converter forks
workers and may need much memory.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import torch

from balanced_adam.zero import unpacking
from train.checkpoint.load import only_known_classes
from train.common.processes import end_with_parent

# Where stages 1 and 2, and stage 3, look for what is not partitioned: step counts, schedule, our own step.
COMMON = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def convert(source: str, target: str) -> None:
    """Run DeepSpeed's converter, and make its output loadable at every stage."""
    from deepspeed.checkpoint import ds_to_universal

    workers = max(1, min(8, len(os.sched_getaffinity(0))))
    with only_known_classes(), unpacking():
        ds_to_universal.main(
            Namespace(
                input_folder=source,
                output_folder=target,
                num_extract_workers=workers,
                num_merge_workers=workers,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # checkpoints of stages 1 and 2 have none unless the model provides it
            )
        )
        _for_every_stage(Path(target))


@only_known_classes()
def _for_every_stage(folder: Path) -> None:
    """Write what the loaders of stages 1 and 2 and of stage 3 expect, whichever stage made the checkpoint.

    Both store parameters alike; step counts, the parameter groups' settings and the common file differ.
    """
    import deepspeed

    file = folder / "zero" / "optimizer_state.pt"
    saved = torch.load(file, map_location="cpu")
    steps = sorted(file.parent.glob("*/step.pt"))
    of_stage_3 = saved.get("optimizer_state_dict")
    step = of_stage_3["state"][0]["step"] if of_stage_3 else torch.load(steps[0])
    groups = of_stage_3["param_groups"] if of_stage_3 else saved["param_groups"]
    here = next(folder / name for name in COMMON if (folder / name).exists())
    if of_stage_3:
        shapes = {
            name: shape
            for group in torch.load(here, map_location="cpu")["param_shapes"]
            for name, shape in group.items()
        }
        for name, shape in shapes.items():
            for moment in ("fp32", "exp_avg", "exp_avg_sq"):
                flat = file.parent / name / f"{moment}.pt"
                torch.save({"param": torch.load(flat).view(shape)}, flat)
            torch.save(step, file.parent / name / "step.pt")
    kept = {key: saved[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad") if key in saved}
    nested = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(
        {**kept, "ds_version": deepspeed.__version__, "param_groups": groups, "optimizer_state_dict": nested}, file
    )
    for name in COMMON:
        if folder / name != here:
            shutil.copy2(here, folder / name)


if __name__ == "__main__":
    end_with_parent()
    convert(*sys.argv[1:])
