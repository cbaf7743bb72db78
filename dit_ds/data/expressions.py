"""Expressions as the model reads them: one rule for sets that are sharded, samples that are loaded, and words that people
type."""

from __future__ import annotations

import re
import unicodedata

_NEITHER_WORD_NOR_SPACE = re.compile(r"[^\w\s-]")


def normalise_expression(text: str) -> str:
    """The expression in the form of REFER's `sent`: lower case, words apart by one space, without punctuation.

    Letters and digits of every script stay, with their marks, and "-" and "_"; everything else becomes a space. Invisible
    characters (soft hyphens, zero-width spaces) vanish, as in BERT's tokenizer. What is normalised stays as it is.

    Returns:
        An empty string where `text` has no word.
    """
    composed = unicodedata.normalize("NFC", _NEITHER_WORD_NOR_SPACE.sub(_visible, text).lower())
    plain = " ".join(_NEITHER_WORD_NOR_SPACE.sub(_mark_or_space, composed).split())
    return plain if any(c.isalnum() for c in plain) else ""


def _visible(found: re.Match[str]) -> str:
    return "" if unicodedata.category(found[0]) == "Cf" else found[0]


def _mark_or_space(found: re.Match[str]) -> str:
    return found[0] if unicodedata.category(found[0])[0] == "M" else " "
