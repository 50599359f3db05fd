"""The loss without all logits at once (``--loss chunked``).

A logit takes 12 bytes at the peak of a step: its log-probability in float32, and two gradients of that. With a large
vocabulary that is more than all the rest of the model. Here the head and the loss are computed for a few tokens at a
time, and once more in the backward pass, so that no more than those few logits are ever held.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from train.common.errors import require
from train.common.schemas import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
"""The label of a token on which no loss is taken, in transformers and torch."""
FULL_BELOW = 2**26
"""Logits of one sequence from which on "auto" means chunked: 0.8 GB at the peak."""
CHUNK = 2**24
"""Logits that are held at once: 0.2 GB."""


def resolved(loss: str, sequence_length: int, vocabulary: int, begun: Loss | None) -> Loss:
    """Return how a run takes its loss. It does not depend on how the batch is split.

    Args:
        loss: as of ``--loss``.
        sequence_length: tokens in one sequence.
        vocabulary: rows of the model's output embedding.
        begun: how the run took it before, if it is resumed.
    """
    if loss != "auto":
        return "chunked" if loss == "chunked" else "full"
    return begun or ("chunked" if sequence_length * vocabulary >= FULL_BELOW else "full")


def use_chunked(model: PreTrainedModel, chunk: int = CHUNK) -> None:
    """Have ``model.forward`` take its loss by chunks where it is given labels, and return that alone.

    ``chunked=False`` has the model's own way. The gradients are those of the full loss, to rounding.

    Args:
        model: a causal language model, before DeepSpeed wraps it.
        chunk: logits that are held at once.
    """
    from transformers.modeling_outputs import CausalLMOutput

    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, labels: Any = None, chunked: bool = True, **given: Any) -> Any:
        if labels is None or not chunked:
            return own(*args, **given, **({} if labels is None else {"labels": labels}))
        count = given.pop("num_items_in_batch", None)
        hidden = model.base_model(*args, **given).last_hidden_state
        return CausalLMOutput(loss=_mean(model.get_output_embeddings(), hidden, labels, count, chunk))

    model.forward = forward


def _mean(head: Any, hidden: torch.Tensor, labels: torch.Tensor, count: Any, chunk: int) -> torch.Tensor:
    """Return the sum of the tokens' losses divided by ``count``, by default the number of tokens.

    Args:
        head: the output embedding.
        hidden: [sequences, length, width].
        labels: [sequences, length]; each is predicted from the place before it.
        count: a number, or None.
        chunk: logits that are held at once.
    """
    wanted = pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]
    tokens = max(1, chunk // rows)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part, label in zip(hidden.flatten(0, 1).split(tokens), wanted.split(tokens), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_sum, head, part, label, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _sum(head, part, label)
    return total / ((wanted != IGNORED).sum() if count is None else count)


def _sum(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def check_chunked(engine: Any, name: str, vocabulary: int) -> None:
    """Check that the model's own loss is that of its output embedding, with nothing between the two.

    Some models scale or bend their logits. At the first step those are small, and to bend them changes little; so they
    are made large here.

    Args:
        engine: a DeepSpeed engine whose model :func:`use_chunked` has changed; all ranks call this.
        name: of the model, for the message.
        vocabulary: number of different tokens.

    Raises:
        ConfigError: if it isn't.
    """
    model = engine.module
    was_training = model.training
    tokens = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0)).to(engine.device)
    enlarged = model.get_output_embeddings().register_forward_hook(lambda module, given, logits: 100 * logits)
    engine.eval()
    try:
        ours, full = (float(engine(input_ids=tokens, labels=tokens, chunked=way).loss) for way in (True, False))
    finally:
        enlarged.remove()
        engine.train(was_training)
    require(
        abs(ours - full) <= 1e-3 * abs(full),
        f"loss is chunked, and model {name!r} does more to its logits, or adds to its loss; give --loss full.",
    )
