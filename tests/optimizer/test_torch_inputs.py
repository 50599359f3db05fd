"""The inputs, the wrong inputs and the conventions with which torch tests its own AdamW, given to BalancedAdam.

torch.testing._internal.common_optimizers ships with torch; the tests that use it do not.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from balanced_adam import BalancedAdam
from tests.optimizer.steps import assert_same, parameters, set_gradients, train

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

[ADAMW] = [info for info in optim_db if info.name == "AdamW"]
# The list for CUDA is that for CPUs with foreach and capturable added; no input names a device.
INPUTS: list[OptimizerInput] = _get_optim_inputs_including_global_cliquey_kwargs("cuda", torch.float32, ADAMW)
REFUSED = {
    # With the maximum of v the step is no longer bounded by lr, and m² <= v no longer holds for what is stored.
    "amsgrad": "amsgrad is True, and BalancedAdam takes False alone",
    # Both averages are updated in place, outside of autograd.
    "differentiable": "differentiable is True, and BalancedAdam takes False alone",
    # torch captures its plain steps, too; here only the kernels read lr and the step count on the GPU. On CPUs, where
    # this runs, torch accepts the setting and refuses the step.
    "capturable": "only the kernels can be captured in a CUDA graph|only CUDA has graphs",
}
"""What torch's AdamW takes and BalancedAdam does not."""
WORDED = {
    # The exception is the same, the sentence is ours: it gives the value and what would be right.
    "Tensor lr must be 1-element": r"lr is a torch.float32 tensor of shape \(2,\)",
    "beta1 should be between 0 and 1": r"betas is \(1.0, 0.0\); each beta must lie in \[0, 1\)",
    "weight_decay should > 0": "weight_decay is -1.0; it must be a finite number, at least 0",
}
ACCEPTED = {
    # torch's multi-tensor code can't read such tensors; BalancedAdam has no such code, and reads them as numbers.
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
    # Each beta is read as a number by itself.
    "betas must be either both floats or both Tensors",
}
"""What torch's AdamW refuses and BalancedAdam takes."""


def refusal(each: OptimizerInput) -> str | None:
    return next((sentence for name, sentence in REFUSED.items() if each.kwargs.get(name)), None)


def settings(each: OptimizerInput) -> dict[str, Any]:
    """Its settings. The default betas are not the same here and there."""
    return {"betas": (0.95, 0.95), **copy.deepcopy(each.kwargs)}


def ours(params: Any, each: OptimizerInput) -> BalancedAdam:
    return BalancedAdam(params, **settings(each), allow_unbalanced=True)


TAKEN = [each for each in INPUTS if refusal(each) is None]


def name(each: OptimizerInput | ErrorOptimizerInput) -> str:
    if isinstance(each, ErrorOptimizerInput):
        return str(each.optimizer_error_input.desc)
    return f"{each.desc}-{'-'.join(flag for flag, on in each.kwargs.items() if on is True)}"


@pytest.mark.parametrize("each", [each for each in INPUTS if refusal(each)], ids=name)
def test_an_input_that_is_not_taken_is_refused_with_the_setting_named(each: OptimizerInput) -> None:
    with pytest.raises((ValueError, RuntimeError), match=refusal(each)):
        ours(parameters(), each)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_an_input_that_is_taken_gives_the_weights_of_torchs_adamw(each: OptimizerInput, dtype: torch.dtype) -> None:
    if each.kwargs.get("fused") and dtype == torch.float64:
        with pytest.raises(RuntimeError, match=r"fused is True, and a parameter of shape .* can't be: .*float64"):
            ours(parameters(dtype), each)  # the kernels have no float64, and plain torch computes it as exactly
        return
    params = parameters(dtype)
    optimizer = ours(params, each)
    # torch rounds the moments of 16-bit weights to 16 bits; BalancedAdam never does. So the oracle is in float32.
    exact = [nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32))) for p in params]
    oracle = torch.optim.AdamW(exact, **settings(each))
    for step in range(5):
        gradients = set_gradients(params, step)
        optimizer.step()
        for p, g in zip(exact, gradients, strict=True):
            p.grad = g.to(p.dtype)
        oracle.step()
        for p, q in zip(params, exact, strict=True):
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(p, q.to(dtype), rtol=2 * rounding, atol=2 * rounding)
            q.data.copy_(p.data)


@pytest.mark.parametrize("each", ADAMW.optim_error_inputs_func("cpu", torch.float32), ids=name)
def test_a_wrong_input_raises_as_with_torchs_adamw(each: ErrorOptimizerInput) -> None:
    assert each.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = each.optimizer_error_input
    params = parameters() if given.params is None else given.params
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if given.desc in ACCEPTED:
            optimizer = ours(params, given)
            train(optimizer, params, range(2))
            control = parameters()
            numbers = {key: value for key, value in settings(given).items() if key in ("lr", "betas")}
            numbers = {"lr": float(numbers["lr"]), "betas": tuple(map(float, numbers["betas"]))}
            train(BalancedAdam(control, **numbers, allow_unbalanced=True), control, range(2))
            assert_same(params, control)
            return
        with pytest.raises(each.error_type, match=WORDED.get(given.desc, each.error_regex)):
            ours(params, given)


def least_squares(rows: bool = True) -> tuple[list[nn.Parameter], Any]:
    """A weight, a bias and their loss; with ``rows`` False, the weight has gaps in memory."""
    generator = torch.Generator().manual_seed(3)
    w, b, x = torch.randn(10, 5, generator=generator), torch.randn(10, generator=generator), torch.randn(5)
    weight = nn.Parameter(w.clone() if rows else torch.stack([w, w], -1)[..., 0])
    bias = nn.Parameter(b.clone() if rows else torch.stack([b, b], -1)[..., 0])
    assert weight.is_contiguous() is rows
    return [weight, bias], lambda: (weight.mv(torch.ones_like(x)) + bias).pow(2).sum()


def descend(optimizer: torch.optim.Optimizer, loss: Any, steps: int, schedulers: Any = ()) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(losses[-1]) if plateau else scheduler.step()
    return [*losses, float(loss().detach())]


CHAINS = [
    chain
    for info in optim_db
    if info.name in ("AdamW", "SGD")  # torch tries most of its schedulers on SGD
    for chain in info.scheduler_inputs
]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_steps_go_in_the_right_direction_under_torchs_schedulers(each: OptimizerInput, chain: Any) -> None:
    params, loss = least_squares()
    optimizer = ours(params, each)
    losses = descend(optimizer, loss, 20, [make(optimizer) for make in chain])
    assert (losses[-1] > losses[0]) is bool(each.kwargs.get("maximize"))


@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_gaps_in_memory_change_no_bit(each: OptimizerInput) -> None:
    (dense, loss), (gaps, other_loss) = least_squares(), least_squares(rows=False)
    if each.kwargs.get("fused"):
        with pytest.raises(RuntimeError, match=r"fused is True, and a parameter of shape .* can't be: .*gaps"):
            ours(gaps, each)  # the kernels go through memory without looking
        return
    descend(ours(dense, each), loss, 5)
    descend(ours(gaps, each), other_loss, 5)
    assert_same(dense, gaps)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_a_group_whose_learning_rate_is_0_stays(each: OptimizerInput, lr: Any) -> None:
    (moving, loss), (still, other_loss) = least_squares(), least_squares()
    before = [p.detach().clone() for p in still]
    kept = {key: value for key, value in each.kwargs.items() if key != "lr"}
    groups = [{"params": moving, "lr": lr}, {"params": still, "lr": lr * 0}]
    optimizer = BalancedAdam(groups, **kept, betas=0.9)
    descend(optimizer, lambda: loss() + other_loss(), 3)
    assert all(map(torch.equal, still, before))
    assert not any(map(torch.equal, moving, before))


@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_a_saved_state_goes_on_with_the_same_bits_and_an_older_one_is_loaded(each: OptimizerInput) -> None:
    params = parameters()
    optimizer = ours(params, each)
    train(optimizer, params, range(3))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    older = copy.deepcopy(saved)
    for group in older["param_groups"]:
        for flag in ADAMW.not_og_supported_flags:
            group.pop(flag, None)
    copies = []
    for state in (saved, older):
        untouched = copy.deepcopy(state)
        other = [nn.Parameter(p.detach().clone()) for p in params]
        loaded = ours(other, each)
        loaded.load_state_dict(state)
        assert str(state) == str(untouched)
        train(loaded, other, range(3, 6))
        copies.append(other)
    train(optimizer, params, range(3, 6))
    for other in copies:
        assert_same(params, other)


@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_hooks_are_called_around_a_step_and_may_change_its_arguments(each: OptimizerInput) -> None:
    params = parameters()
    optimizer = ours(params, each)
    called: list[Any] = []

    def closure() -> float:
        called.append("closure")
        return 2.0

    def give_a_closure(_: Any, args: Any, kwargs: Any) -> Any:
        called.append("pre")
        return (args[0], closure), kwargs  # the optimizer comes first

    before = optimizer.register_step_pre_hook(give_a_closure)
    after = optimizer.register_step_post_hook(lambda *_: called.append("post"))
    set_gradients(params, 0)
    assert optimizer.step() == 2.0
    assert called == ["pre", "closure", "post"]
    before.remove()
    after.remove()
    assert optimizer.step() is None and len(called) == 3


@pytest.mark.parametrize("each", TAKEN, ids=name)
def test_parameters_without_elements_and_generators_of_parameters_are_taken(each: OptimizerInput) -> None:
    params = [*parameters(), nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0))]
    control = parameters()
    train(ours((p for p in params), each), params, range(2))
    train(ours(dict(enumerate(control)).values(), each), control, range(2))
    assert_same(params[:4], control)


def test_a_compiled_step_has_the_same_bits() -> None:
    params, control = parameters(), parameters()
    optimizer = BalancedAdam(params)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(3):
        set_gradients(params, number)
        step()
    train(BalancedAdam(control), control, range(3))
    assert_same(params, control)


def test_an_empty_list_of_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        BalancedAdam([])
