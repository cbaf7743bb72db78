"""Expressions to token ids."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np

from dit_ds.data.loading.dataset import Tokenize


def make_tokenize(tokenizer: Any, length: int) -> Tokenize:
    """A function from text to `length` input ids and their attention mask, padded or truncated.

    Args:
        tokenizer: of `transformers`; it is not changed.
        length: in tokens.
    """
    if not tokenizer.is_fast:
        return functools.partial(_tokenize_slow, tokenizer, length)
    tokenizer = copy.deepcopy(tokenizer)  # a call sets padding and truncation in the backend for good
    tokenizer("", padding="max_length", truncation=True, max_length=length)
    # the backend alone takes a quarter of the time of a call through transformers
    return functools.partial(_tokenize_fast, tokenizer.backend_tokenizer)


def _tokenize_slow(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int64), np.array(encoded["attention_mask"], bool)


def _tokenize_fast(backend: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = backend.encode(text)
    return np.array(encoded.ids, np.int64), np.array(encoded.attention_mask, bool)
