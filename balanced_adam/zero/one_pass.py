"""A step of ZeRO's in one pass over memory.

Around the optimizer's step DeepSpeed casts the gradients to fp32, multiplies them by the unscaling and clipping factor,
and copies the new fp32 weights to 16 bits, each in a pass of its own. Here one kernel does all that.

No step() of DeepSpeed's is copied, and none of its methods is replaced: they run, on stand-ins. The gradients are
handed to the optimizer as they are (:meth:`BalancedAdam.set_fused_grad`), and the flat gradient that DeepSpeed works on
takes no memory. So *its* code decides on overflow, scale and clipping: its factor is what it makes of a 1, its norm what
it makes of the tensors' norms, and its copy of the weights is left out where the kernel has made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from balanced_adam.zero import partitions
from balanced_adam.zero.norms import Gradients, Squares
from balanced_adam.zero.stand_ins import GradientStandIn, WeightsInStep


class OnePass:
    """One step that is taken in one pass. Each method stands for something that DeepSpeed does, as in :class:`Check`.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        refused: is told why a gradient could not be handed over; DeepSpeed's own passes take that group then.
    """

    def __init__(self, zero: Any, refused: Callable[[str], None]) -> None:
        self.zero, self.refused = zero, refused
        self.masters = partitions.masters(zero)
        self.factors: dict[int, Tensor] = {}
        """By group: a 1, until DeepSpeed has unscaled and clipped it."""
        self.squares = Squares()

    def close(self) -> None:
        """Nothing of it is left in DeepSpeed or the optimizer, also where the step was skipped or has failed."""
        for group, master in enumerate(self.masters):
            self.zero.optimizer.clear_fused_grad(master)
            if (slot := partitions.weights(self.zero, group, master)) is not None:
                WeightsInStep.remove(slot)

    def scan(self, lists: Sequence[Gradients] | None, call: Callable[[Tensor | None], Tensor | bool]) -> Tensor | bool:
        """Overflow: of the sum of all squares, which the norm then needs too."""
        return call(None if lists is None else self.squares.total(lists))

    def norm(self, gradients: Gradients, call: Callable[[Gradients], Tensor], look_for_zeros: bool = False) -> Tensor:
        """The norm: of the tensors' norms."""
        norms = self.squares.norms(gradients, look_for_zeros)
        return call(gradients if norms is None else norms)

    def gradient(self, group: int, gather: Callable[[], Tensor], pieces: Sequence[Tensor]) -> Tensor:
        """The gradient of a group: stays in its pieces, and DeepSpeed gets a stand-in."""
        if len({piece.dtype for piece in pieces}) > 1:  # padding may be fp32 beside 16 bits; gathered they are one
            pieces = [gather()]
        if not self.hand_over(group, pieces):
            return gather()
        return GradientStandIn.of(self.masters[group])

    def unscale(self, group: int, call: Callable[[Tensor | None], None]) -> None:
        """DeepSpeed unscales and clips a 1 (``call`` of a tensor), which thus becomes the factor."""
        if partitions.is_offloaded(self.zero):
            self._unscale_offloaded(group, call)
        else:
            call(self.factors.get(group))

    def _unscale_offloaded(self, group: int, call: Callable[[Tensor | None], None]) -> None:
        """The gradient lies in an fp32 buffer that lasts from step to step.

        The buffer has to hold the clipped gradient afterwards, as without us: DeepSpeed steps a parameter that gets no
        gradient next time with what it finds there.
        """
        grad = self.masters[group].grad
        factor = torch.ones(1, device=self.masters[group].device)
        call(factor)
        if grad is None or not self.hand_over(group, [grad], factor, store_scaled=float(factor) != 1.0):
            call(None)

    def hand_over(
        self, group: int, pieces: Sequence[Tensor], factor: Tensor | None = None, store_scaled: bool = False
    ) -> bool:
        """Let the optimizer's next step of this group be the one pass; False if it can't be: nothing has changed."""
        master, slot = self.masters[group], partitions.weights(self.zero, group, self.masters[group])
        factor = torch.ones(1, device=master.device) if factor is None else factor
        flat = [piece.reshape(-1) for piece in pieces]
        optimizer = self.zero.optimizer
        if not optimizer.set_fused_grad(master, flat, factor, slot.tensor if slot else None, store_scaled):
            kinds = sorted({f"{str(piece.dtype).removeprefix('torch.')} on {piece.device}" for piece in pieces})
            found = f"{sum(piece.numel() for piece in pieces)} elements ({', '.join(kinds)}) of gradient"
            self.refused(f"{found} for {master.numel()} weights on {master.device}, or the optimizer has step hooks")
            return False
        self.factors[group] = factor
        if slot is not None:
            # The kernel writes these weights, once it has stepped their master.
            WeightsInStep.install(
                slot,
                lambda source: (
                    (source.data_ptr(), source.numel()) == (master.data_ptr(), master.numel())
                    and master not in optimizer.fused_grads
                ),
            )
        return True

    def take_back(self, group: int) -> list[Tensor]:
        """The gradient of a group that was handed over: DeepSpeed's own passes take it after all."""
        master, slot = self.masters[group], partitions.weights(self.zero, group, self.masters[group])
        pieces: list[Tensor] = self.zero.optimizer.fused_grads[master].shards
        self.zero.optimizer.clear_fused_grad(master)
        del self.factors[group]
        if slot is not None:
            WeightsInStep.remove(slot)
        return pieces
