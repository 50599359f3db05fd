"""The tokenizer: how it is loaded, what decides its tokens, and the tokens of a text."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from train.common.errors import ConfigError, require, shown, why_not_loaded
from train.data.config import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load "byt5" (bytes, no download) or any transformers tokenizer.

    Raises:
        ConfigError: if no tokenizer of that name can be loaded.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == "byt5":
        return ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        facts(tokenizer)
        return tokenizer
    except Exception as error:  # of any class, depending on the tokenizer's files
        raise ConfigError(
            f"tokenizer is {shown(name)}, which can't be loaded: {why_not_loaded(name, error)}."
        ) from None


_FACTS: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return everything that decides which tokens the tokenizer produces, as it was when it was loaded.

    To tokenize changes it: truncation and padding, with which it may have been saved, are turned off.
    """
    if tokenizer not in _FACTS:
        _FACTS[tokenizer] = _facts_now(tokenizer)
    return _FACTS[tokenizer]


def _facts_now(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of fast tokenizers: normalizer, merges, vocabulary
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, content, tokenizer.eos_token_id, str(tokenizer.special_tokens_map)]


PROBE = (
    "Ein  Test:\tnaïve façade, 北京 2026\r\n\n    def f(x): return x**2 != 3.14e-10  # ŻÓŁĆ 🙂 "
    "\u0130i \ufb01 e\u0301 <s></s>\u00a0\ufeff"
)
"""A text whose tokens depend on all that tokenizers treat in different ways: case, spaces, digits, normal forms."""


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the vocabulary, the end of a document and the tokens of a probe.

    Unlike :func:`facts` it does not depend on how a version of transformers or tokenizers writes them down.
    """
    probe = encode(tokenizer, [PROBE], None, as_text=True)[0].tolist()
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, probe]
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def end_of_document(settings: Text, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a document; None if neither the settings nor the tokenizer has one.

    Raises:
        ConfigError: if the tokenizer has no such token.
    """
    if settings.eos_id is None:
        return tokenizer.eos_token_id
    require(
        settings.eos_id < len(tokenizer),
        f"eos_id is {settings.eos_id}, and tokenizer {settings.tokenizer!r} has {len(tokenizer)} tokens.",
    )
    return settings.eos_id


def dtype_for(vocabulary: int) -> np.dtype:
    """Return the smaller of uint16 and uint32 that holds so many different tokens."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], end: int | None, as_text: bool) -> list[np.ndarray]:
    """Return the tokens of each text, with ``end`` at its end, in the least type that holds the vocabulary.

    Args:
        tokenizer: of transformers.
        texts: the documents.
        end: the token that ends a document; None for none.
        as_text: read a special token in a text as plain text: "</s>" in a web page does not end the document.

    Raises:
        ConfigError: if the tokenizer makes a token beyond its own vocabulary.
    """
    special = {"split_special_tokens": True} if as_text else {}
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, **special)["input_ids"]
    last = [] if end is None else [end]
    vocabulary = len(tokenizer)
    arrays = [np.array(ids + last, np.int64) for ids in encoded]
    greatest = max((int(array.max()) for array in arrays if len(array)), default=0)
    require(
        greatest < vocabulary,
        f"tokenizer is {tokenizer.name_or_path!r}, which makes the token {greatest} and says that it has {vocabulary}.",
    )
    return [array.astype(dtype_for(vocabulary)) for array in arrays]


def hash_of(text: str) -> int:
    """Return the hash that decides whether a document is held out: its BLAKE2b of 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
