"""Expressions to token ids."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np

from dit_ds.data.loading.dataset import Tokenize


def make_tokenize(tokenizer: Any, length: int) -> Tokenize:
    """Expressions to `length` ids and a mask of the real ones, by a `transformers` tokenizer."""
    if not tokenizer.is_fast:
        return functools.partial(_tokenize_slowly, tokenizer, length)
    tokenizer = copy.deepcopy(tokenizer)  # whose settings stay those of `length`
    tokenizer("", padding="max_length", truncation=True, max_length=length)
    # what transformers wraps takes a quarter of the time
    return functools.partial(_tokenize, tokenizer.backend_tokenizer)


def _tokenize_slowly(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int64), np.array(encoded["attention_mask"], bool)


def _tokenize(backend: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = backend.encode(text)
    return np.array(encoded.ids, np.int64), np.array(encoded.attention_mask, bool)
