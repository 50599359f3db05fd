"""Record the last gradients of elements drawn from every tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from train.analysis.scale_response import Recording


class Recorder:
    """Keeps the last gradients of elements drawn from every tensor."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], window: int, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kept: deque[Tensor] = deque(maxlen=window)
        self.layers: dict[str, slice] = {}
        self.chosen: list[tuple[Tensor, Tensor]] = []
        for name, parameter in named:
            begin = sum(len(index) for _, index in self.chosen)
            index = torch.randperm(parameter.numel(), generator=generator)[:elements]
            self.layers[name] = slice(begin, begin + len(index))
            self.chosen.append((parameter, index.to(parameter.device)))

    def see(self) -> None:
        """Record the gradients of this step."""
        parts = [
            torch.zeros(len(index)) if p.grad is None else p.grad.flatten()[index].float().cpu()
            for p, index in self.chosen
        ]
        self.kept.append(torch.cat(parts))

    def recording(self) -> Recording:
        """Return the recorded gradients of the last ``window`` steps."""
        return Recording(torch.stack(list(self.kept)), self.layers)
