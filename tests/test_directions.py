"""Words of mirrored pictures: what is swapped, what stays, and what is not mirrored, as nobody knows its mirror."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from conftest import MINILM
from hypothesis import given
from hypothesis import strategies as st
from refer_files import own_set

from dit_ds.data.directions import mirror_expression
from dit_ds.data.input_check import InputCheck
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation
from dit_ds.models.text_encoder import load_tokenizer

SWAPPED = {
    "the left star": "the right star",
    "Right man, leftmost: upright bright leftover": "Left man, rightmost: upright bright leftover",
    "LEFT-HAND side": "RIGHT-HAND side",
    "upper-left lower_right topleft": "upper-right lower_left topright",
    "bottomright corner, farleft": "bottomleft corner, farright",
    "second from the left": "second from the right",
    "to the left of the right one": "to the right of the left one",
    "lefty rightward leftwards righthand leftside": "righty leftward rightwards lefthand rightside",
    "the man's left": "the man's right",
    "man on the right behind the car": "man on the left behind the car",
    "far right next to the tree": "far left next to the tree",
    "lhs of table": "rhs of table",
}
SHORT = {"lft guy": "right guy", "rt guy": "left guy", "upper rt": "upper left", "rigth one": "left one"}
STAYS = [
    "the bright star", "upright piano", "copyright sign", "all right", "alright", "right now", "right angle",
    "right side up cup", "human rights poster", "cleft chin", "leftovers on a plate", "fright wig", "wright brothers",
    "top of the picture", "dog in front", "a clock on the wall", "12 o'clock", "six o clock", "café au lait", "twelve oclock",
]  # fmt: skip
UNKNOWN = [
    "west end", "the eastern tower", "l guy", "guy on r", "tl corner", "onleft", "rightman", "all left",
    "right behind the car", "right next to the dog", "right in front of me", "cake left over", "what is left out",
    "half past 3 o'clock", "2 or 3 o'clock", "3:15 o'clock", "13 o'clock", "o'clock", "clockwise arrow",
    "perro a la izquierda", "chien de droite", "chien à gauche", "Hund links", "der rechte Hund", "cane a sinistra",
    "cão à esquerda", "cachorro da direita", "hond rechts", "Vänster hund", "højre hund", "lewy pies",
    "собака слева", "左边的狗", "الكلب", "कुत्ता", "σκύλος", "犬 left",
]  # fmt: skip


@pytest.mark.parametrize("text", SWAPPED)
def test_sides_are_swapped_and_back(text):
    assert mirror_expression(text) == SWAPPED[text] and mirror_expression(SWAPPED[text]) == text


@pytest.mark.parametrize("text", SHORT)
def test_short_and_misspelt_sides_become_the_other_in_full(text):
    assert mirror_expression(text) == SHORT[text]


@pytest.mark.parametrize("text", STAYS)
def test_what_is_no_direction_stays(text):
    assert mirror_expression(text) == text


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_has_no_known_mirror_is_not_mirrored(text):
    assert mirror_expression(text) is None


HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.mark.parametrize("form", ["{} o'clock", "at {} o’clock dog", "{} o clock", "{} oclock", "dog at {}-o'clock"])
def test_hours_point_to_the_mirrored_side(form):
    def direction(hour: int) -> list[float]:
        return [round(f(math.tau * hour / 12), 9) for f in (math.sin, math.cos)]

    for hour in range(1, 13):
        mirrored = mirror_expression(form.format(hour))
        other = int(re.search(r"\d+", mirrored)[0])
        x, y = direction(hour)
        assert direction(other) == [-x, y] and mirrored == form.format(other)
        assert mirror_expression(form.format(HOURS[hour - 1])) == form.format(HOURS[other - 1])


WORDS = st.sampled_from(
    """left Right leftmost RIGHT-HAND upright bright all leftover right, next to the on behind 3 o'clock oclock nine of lft rt
    topleft west derecha o clock and now upper_left lhs over in front dog""".split()
)


@given(st.lists(WORDS, max_size=8).map(" ".join))
def test_a_mirror_of_a_mirror(text):
    """Means what the text means: a short form is in full then, all else as it was."""

    def in_full(words: str) -> str:
        return re.sub(r"\brt\b", "right", re.sub(r"\blft\b", "left", words))

    once = mirror_expression(text)
    if once is not None:
        assert in_full(mirror_expression(once)) == in_full(text) and len(once.split()) == len(text.split())


@given(st.text() | st.text(st.characters(min_codepoint=0x370, max_codepoint=0x1CFF)))
def test_no_text_breaks_it_and_none_in_another_script_is_mirrored(text):
    mirrored = mirror_expression(text)
    if any(c.isalpha() and 0x370 <= ord(c) < 0x1D00 for c in text):
        assert mirrored is None


def dataset(folder, kind: str, flip: float) -> ExpressionDataset:
    index, tokenize = SplitIndex.load(folder, "train"), make_tokenize(load_tokenizer(MINILM), 20)
    how = Augmentation(0.4, 0.5, flip)
    return ExpressionDataset(index, "sentence", 64, tokenize, how, seed=3, prompts=Prompts.of([kind], 2))


def test_a_picture_is_not_flipped_where_its_words_can_not_be(tmp_path):
    texts = ["left block", "bloque a la izquierda", "block", "блок", "lft block", "right behind it"]
    folder = own_set(tmp_path, texts)
    flipping, plain, pointed, pointed_plain = (
        dataset(folder, kind, flip) for kind in ("text", "point") for flip in (1.0, 0.0)
    )
    tokenize = flipping.tokenize
    for i, text in enumerate(texts):
        a, b = flipping[(0, i, 1.0)], plain[(0, i, 1.0)]
        h, w = a["size"]
        mirrored = mirror_expression(text)
        if mirrored is None:
            assert all(np.array_equal(a[k], b[k]) for k in b)
        else:
            assert np.array_equal(a["mask"][:h, :w], b["mask"][:h, :w][:, ::-1]) and not np.array_equal(
                a["mask"], b["mask"]
            )
            assert np.array_equal(a["image"][:, :h, :w], b["image"][:, :h, :w][:, :, ::-1])
            assert np.array_equal(a["tokens"], tokenize(mirrored)[0])
        p, q = pointed[(0, i, 1.0)], pointed_plain[(0, i, 1.0)]  # no words are read: nothing is in the way
        assert np.array_equal(p["mask"][:h, :w], q["mask"][:h, :w][:, ::-1])
    counts = InputCheck().losses(folder, "train", 1).counts
    assert (counts["expressions_swapped"], counts["expressions_not_flippable"]) == (2, 3)
