"""The check by behaviour: DeepSpeed takes a step with its own passes, and a sample of it is taken in one pass, too.

Whether ZeRO's step may be taken in one pass is not read off a version number, but seen: of each group up to
``SAMPLE`` elements are watched on their way through DeepSpeed's step, from the gradient to the 16-bit weights. Then the
kernel takes the same step of the same elements. One bit of difference, or anything done twice, not at all or in
another order, and the step stays DeepSpeed's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balanced_adam.state import moment_tensors
from balanced_adam.zero import partitions
from balanced_adam.zero.norms import Gradients, Squares
from balanced_adam.zero.partitions import Slot
from balanced_adam.zero.stand_ins import WeightsInStep

if TYPE_CHECKING:
    from balanced_adam.optimizer import BalancedAdam

SAMPLE = 4096
"""Elements of each group that are watched, at most."""
DIFFERS, UNDECIDED, SAME = range(3)
"""What comes of a check: of several ranks the least counts."""


@dataclass
class _Sample:
    """Some elements of a group on their way through the step."""

    master: Tensor
    slot: Slot | None
    index: Tensor
    """int64 [n]: which elements of the flat partition."""
    gradient: Tensor
    """[n], as gathered, in its own dtype."""
    pieces: Sequence[Tensor] | None
    """What the one pass would read at the optimizer's step; None where DeepSpeed works on that itself."""
    probe: Tensor | None = None
    """float32: what DeepSpeed makes of :func:`probe` while it unscales and clips the gradient."""
    weights: Tensor | None = None
    """float32 [n], before the optimizer's step."""
    state: dict[str, Any] = field(default_factory=dict)
    """The optimizer's, before its step."""
    stepped: Tensor | None = None
    """float32 [n], after it."""
    written: Tensor | None = None
    """[n]: 16-bit weights as the kernel writes them."""
    copies: int = 0
    """How often the master was copied into the 16-bit weights."""


class Check:
    """One step of DeepSpeed's own passes, watched.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        whole: whether norm and overflow are compared as well. Both take a collective twice, so all ranks must do it.
    """

    def __init__(self, zero: Any, *, whole: bool) -> None:
        self.zero, self.whole = zero, whole
        self.masters = partitions.masters(zero)
        self.differences: list[str] = []
        """What was not as the one pass needs it, in the order it was seen."""
        self.samples: dict[int, _Sample] = {}
        self.squares = Squares()
        optimizer = zero.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Nothing of it is left in DeepSpeed or the optimizer."""
        for hook in self._hooks:
            hook.remove()
        for sample in self.samples.values():
            if sample.slot is not None:
                WeightsInStep.remove(sample.slot)

    # ---- What DeepSpeed does, in its order.

    def scan(self, lists: Sequence[Gradients] | None, call: Callable[[Tensor | None], Tensor | bool]) -> Tensor | bool:
        """Overflow: DeepSpeed's own look at the gradients (``call`` of None), and the one at the sum of squares."""
        found = call(None)
        if self.whole:  # on every rank, also on one that can't sum its squares: there may be a collective in it
            total = None
            with self._probing("a sum of squares"):
                total = None if lists is None else self.squares.total(lists)
            with self._probing("overflow of the sum of squares"):
                if bool(found) != bool(call(total)):
                    self.differences.append("overflow is not that of the sum of squares")
        return found

    def norm(self, gradients: Gradients, call: Callable[[Gradients], Tensor], look_for_zeros: bool = False) -> Tensor:
        """The norm: DeepSpeed's own, of the gradients, and the one of their norms."""
        found = call(gradients)
        if self.whole:  # on every rank, also on one that has no norms of its own: there is a collective in it
            norms = None
            with self._probing("the tensors' norms"):
                norms = self.squares.norms(gradients, look_for_zeros)
            with self._probing("the norm of norms"):
                ours, theirs = float(call(gradients if norms is None else norms)), float(found)
                tolerance = 2**-51 * theirs if found.dtype == torch.float64 else 0.0
                if not abs(ours - theirs) <= tolerance and theirs == theirs:
                    self.differences.append(f"the norm is {theirs}, and {ours} from the norms of the tensors")
        return found

    def gradient(self, group: int, flat: Tensor, pieces: Sequence[Tensor] | None = None) -> Tensor:
        """The gradient of a group, gathered in one flat tensor, which it returns.

        ``pieces`` are what the one pass would be handed, and what must not change before the optimizer's step.
        """
        with self._probing("a look at the gradient"):
            if pieces is not None and len({piece.dtype for piece in pieces}) > 1:
                pieces = [flat]  # as the one pass does
            if pieces and flat.untyped_storage().data_ptr() == pieces[0].untyped_storage().data_ptr():
                pieces = None  # DeepSpeed unscales and clips in that memory
            self._sample(group, flat, pieces)
        return flat

    def _sample(self, group: int, flat: Tensor, pieces: Sequence[Tensor] | None) -> None:
        master = self.masters[group]
        if group in self.samples:
            self.differences.append(f"the gradient of group {group} is gathered twice")
        elif flat.numel() != master.numel():
            self.differences.append(f"the gradient of group {group} has {flat.numel()} elements, not {master.numel()}")
        else:
            sizes = [piece.numel() for piece in pieces or ()]
            index = _choose(master.numel(), sizes, seed=group).to(flat.device)
            slot = partitions.weights(self.zero, group, master)
            self.samples[group] = _Sample(master, slot, index, flat.detach().view(-1)[index].clone(), pieces)
            if slot is not None:
                WeightsInStep.install(slot, lambda source: self._copied(group, source))

    def unscale(self, group: int, call: Callable[[Tensor | None], None]) -> None:
        """Unscale and clip: ``call`` of None does it to the gradient, and of a tensor to that."""
        if partitions.is_offloaded(self.zero) and (grad := self.masters[group].grad) is not None:
            self.gradient(group, grad)
        call(None)
        numbers = probe(self.masters[group].device)
        with self._probing("unscaling other numbers"):
            call(numbers)
        self.unscaled(group, numbers)

    def unscaled(self, group: int, numbers: Tensor) -> None:
        """What becomes of :func:`probe` while the gradient of this group is unscaled and clipped; read at its step."""
        if (sample := self.samples.get(group)) is None:
            self.differences.append(f"the gradient of group {group} is unscaled, and was not seen before")
            return
        if sample.probe is not None:
            self.differences.append(f"the gradient of group {group} is unscaled twice")
        sample.probe = numbers

    def _before_step(self, optimizer: BalancedAdam, *_: Any) -> None:
        with self._probing("a look at the gradients before the optimizer's step"):
            self._compare_gradients(optimizer)

    def _compare_gradients(self, optimizer: BalancedAdam) -> None:
        for group, master in self._with_gradient(optimizer):
            sample = self.samples.get(group)
            if sample is None:
                self.differences.append(f"group {group} is stepped with a gradient that was not seen before")
                continue
            if sample.stepped is not None:
                self.differences.append(f"group {group} is stepped twice")
                continue
            if sample.pieces is not None:
                found = _at(sample.pieces, sample.index)
                sample.pieces = None
                if not _same(found, sample.gradient):
                    self.differences.append(f"the gradients of group {group} are not those of the flat one any more")
            numbers = probe(master.device)
            if sample.probe is None:
                sample.probe = numbers
            factor = sample.probe[:1]
            assert master.grad is not None
            if not _same(sample.probe, numbers * factor):
                self.differences.append(f"unscaling and clipping group {group} is not a multiplication by one number")
            if not _same(master.grad.view(-1)[sample.index], sample.gradient.to(master.dtype) * factor):
                self.differences.append(f"the gradient of group {group} is not the gathered one times the factor")
            sample.weights = master.detach()[sample.index].clone()
            sample.state = _narrowed(optimizer.state.get(master, {}), master, sample.index)

    def _after_step(self, optimizer: BalancedAdam, *_: Any) -> None:
        for group, master in self._with_gradient(optimizer):
            sample = self.samples.get(group)
            if sample is not None and sample.weights is not None and sample.stepped is None:
                sample.stepped = master.detach()[sample.index].clone()
                with self._probing("the one pass"):
                    self._rehearse(group, sample)

    @contextmanager
    def _probing(self, what: str) -> Iterator[None]:
        """What DeepSpeed's own step doesn't do must not make it fail."""
        try:
            yield
        except Exception as error:
            self.differences.append(f"{what} fails: {type(error).__name__}: {error}")

    def _with_gradient(self, optimizer: BalancedAdam) -> list[tuple[int, Tensor]]:
        steps = {id(param) for group in optimizer.param_groups for param in group["params"]}
        return [(i, m) for i, m in enumerate(self.masters) if id(m) in steps and m.grad is not None]

    def _rehearse(self, group: int, sample: _Sample) -> None:
        """Take the step of the sample in one pass."""
        optimizer, master = self.zero.optimizer, sample.master
        (settings,) = (
            {name: value for name, value in each.items() if name != "params"}
            for each in optimizer.param_groups
            if any(param is master for param in each["params"])
        )
        assert sample.weights is not None and sample.probe is not None
        known = inspect.signature(type(optimizer)).parameters
        defaults = {name: value for name, value in optimizer.defaults.items() if name in known}  # torch adds some
        twin = type(optimizer)([{**settings, "params": [sample.weights]}], **defaults)
        if sample.state:
            twin.state[sample.weights] = sample.state
        if sample.slot is not None:
            sample.written = torch.empty_like(sample.weights, dtype=sample.slot.tensor.dtype)
        if not twin.set_fused_grad(sample.weights, [sample.gradient], sample.probe[:1], sample.written):
            self.differences.append(
                f"the kernel does not take a gradient of {sample.gradient.dtype} on {sample.gradient.device}, or the "
                "optimizer has step hooks"
            )
            return
        twin.step()
        theirs = {"weights": sample.stepped, **_narrowed(moment_tensors(optimizer.state[master]), master, sample.index)}
        ours = {"weights": sample.weights, **moment_tensors(twin.state[sample.weights])}
        for name, value in ours.items():
            if not _same(value, theirs[name]):
                self.differences.append(f"{name} of group {group} are not those of the one pass")

    def _copied(self, group: int, source: Tensor) -> bool:
        """The 16-bit weights of this group are copied into."""
        sample = self.samples[group]
        if source.data_ptr() != sample.master.data_ptr() or sample.stepped is None:
            self.differences.append(f"the 16-bit weights of group {group} are not copied from the new fp32 weights")
        sample.copies += 1
        return False

    # ---- And at its end.

    def verdict(self) -> int:
        """``SAME``, ``DIFFERS``, or ``UNDECIDED`` where nothing was stepped: the step was skipped."""
        if not self.differences and all(sample.stepped is None for sample in self.samples.values()):
            return UNDECIDED
        with self._probing("a look at the weights"):
            self._compare_weights()
        return DIFFERS if self.differences else SAME

    def _compare_weights(self) -> None:
        for group, sample in self.samples.items():
            if sample.stepped is None:
                self.differences.append(f"group {group} is not stepped")
            elif not _same(sample.master.detach()[sample.index], sample.stepped):
                self.differences.append(f"the fp32 weights of group {group} change after their step")
            elif sample.slot is not None:
                if sample.copies != 1:
                    self.differences.append(f"the 16-bit weights of group {group} are copied {sample.copies} times")
                now = sample.slot.tensor.detach().reshape(-1)[sample.index]
                if sample.written is None or not _same(now, sample.written):
                    self.differences.append(f"the 16-bit weights of group {group} are not those of the one pass")


def probe(device: torch.device) -> Tensor:
    """A 1, which becomes the factor, and numbers with all bits of a float32, which it must multiply: float32 [1024]."""
    numbers = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    numbers[0] = 1.0
    return numbers.to(device)


def _choose(size: int, pieces: Sequence[int], seed: int) -> Tensor:
    """Up to ``SAMPLE`` indices: both ends, either side of the pieces' boundaries, and others at random; sorted."""
    if size <= SAMPLE:
        return torch.arange(size)
    ends = torch.tensor([0, *pieces]).cumsum(0).clamp(0, size - 1)
    edges = torch.cat([ends, (ends - 1).clamp(min=0), torch.tensor([size - 1])]).unique()
    if len(edges) > SAMPLE // 2:
        edges = edges[torch.linspace(0, len(edges) - 1, SAMPLE // 2).long()]
    others = torch.randint(size, (SAMPLE - len(edges),), generator=torch.Generator().manual_seed(seed))
    return torch.cat([edges, others]).unique()


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of [n] have the same bits; any NaN is as good as another."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    width = ours.element_size()
    equal = (ours.view(torch.uint8) == theirs.view(torch.uint8)).view(-1, width).all(1)
    if ours.is_floating_point():
        equal |= ours.isnan() & theirs.isnan()
    return bool(equal.all())


def _at(pieces: Sequence[Tensor], index: Tensor) -> Tensor:
    """Elements of these tensors, one after another, at sorted indices."""
    found, start = [], 0
    for piece in pieces:
        end = start + piece.numel()
        inside = index[(index >= start) & (index < end)]
        found.append(piece.detach().reshape(-1)[inside - start])
        start = end
    return torch.cat(found)


def _narrowed(state: dict[str, Any], master: Tensor, index: Tensor) -> dict[str, Any]:
    """A parameter's state, of some elements alone."""
    return {
        name: value.view(-1)[index].clone()
        if isinstance(value, Tensor) and value.numel() == master.numel() and value.dim()
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }
