"""Expressions to token ids, and what of an expression gets lost on the way."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_ds.data.loading.dataset import Tokenize
from dit_ds.models.text_encoder import padding_backend


def make_tokenize(tokenizer: Any, length: int) -> Tokenize:
    """A function from text to `length` input ids and their attention mask, padded or truncated.

    Args:
        tokenizer: of `transformers`; it is not changed.
        length: in tokens.
    """
    if not tokenizer.is_fast:
        return functools.partial(_tokenize_slow, tokenizer, length)
    # the backend alone takes a quarter of the time of a call through transformers
    return functools.partial(_tokenize_fast, padding_backend(tokenizer, length))


def _tokenize_slow(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int64), np.array(encoded["attention_mask"], bool)


def _tokenize_fast(backend: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = backend.encode(text)
    return np.array(encoded.ids, np.int64), np.array(encoded.attention_mask, bool)


@dataclass(frozen=True)
class TokenCheck:
    """How an expression fits a text encoder.

    Attributes:
        ids: of all its tokens, without [CLS] and [SEP].
        room: how many of them are read, from the first on.
        unknown: how many of them are [UNK].
    """

    ids: list[int]
    room: int
    unknown: int

    @property
    def cut(self) -> bool:
        """Whether its end is not read."""
        return len(self.ids) > self.room

    @property
    def mostly_unknown(self) -> bool:
        """Whether half of its tokens or more say nothing, or there is none."""
        return 2 * self.unknown >= len(self.ids)


def make_token_check(tokenizer: Any, length: int) -> Callable[[str], TokenCheck]:
    """A function that tells what `make_tokenize`'s, made of the same arguments, leaves of a text."""
    room, unknown = length - tokenizer.num_special_tokens_to_add(), tokenizer.unk_token_id
    if tokenizer.is_fast:
        backend = copy.deepcopy(tokenizer).backend_tokenizer
        backend.no_truncation()
        backend.no_padding()

    def check(text: str) -> TokenCheck:
        if tokenizer.is_fast:
            ids = backend.encode(text, add_special_tokens=False).ids
        else:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return TokenCheck(ids, room, ids.count(unknown))

    return check
