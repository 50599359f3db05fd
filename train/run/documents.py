"""Documents that see themselves alone (``--document-mask``): positions, labels, and whether a model keeps to them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from train.common.errors import require
from train.data import tokenization
from train.data.blocks import Blocks
from train.data.config import Data
from train.run.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOOKED_AT = 2**24
"""Tokens at the beginning of a source among which the end of a document has to be."""


def inputs(tokens: torch.Tensor, end: int) -> dict[str, torch.Tensor]:
    """Return what the model is given: the tokens, their positions, and the labels, int64 of the tokens' shape.

    A document begins after each ``end``. Its first position is 0, by which transformers knows where attention ends (not
    with a cache, ``config.use_cache``), and its first token is no label.

    Args:
        tokens: [sequences, length].
        end: the token that ends a document; it belongs to the document before it.
    """
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == end
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    first = torch.where(begins, places, 0).cummax(dim=1).values
    return {
        "input_ids": tokens,
        "position_ids": places - first,
        "labels": torch.where(begins, IGNORED, tokens),
    }


def predicted(tokens: torch.Tensor, end: int) -> int:
    """Return on how many of these tokens a loss is taken: not on the first of a sequence or of a document."""
    return int((tokens[:, :-1] != end).sum())


def end_of(settings: Data, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a document, if documents are to be kept apart, else None.

    Raises:
        ConfigError: if they are, and there is no such token.
    """
    end = tokenization.end_of_document(settings, tokenizer)
    if not settings.document_mask:
        return None
    require(
        end is not None,
        f"document_mask is set, and tokenizer {settings.tokenizer!r} has no token that ends a document; give --eos-id.",
    )
    return end


def check_ends(texts: dict[str, Blocks], end: int) -> None:
    """Check that documents end at all.

    Args:
        texts: by the names that a message gives them.
        end: the token that ends a document.

    Raises:
        ConfigError: if one has none of these tokens where it should have many.
    """
    for name, blocks in texts.items():
        looked_at, seen = 0, False
        for part in blocks.parts:
            here = part[: LOOKED_AT - looked_at]
            looked_at, seen = looked_at + len(here), seen or bool((here == end).any())
        require(
            seen,
            f"document_mask is set, and the first {looked_at} tokens of the {name} text hold no {end}, which should "
            "end a document; give the --eos-id that does.",
        )


@torch.no_grad()
def check_model(engine: Any, name: str, end: int, vocabulary: int, length: int) -> None:
    """Check that the model keeps documents apart, by what it makes of one beside two others.

    Args:
        engine: a DeepSpeed engine; all ranks call this.
        name: of the model, for the message.
        end: the token that ends a document.
        vocabulary: number of different tokens.
        length: tokens in a sequence.

    Raises:
        ConfigError: if it doesn't, or can't take the mean of its loss over other tokens than those it is given.
    """
    model: PreTrainedModel = engine.module
    parameters = inspect.signature(model.forward).parameters
    takes_count = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    require(
        takes_count and "position_ids" in parameters,
        f"document_mask is set, and model {name!r} takes no position_ids, or no num_items_in_batch; leave it out.",
    )
    half = min(length, 64) // 2
    if half < 2:
        return
    random = torch.Generator().manual_seed(0)
    pair = torch.randint(vocabulary, (2, 2 * half), generator=random)
    pair[pair == end] = (end + 1) % vocabulary
    pair[:, half - 1] = end
    pair[1, half:] = pair[0, half:]
    pair[1, : half - 1] = (pair[0, : half - 1] + 1) % vocabulary  # other tokens before the end, but for one that is it
    was_training = model.training
    engine.eval()
    given = inputs(pair.to(engine.device), end)
    logits = engine(**{name: value for name, value in given.items() if name != "labels"}).logits
    one, two = (float(engine(**given, num_items_in_batch=count).loss) for count in (1.0, 2.0))
    engine.train(was_training)
    differs = (logits[0] - logits[1]).abs().float()
    require(
        float(differs[: half - 1].max()) > 0.0 and float(differs[half:].max()) == 0.0,
        f"document_mask is set, and in model {name!r} a document sees the one before it; leave it out, or take another "
        "model.",
    )
    require(
        abs(one - 2 * two) <= 1e-3 * one,
        f"document_mask is set, and model {name!r} does not take num_items_in_batch; leave it out.",
    )
