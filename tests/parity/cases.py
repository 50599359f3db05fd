"""The matrix of the exact tests, and how one of its cells is run through a DeepSpeed engine on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_adam.packed import FORMATS
from balanced_adam.rule import VARIANTS
from balanced_adam.state import MOMENTS, moments
from balanced_adam.zero import partitions
from tests.parity.compare import differences
from tests.parity.control import TENSORS, Clip, MissingGrad, State, train
from tests.parity.model import EPS, GROUPS, MICRO, TRAINED, AwkwardModel, moving_beta, share
from tests.parity.mutants import MUTANTS, OF_RELATIVES, wrong
from tests.parity.relatives import RELATIVES
from tests.ranks import device, spawn
from tests.session import shared

STEPS = 8
SUB_GROUP_SIZE = 40
SUB_GROUPS = (("matrix",), ("one", "few"), ("long",), ("sometimes", "last"))
"""How stage 3 cuts the parameter groups: a sub-group ends where it has SUB_GROUP_SIZE elements, over all ranks."""


PATHS: dict[str, dict[str, bool]] = {
    "one_pass": {"fused": True},
    "fused": {"fused": True, "fused_zero": False},
    "torch": {"fused": False},
}
"""How the step is taken: settings of the optimizer. Stage 0 has no passes of ZeRO's to save."""


class Case(NamedTuple):
    """One cell of the matrix, but for the world size."""

    stage: int
    dtype: str
    offload: bool = False
    grad_accum: str | None = None
    clip: float = 0.0
    path: str = "one_pass"
    mutant: str | None = None
    state: str = "fp32"
    moving: bool = False
    """Whether betas change from step to step."""
    variant: str = "adam"
    """Of AdamW, or one of tests/parity/relatives.py."""
    round_robin: bool = False
    hpz: int = 1
    """How many ranks hold the weights once more: ZeRO++'s secondary partition."""

    def __str__(self) -> str:
        accum = f"-accum_{self.grad_accum}" if self.grad_accum else ""
        options = "-offload" * self.offload + "-clip" * bool(self.clip)
        options += f"-{self.state}" * (self.state != "fp32") + "-moving" * self.moving
        options += f"-{self.variant}" * (self.variant != "adam") + "-round_robin" * self.round_robin
        options += f"-hpz{self.hpz}" * (self.hpz > 1)
        return f"stage{self.stage}-{self.dtype}{accum}{options}-{self.path}"

    def config(self, world: int) -> dict[str, Any]:
        """The ds_config: the optimizer by name and no permission asked for anything."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": 50,  # several buckets, and parameters larger than one
            "sub_group_size": SUB_GROUP_SIZE // world,  # DeepSpeed counts the elements of one rank's partitions
            "stage3_param_persistence_threshold": 4,  # some parameters are kept whole, the others gathered
        }
        if self.round_robin:
            zero["round_robin_gradients"] = True
        if self.hpz > 1:
            zero["zero_hpz_partition_size"] = self.hpz
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        kind, own = RELATIVES.get(self.variant, ("BalancedAdam", {"variant": self.variant, **PATHS[self.path]}))
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO,
            # Each group has its own lr and betas.
            "optimizer": {
                "type": kind,
                "params": {"lr": 0.5, "eps": EPS, "allow_unbalanced": True, "state": self.state, **own},
            },
            "gradient_clipping": self.clip,  # DeepSpeed's default is 1 (runtime/constants.py)
            "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == "bf16"},
        }
        if self.grad_accum:
            config["data_types"] = {"grad_accum_dtype": self.grad_accum}
        return config

    def absent(self) -> MissingGrad:
        """What the optimizer is given for a parameter that got no gradient since the last step.

        Never nothing, so that its moments and its weight decay go on at every stage. Zeros in buffers made anew:

        * stage 0: runtime/engine.py:3863 (``_get_gradients_for_reduction``), in every dtype;
        * stages 1 and 2: runtime/zero/stage_1_and_2.py:2706 (``get_all_grad_tensors``) and the compact buffer of :1016;
        * BF16_Optimizer: runtime/bf16_optimizer.py:605 (``clear_hp_grads``).

        But where a gradient is written to a buffer that lasts, and nothing clears it, the last one is used again:

        * stage 3: runtime/zero/stage3.py:1424 reads ``grad_partitions_flat_buffer``, which only parameters with a
          gradient overwrite (:2024), and with offload the fp32 ``grad`` (:1458);
        * offload at stage 2: the fp32 ``grad`` of runtime/zero/stage_1_and_2.py:1893 (:2154 with grad_accum_dtype).
        """
        if self.offload:
            return MissingGrad.STALE_AND_CLIPPED
        return MissingGrad.STALE if self.stage == 3 else MissingGrad.ZERO

    def control_clip(self, world: int) -> Clip | None:
        """How the norm of the gradient is rounded: per group, in float32 but for stage 3 without offload.

        * stage 0, and BF16_Optimizer at stage 1: runtime/engine.py:3502, runtime/utils.py:909: one group; in fp32 at
          stage 0 a mean over the ranks (runtime/utils.py:400);
        * stages 1 and 2: runtime/zero/stage_1_and_2.py:2943 (``scaled_global_norm``): the parameter groups;
        * stage 3: runtime/zero/stage3.py:2573 (``_get_norm_groups``): its sub-groups; float64 without offload.

        Roots are torch's, but for stage 0 in 16 bits and offload at stage 2 (runtime/zero/stage_1_and_2.py:1949).
        """
        if not self.clip:
            return None
        exact = (self.stage == 0 and self.dtype != "fp32") or (self.stage == 2 and self.offload)
        if self.stage == 0 or (self.stage == 1 and self.grad_accum):
            ranks = world if self.stage == 0 and self.dtype == "fp32" else 1
            return Clip(self.clip, torch.float32, (tuple(TRAINED),), exact, ranks)
        if self.stage < 3:
            return Clip(self.clip, torch.float32, tuple(group.names for group in GROUPS), exact)
        return Clip(self.clip, torch.float32 if self.offload else torch.float64, SUB_GROUPS)


def matrix(world: int) -> Iterator[Case]:
    """Every case of one world size; on 4 ranks the shipped paths alone, on 3 and 4 one dtype for each packed state."""
    for stage in range(4):
        paths = ["one_pass"] if stage else ["fused"]
        if world < 4:
            paths = list(PATHS) if stage else ["fused", "torch"]
        for path in paths:
            for offload in (False, True) if stage >= 2 else (False,):
                for clip in (0.0, 1.0):
                    yield Case(stage, "fp32", offload, None, clip, path)
                    # grad_accum_dtype fp32 is another code path: BF16_Optimizer at stage 1, other buffers at 2 and 3.
                    # Stage 0 refuses it (runtime/engine.py:2323).
                    for grad_accum in (None, "fp32") if stage else (None,):
                        yield Case(stage, "bf16", offload, grad_accum, clip, path)
    for state in FORMATS:
        for stage in range(4):
            path = "one_pass" if stage else "fused"
            for offload in (False, True) if stage >= 2 else (False,):
                if world != 4:
                    yield Case(stage, "fp32", offload, path=path, state=state)
                if world != 3:
                    yield Case(stage, "bf16", offload, clip=1.0, path=path, state=state)
                if world == 2 and stage:
                    yield Case(stage, "bf16", offload, path="fused", state=state)
        yield Case(1, "bf16", grad_accum="fp32", state=state)
        if world < 3:
            yield Case(2, "bf16", path="torch", state=state)
    if world == 2:
        for stage in range(4):
            path = "one_pass" if stage else "fused"
            for state in ("fp32", "packed16"):
                yield Case(stage, "bf16", path=path, state=state, moving=True)
            yield Case(stage, "fp32", path="torch", moving=True)
    if 1 < world < 4:
        for variant in VARIANTS[1:]:
            for stage in range(4):
                path = "one_pass" if stage else "fused"
                yield Case(stage, "bf16", clip=1.0, path=path, variant=variant)
                yield Case(stage, "bf16", path=path, variant=variant, state="packed16", moving=world == 2)
            yield Case(2, "fp32", offload=True, path="torch", variant=variant)
    yield from _relatives(world)
    if world == 4:
        # Last: stage 3 goes on with the groups of ranks that a former engine has made (runtime/zero/stage3.py:267).
        for offload in (False, True):
            yield Case(3, "fp32", offload, clip=1.0, hpz=2)
            yield Case(3, "bf16", offload, hpz=2)
            yield Case(3, "bf16", offload, "fp32", hpz=2, state="packed16")


def _relatives(world: int) -> Iterator[Case]:
    """The relatives, which have one path. What is alike in each element is tried once a stage."""
    for stage in range(4):
        for variant in ("adamp", "l1", "l3"):
            for offload in (False, True) if stage >= 2 else (False,):
                yield Case(stage, "fp32", offload, clip=1.0, path="torch", variant=variant)
                for grad_accum in (None, "fp32") if stage else (None,):
                    yield Case(stage, "bf16", offload, grad_accum, path="torch", variant=variant)
            if world != 4:
                yield Case(stage, "bf16", clip=1.0, path="torch", variant=variant, state="packed16")
        if world == 3:
            for variant in ("l1.5", "l6", "amsgrad", "adamnc"):
                yield Case(stage, "bf16", clip=1.0, path="torch", variant=variant)


def start(case: Case, **more: Any) -> Any:
    """A DeepSpeed engine with the awkward model; the optimizer comes by name."""
    import deepspeed

    import balanced_adam  # noqa: F401  registers the name

    model = AwkwardModel()
    config = case.config(torch.distributed.get_world_size()) | more
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.groups(case.state))
    return engine


def advance(engine: Any, first: int, last: int, moving: bool = False) -> None:
    """Steps ``first`` to ``last - 1``, on this rank's share of the data."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, last):
        if moving:
            for number, group in enumerate(engine.optimizer.param_groups):
                group["betas"] = (moving_beta(number, step),) * 2
        for micro in range(MICRO):
            inputs = {name: x.to(engine.device, dtype) for name, x in share(step, micro, rank, world).items()}
            engine.backward(engine(inputs))
            engine.step()


def read(engine: Any) -> State:
    """Weights and moments in fp32, and the model's own weights, whole, on this rank."""
    import deepspeed

    from tests.parity.versions import since

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # Stages 1 and 2 link the moments to the parameters after the first group's first step, when the other groups
        # have no moments yet, and never again (runtime/zero/stage_1_and_2.py:852 and :2987).
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    named: list[tuple[str, Any]] = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    current = since("0.19.7")
    if not current:
        _mend_fragments(engine.optimizer)
    state: State = {"model": {}}
    for name, p in named:
        if current or not hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                state["model"][name] = p.detach().cpu().clone()
        else:
            state["model"][name] = _gathered(p)
    for key in TENSORS:
        state[key] = {name: _full(engine, p, key).detach().cpu().clone() for name, p in named}
    return state


def _mend_fragments(zero: Any) -> None:
    """Before DeepSpeed 0.19.7, parameters that have loaded a universal checkpoint take a moment for their fp32 weights
    where they are asked for them (checkpoint/universal_checkpoint.py); the weights themselves are right."""
    groups = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", [])
    for params, master in zip(groups, partitions.masters(zero), strict=True) if groups else ():
        for mapping in (p._hp_mapping for p in params if p._hp_mapping is not None):
            address = mapping.hp_fragment_address
            mapping.hp_fragment = master.narrow(0, address.start, address.numel)


def _gathered(param: Any) -> Tensor:
    """A parameter of stage 3, whole: before 0.19.7 DeepSpeed does not always wait for it on a CPU."""
    parts = [torch.empty_like(param.ds_tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, param.ds_tensor)
    return torch.cat(parts)[: param.ds_numel].view(param.ds_shape).cpu().clone()


def _full(engine: Any, param: Any, key: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage():
        value = safe_get_full_fp32_param(param) if key == "weights" else safe_get_full_optimizer_state(param, key)
        return torch.as_tensor(value).reshape(getattr(param, "ds_shape", param.shape))
    # Stage 0: no partition; in 16 bits FP16_UnfusedOptimizer holds the fp32 weights, and the state belongs to them.
    master = param
    if hasattr(engine.optimizer, "fp16_groups"):
        pairs = zip(chain(*engine.optimizer.fp16_groups), chain(*engine.optimizer.fp32_groups), strict=True)
        master = next(fp32 for fp16, fp32 in pairs if fp16 is param)
    if key == "weights":
        return torch.as_tensor(master)
    return dict(zip(MOMENTS, moments(engine.optimizer.state[master]), strict=True))[key]


def run(cases: list[Case]) -> dict[Case, State]:
    """Job of one rank: all cases in one process group."""
    results = {}
    for case in cases:
        with wrong(case.mutant):
            engine = start(case)
            advance(engine, 0, STEPS, case.moving)
            results[case] = read(engine)
            engine.destroy()
    return results


@shared
def outcomes(world: int) -> dict[Case, dict[str, float]]:
    """All cases of one world size, in one spawn: case -> greatest differences from the control in ulp."""
    return _compared(world, list(matrix(world)))


@shared
def of_the_wrong() -> dict[Case, dict[str, float]]:
    """The same of every deliberately wrong optimizer, on 2 ranks."""
    return _compared(2, [*mutant_cases(), PHANTOM])


def _compared(world: int, cases: list[Case]) -> dict[Case, dict[str, float]]:
    from tests.parity.versions import possible

    cases = possible(cases)
    ranks = spawn(run, world, cases)
    return {
        case: differences(
            [rank[case] for rank in ranks],
            train(STEPS, case.absent(), case.control_clip(world), device(world), case.state, case.moving, case.variant),
        )
        for case in cases
    }


def mutant_cases() -> Iterator[Case]:
    """Every deliberately wrong optimizer at every stage."""
    for mutant in MUTANTS:
        for stage in range(4):
            yield Case(stage, "bf16", mutant=mutant)
    for mutant in OF_RELATIVES:
        for stage in (1, 2, 3):
            yield Case(stage, "bf16", path="torch", mutant=mutant, variant=mutant.partition("-")[0])


PHANTOM = Case(0, "bf16", path="fused", mutant="phantom_step")
