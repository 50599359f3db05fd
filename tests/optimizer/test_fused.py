"""The fused step as users meet it: the same numbers in every mode, a run that changes modes, refusals in a sentence."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam, kernels, rule
from tests.kernels.build import needs_compiler
from tests.ranks import spawn

pytestmark = needs_compiler

CPU = torch.device("cpu")


def parameters() -> list[nn.Parameter]:
    """Parameters of every dtype, in every order in memory, with and without elements."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 5), (1,), (), (0,), (7,), (1000,)]
    params = [torch.randn(s, generator=generator).to(d) for s in shapes for d in (torch.float32, torch.bfloat16)]
    params += [torch.randn(9, generator=generator).half(), torch.randn(9, generator=generator).double()]
    params += [torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)]
    params += [torch.randn(6, 4, generator=generator).T, torch.randn(5, 4, generator=generator)[:, ::2]]
    return [nn.Parameter(param) for param in params]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for number, param in enumerate(params):
        # Contiguous whatever the parameter's order, and in one step left out.
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if (step + number) % 5 == 0 else grad


def groups(params: list[nn.Parameter]) -> list[dict]:
    first = {"params": params[::2], "lr": 0.1, "betas": 0.9}
    return [first, {"params": params[1::2], "weight_decay": 0.3, "maximize": True}]


def run(modes: list[bool | None]) -> tuple[list[nn.Parameter], dict]:
    """A step in each mode; a change of mode goes through a state dict."""
    params = parameters()
    optimizer = BalancedAdam(groups(params), fused=modes[0])
    for step, mode in enumerate(modes):
        if step and mode is not modes[step - 1]:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = BalancedAdam(groups(params), fused=mode)
            optimizer.load_state_dict(state)
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer.state_dict()


def assert_same(ours: tuple[list[nn.Parameter], dict], other: tuple[list[nn.Parameter], dict]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours[0], other[0], strict=True))
    assert ours[1]["param_groups"] == other[1]["param_groups"]
    assert ours[1]["state"].keys() == other[1]["state"].keys()
    for mine, theirs in zip(ours[1]["state"].values(), other[1]["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine.pop("log_beta_excess") == theirs.pop("log_beta_excess")
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)


def test_the_size_of_a_step_is_the_same_with_and_without_the_kernels() -> None:
    sizes = []
    for fused in (None, False):
        params = parameters()
        optimizer = BalancedAdam(groups(params), fused=fused)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
            sizes.append(optimizer.update_size())
    for ours, plain in zip(sizes[:3], sizes[3:], strict=True):
        assert ours.numel == plain.numel > 1000
        assert ours.greatest == plain.greatest
        assert ours.sum_of_squares == pytest.approx(plain.sum_of_squares, rel=1e-6)


def test_the_kernels_choose_for_themselves_and_have_the_bits_of_plain_torch() -> None:
    assert kernels.why_not(CPU) is None
    assert_same(run([None] * 12), run([False] * 12))


def test_a_run_changes_modes_in_the_middle_and_no_bit_changes() -> None:
    assert_same(run([None, None, False, False, None, False, None]), run([False] * 7))


def test_a_fused_step_follows_torch_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 257)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.95, 0.95), "weight_decay": 0.1}
    pair = [(ours, BalancedAdam([ours], fused=True, **settings)), (theirs, torch.optim.AdamW([theirs], **settings))]
    for step in range(50):
        for param, optimizer in pair:
            param.grad = torch.randn(257, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("param", "obstacle"),
    [
        (torch.zeros(3, dtype=torch.float64), "its dtype is torch.float64"),
        (torch.zeros(4, 6)[:, ::2], "it has gaps in memory"),
        (torch.zeros(3, device="meta"), "it is on meta"),
    ],
    ids=["float64", "gaps", "meta"],
)
def test_insisting_on_what_cannot_be_is_refused_at_once(param: torch.Tensor, obstacle: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^fused is True, and a parameter of shape .* can't be: {obstacle}\.$"):
        BalancedAdam([nn.Parameter(param)], fused=True)
    BalancedAdam([nn.Parameter(param)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fused": "yes"}, r"^fused is 'yes'; it must be one of True, False, None\.$"),
        ({"fused": 1}, r"^fused is 1; it must be one of True, False, None\.$"),
        ({"capturable": None}, r"^capturable is None; it must be one of True, False\.$"),
        ({"fused_zero": "false"}, r"^fused_zero is 'false'; it must be one of True, False\.$"),
        ({"capturable": True, "fused": False}, r"^capturable is True and fused is False; only the kernels can"),
    ],
)
def test_bad_switches_are_named_in_one_sentence(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedAdam([nn.Parameter(torch.zeros(1))], **settings)


def test_capturing_on_a_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="only CUDA has graphs, and it is on cpu"):
        BalancedAdam([nn.Parameter(torch.zeros(1))], capturable=True)


def test_the_switches_are_in_no_group_and_no_checkpoint() -> None:
    optimizer = BalancedAdam([nn.Parameter(torch.zeros(1))], fused=True, fused_zero=False)
    assert not {"fused", "capturable", "fused_zero"} & {*optimizer.param_groups[0], *optimizer.state_dict()}


def test_a_gradient_handed_over_in_pieces_is_the_same_step_with_a_factor_and_a_copy() -> None:
    weight = torch.linspace(-1, 1, 100)
    grad = torch.randn(100, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, control, out = nn.Parameter(weight.clone()), nn.Parameter(weight.clone()), torch.zeros(100).bfloat16()
    optimizer, plain = BalancedAdam([ours], lr=0.1), BalancedAdam([control], lr=0.1, fused=False)
    for _ in range(3):
        storage = grad.clone()
        pieces = [storage[:33], storage[33:34], storage[34:].clone()]
        assert optimizer.set_fused_grad(ours, pieces, torch.tensor([0.3]), out)
        optimizer.step()
        control.grad = grad.float() * torch.tensor(0.3)
        plain.step()
        assert torch.equal(ours, control) and torch.equal(out, control.detach().bfloat16())
    assert not optimizer.fused_grads


def test_a_gradient_that_does_not_suit_is_not_taken() -> None:
    param = nn.Parameter(torch.zeros(4))
    both = torch.zeros(4, dtype=torch.bfloat16)
    mixed = [both[:2], both.view(torch.float16)[2:]]  # neighbours in memory, of two dtypes
    for optimizer, pieces in (
        (BalancedAdam([param]), mixed),
        (BalancedAdam([param]), []),  # too short
        (BalancedAdam([param]), [torch.zeros(3)]),  # too short
        (BalancedAdam([param]), [torch.zeros(4, dtype=torch.float64)]),
        (BalancedAdam([param]), [torch.zeros(8)[::2]]),
        (BalancedAdam([param], fused=False), [torch.zeros(4)]),
    ):
        assert not optimizer.set_fused_grad(param, pieces)
        assert not optimizer.fused_grads


def warnings_without_kernels(optimizers: int) -> int:
    """Job: how often a rank warns when it makes so many optimizers and there are no kernels."""
    kernels.why_not = lambda device: "no reason at all"  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(optimizers):
            BalancedAdam([nn.Parameter(torch.zeros(1)) for _ in range(3)])
    return sum("plain torch, which is slower: no reason at all" in str(each.message) for each in said)


@pytest.mark.ranks
def test_a_machine_without_kernels_warns_once_on_the_first_rank_alone() -> None:
    assert spawn(warnings_without_kernels, 2, 2) == [1, 0]


def test_autograd_notices_a_fused_step() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight**3).sum()
    loss.backward(retain_graph=True)
    BalancedAdam([weight], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("spoil", ["moments in double", "a lazy minus", "a gradient of another dtype"])
def test_what_a_kernel_could_misread_is_put_right_first(spoil: str) -> None:
    results = []
    for spoilt in (True, False):
        # Plain torch puts it right, but for moments in double, which it goes on with: there the control is not spoilt.
        fused = spoilt or spoil == "moments in double"
        dtype = torch.bfloat16 if spoil == "a gradient of another dtype" else torch.float32
        weight = nn.Parameter(torch.linspace(-1, 1, 33).to(dtype))
        optimizer = BalancedAdam([weight], lr=0.1, fused=fused)
        for step in range(2):
            weight.grad = torch.randn(33, generator=torch.Generator().manual_seed(step)).to(dtype)
            if step and spoil == "moments in double":
                for key in ("exp_avg", "exp_avg_sq") if spoilt else ():
                    optimizer.state[weight][key] = optimizer.state[weight][key].double()
            elif step and spoil == "a lazy minus":
                weight.grad = torch._neg_view(weight.grad)
            elif step and hasattr(weight, "grad_dtype"):
                weight.grad = None
                weight.grad_dtype = torch.float32
                weight.grad = torch.randn(33, generator=torch.Generator().manual_seed(7))
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_torchs_defaults_are_not_the_kernels(default: str) -> None:
    setter = f"set_default_device({default!r})" if default == "meta" else f"set_default_dtype(torch.{default})"
    code = f"""
import sys; sys.modules["deepspeed"] = None
import torch
weight = torch.zeros(1, requires_grad=True)
torch.{setter}
from balanced_adam import BalancedAdam
optimizer = BalancedAdam([weight], fused=True)
weight.grad = torch.ones(1, dtype=torch.float32, device="cpu")
optimizer.step()
print(weight.item() < 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def corrupt(kind: str, optimizer: BalancedAdam, param: torch.nn.Parameter) -> None:
    """Make one tensor of the fused step's contract another than it must be."""
    size, state = param.numel(), optimizer.state[param]
    if kind in ("larger data", "smaller data"):
        param.data = torch.ones(2 * size if kind == "larger data" else size // 2)
        param.grad = torch.ones_like(param)
    elif kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = torch.zeros(size // 2)
    else:
        grad, param.grad = param.grad, None
        assert grad is not None
        copies = {"copy too short": torch.zeros(size // 2), "copy too long": torch.zeros(2 * size)}
        factors = {"factor double": torch.ones(1, dtype=torch.float64), "factor empty": torch.ones(0)}
        assert optimizer.set_fused_grad(param, [grad], factors.get(kind), copies.get(kind))


KINDS = (
    *("larger data", "smaller data", "exp_avg", "exp_avg_sq"),
    *("copy too short", "copy too long", "factor double", "factor empty"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_disagree_are_refused_before_memory_is_touched(kind: str) -> None:
    """Each overran the heap, or was read as something else."""
    param, other = torch.nn.Parameter(torch.ones(4096)), torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = BalancedAdam([other, param], fused=True)
    for each in (param, other):
        each.grad = torch.ones_like(each)
    optimizer.step()
    corrupt(kind, optimizer, param)
    before, before_other = param.detach().clone(), other.detach().clone()
    with pytest.raises(ValueError, match=r"^the (gradient|state|second moment|copy|factor) "):
        optimizer.step()
    assert torch.equal(param, before) and torch.equal(other, before_other)


def test_directions_of_states_of_two_dtypes_are_refused() -> None:
    """They are read in one pass, of one dtype."""
    param, moment = torch.ones(5), torch.zeros(5)
    settings = {"lr": 0.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    first = kernels.Update(param, param, moment, moment, kernels.scalars(1, **settings))
    other = first._replace(first=torch.zeros(5, dtype=torch.uint8), second=None)
    for updates in ([first, other], [other, first]):
        with pytest.raises(ValueError, match="must be of one dtype"):
            kernels.directions(updates)


def test_former_names_still_work_and_warn() -> None:
    weight, control = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, plain = BalancedAdam([weight], lr=0.5), BalancedAdam([control], lr=0.5)
    control.grad = torch.full((3,), 0.25)
    plain.step()
    with pytest.warns(DeprecationWarning, match="hand_over is now set_fused_grad"):
        assert optimizer.hand_over(weight, pieces=[torch.full((3,), 0.25)], factor=None, copy=None, keep=False)
    optimizer.step()
    assert torch.equal(weight, control)
    optimizer.set_fused_grad(weight, [torch.ones(3)])
    with pytest.warns(DeprecationWarning, match="take_back is now clear_fused_grad"):
        optimizer.take_back(weight)
    assert not optimizer.fused_grads
    code = "from balanced_adam import horizon as h; print(h.choose('0.9', steps=1, tokens_per_step=1), h.horizon(0.5))"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.stdout == "0.9 2.0\n" and "balanced_adam.horizon is now balanced_adam.beta_schedule" in done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_of_another_dtype_has_the_bits_of_the_rule(dtype: torch.dtype) -> None:
    weight, control = nn.Parameter(torch.linspace(-1, 1, 33)), torch.linspace(-1, 1, 33)
    if not hasattr(weight, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's dtype only")
    moments = [torch.zeros(33), torch.zeros(33)]
    optimizer = BalancedAdam([weight], lr=0.1, betas=0.9, weight_decay=0.1, fused=True)
    weight.grad_dtype = dtype
    for step in (1, 2, 3):
        weight.grad = torch.linspace(-2, 1, 33).to(dtype)
        control, *moments = rule.update(
            control, weight.grad, *moments, step=step, lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1
        )
        optimizer.step()
        assert torch.equal(weight, control)


@pytest.mark.parametrize("fused", [None, False])
def test_where_a_tensor_does_not_fit_no_parameter_has_moved(fused: bool | None) -> None:
    double, single = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(4))
    optimizer = BalancedAdam([double, single], lr=0.1, fused=fused)
    for param in (double, single):
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.detach().clone() for param in (double, single)]
    optimizer.state[single]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match="given other data"):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip((double, single), before, strict=True))


def test_a_step_that_is_refused_leaves_no_gradient_for_the_next_one() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = BalancedAdam([weight], lr=0.5, weight_decay=0.0)
    assert optimizer.set_fused_grad(weight, [torch.ones(2)])
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    with pytest.raises(ValueError, match="betas"):
        optimizer.step()
    assert not optimizer.fused_grads and optimizer.update_size().numel == 0
    optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    weight.grad = -torch.ones(2)
    optimizer.step()
    assert torch.equal(weight, torch.full((2,), 0.5))
