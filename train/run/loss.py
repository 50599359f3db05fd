"""The loss without all logits at once (``--loss chunked``).

A logit takes 12 bytes at the peak of a step: its log-probability in float32, and two gradients of that. With a large
vocabulary that is more than all the rest of the model. Here the head and the loss are computed for a few tokens at a
time, and once more in the backward pass, so that no more than those few logits are ever held.
"""

from __future__ import annotations

import functools
import math
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
def check(engine: Any, kind: Loss, name: str, vocabulary: int, length: int) -> None:
    """Check that the loss is that of predicting the next token, unseen, and by chunks no other than the model's own.

    Some models scale or bend their logits, and those made as the decoder of an encoder take labels as they are: they
    would learn to copy. At the first step logits are small, and much looks alike; so they are made large here.

    Args:
        engine: a DeepSpeed engine, whose model :func:`use_chunked` has changed if ``kind`` is chunked; all ranks call
            this.
        kind: how the loss is taken.
        name: of the model, for the message.
        vocabulary: number of different tokens.
        length: of a sequence.

    Raises:
        ConfigError: if it isn't.
    """
    model = engine.module
    was_training = model.training
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, min(32, length)), generator=generator).to(engine.device)
    own = {"chunked": False} if kind == "chunked" else {}
    head = model.get_output_embeddings()
    enlarged = head.register_forward_hook(lambda module, given, logits: 100 * logits) if head is not None else None
    engine.eval()
    try:
        # What is added to a loss, whatever the labels, has no part in the difference of two.
        (first, logits), (second, _) = (_own_loss(engine, tokens, labels, own) for labels in (tokens, tokens.flip(1)))
        changed = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % vocabulary], 1)
        _, others = _own_loss(engine, changed, changed, own)
        ours = float(engine(input_ids=tokens, labels=tokens).loss) if own else math.nan
    finally:
        if enlarged is not None:
            enlarged.remove()
        engine.train(was_training)
    following = _difference(logits[:-1], tokens[0, 1:], tokens[0].flip(0)[1:])
    same = _difference(logits, tokens[0], tokens[0].flip(0))
    require(
        abs(first - second - following) <= abs(first - second - same),
        f"model is {name!r}, whose loss in transformers is on the token that it is given and not on the next one; take "
        "a model for causal language modelling.",
    )
    seen = float((logits[:-1] - others[:-1]).abs().max())
    require(
        seen <= 1e-4 * float(logits.abs().max()),
        f"model is {name!r}, in which a token sees those after it; take a causal model, or another --attention.",
    )
    require(
        not own or abs(ours - first) <= 1e-3 * abs(first),
        f"loss is chunked, and model {name!r} does more to its logits, or adds to its loss; give --loss full.",
    )


def _own_loss(
    engine: Any, tokens: torch.Tensor, labels: torch.Tensor, own: dict[str, bool]
) -> tuple[float, torch.Tensor]:
    found = engine(input_ids=tokens, labels=labels, **own)
    return float(found.loss), found.logits[0].float()


def _difference(logits: torch.Tensor, labels: torch.Tensor, others: torch.Tensor) -> float:
    return float(cross_entropy(logits, labels) - cross_entropy(logits, others))
