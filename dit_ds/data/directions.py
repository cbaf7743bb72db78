"""Expressions of mirrored pictures: left and right swapped, where every word of direction is known.

`mirror_expression` alone decides which expressions can be mirrored; what it knows is in the tables below it reads.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

# --- what is swapped --------------------------------------------------------------------------------------------------

# each way to write a side; a short or misspelt form becomes the other side's word in full
_SPELLINGS = {
    "left": "left lft leftt letf lef",
    "right": "right rt rgt rght rigth rihgt rgiht rigt righ",
}
_SIDES = {word: side for side, words in _SPELLINGS.items() for word in words.split()}
_OTHER_SIDE = {"left": "right", "right": "left"}
_PAIRS = {"lhs": "rhs", "rhs": "lhs", "lh": "rh", "rh": "lh"}
_BEFORE = "top bottom upper lower low high far mid middle center centre back rear front inner outer most"
_BEHIND = """most hand handed hander side sides sided ward wards er est ish y ie ies corner center centre middle front back
    top bottom field fielder facing wing winger"""
_SIDE = re.compile(
    rf"({'|'.join(_BEFORE.split())})?({'|'.join(_SIDES)})({'|'.join(_BEHIND.split())})?"  # topleft, rightmost, lefty
)
_HOURS = ["twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]

# --- what is left as it is --------------------------------------------------------------------------------------------

# words with "left" or "right" in them that are no directions; every other one is a direction without known mirror
_NO_SIDE = re.compile(
    r"\w*bright\w*|(a|stage)?fright\w*|(play|wheel|cart|wain|ship|mill)?wrights?|(up|copy|out|down|forth|birth)right\w*"
    r"|al?right|right(s|o|ly|eous\w*|ful\w*)|cleft\w*|leftovers?|leftists?"
)
# "right" as correct or at once: with the word before it, or with those behind it
_CORRECT_AFTER = {"all"}
_CORRECT_BEFORE = ("now", "away", "angle", "angles", "angled", "side up", "way")

# --- what is not mirrored ---------------------------------------------------------------------------------------------

# before these, "right" may mean directly (right behind the car), and "left" remaining (left over) ..
_AMBIGUOUS_BEFORE = (
    *"""next behind beside besides above below beneath under underneath near beyond before after against between by over at
    there here where inside outside through alone out""".split(),
    *("in front", "in middle", "in center", "in centre", "in the middle", "in the center", "in the centre", "on top"),
)  # fmt: skip
# .. unless one of these is before them (on the right behind the car)
_LOCATES = set("""on to the at of from in far top bottom upper lower back front rear middle mid center centre extreme very his
    her my your its their""".split())  # fmt: skip
# words of direction that are not swapped, by language, without accents; "word*" with every ending
_ELSEWHERE = {
    "en": """l r lt tl tr bl br ul ur lr east* west western* westward* westerly northeast* northwest* southeast* southwest*
    ne nw se sw clockwise counterclockwise anticlockwise starboard portside""",
    "af": "regs",
    "ca": "esquerr* dret dreta drets dretes",
    "cs": "levo vlevo nalevo levy leve levem levou vlavo vpravo napravo prava pravy prave pravou",
    "cy": "chwith dde",
    "da": "venstre* hojre* højre*",
    "de": "links* linke linken linker linkes linkem linkest* rechts* rechte*",
    "es": "izquierd* izq izda izdo derech* dcha dcho diestra siniestra zurd*",
    "et": "vasak* parem*",
    "eu": "ezker* eskuin*",
    "fi": "vasen vasemm* vasemp* oikea*",
    "fr": "gauche* droit* tribord babord",
    "gl": "dereit*",
    "hr": "lijev* desno desni desna desne",
    "hu": "bal balra balol* jobb jobbra jobbol*",
    "id": "kiri kanan",
    "is": "vinstri* hægri*",
    "it": "sinistr* destra destro destre destri",
    "lt": "kair* desin*",
    "nl": "links* rechts* linker* rechter*",
    "no": "venstre* hoyre* høyre*",
    "pl": "lewo lewy lewa lewe lewej lewego lewym prawo prawy prawa prawe prawej prawego prawym",
    "pt": "esquerd* direit*",
    "ro": "stang stanga stangii dreapt* drept*",
    "sl": "levo leva desn*",
    "sv": "vanster* hoger*",
    "sw": "kushoto kulia",
    "tl": "kaliwa",
    "tr": "sol solda soldaki solunda sag sagda sagdaki saginda",
    "vi": "trai phai",
}
_ELSEWHERE_WORD = re.compile("|".join(w.replace("*", r"\w*") for words in _ELSEWHERE.values() for w in words.split()))
_WORD = re.compile(r"[^\W\d_]+|\d+")


def mirror_expression(text: str) -> str | None:
    """The expression that means in the mirrored picture what `text` means in the picture.

    "left" and "right" are swapped, in compounds ("upper-left", "topleft", "leftmost"), short forms ("lft") and usual
    misspellings, too, and so are the hours of "3 o'clock" and "9 o'clock".

    Returns:
        None where it has a word of direction whose mirror is not known: "west", "l", one of another language, any letter
        that is not Latin, a "right" that may mean directly, or an hour that can't be read.
    """
    if not text.isascii() and any(c.isalpha() and "LATIN" not in unicodedata.name(c, "") for c in text):
        return None
    found = list(_WORD.finditer(text))
    if all(_stays(w[0]) for w in found):
        return text
    words = [_fold(w[0]) for w in found]
    out, end = "", 0
    for i, (written, word) in enumerate(zip(found, words)):
        mirrored = _mirror_word(words, i, word)
        if mirrored is None:
            return None
        out += text[end : written.start()] + (written[0] if mirrored == word else _in_case_of(written[0], mirrored))
        end = written.end()
    return out + text[end:]


@functools.lru_cache(1 << 14)  # more words than any of the datasets has
def _stays(written: str) -> bool:
    """Whether a word is the same in the mirrored picture, whatever stands beside it."""
    word = _fold(written)
    return word not in ("o", "oclock") and _mirror_word([word], 0, word) == word


def _mirror_word(words: Sequence[str], i: int, word: str) -> str | None:
    """Word `i`, `word`, mirrored; None where it can't be."""
    if _says_oclock(words, i):
        return word if i and _hour(words[i - 1]) is not None and not _is_time(words, i - 1) else None
    if _says_oclock(words, i + 1) and (hour := _hour(word)) is not None:
        mirrored = (12 - hour) % 12
        return str(mirrored or 12) if word.isdecimal() else _HOURS[mirrored]
    if word in _PAIRS:
        return _PAIRS[word]
    if side := _SIDE.fullmatch(word):
        return _mirror_side(words, i, side)
    if _ELSEWHERE_WORD.fullmatch(word) or (("left" in word or "right" in word) and not _NO_SIDE.fullmatch(word)):
        return None
    return word


def _mirror_side(words: Sequence[str], i: int, side: re.Match[str]) -> str | None:
    """As `_mirror_word`, of a match of `_SIDE`."""
    name, before = _SIDES[side[2]], words[i - 1] if i else ""
    if before in _CORRECT_AFTER or _follows(words, i, _CORRECT_BEFORE):
        return side[0] if name == "right" else None  # "all left" would become "all right"
    if side[0] == side[2] and before not in _LOCATES and _follows(words, i, _AMBIGUOUS_BEFORE):
        return None
    return f"{side[1] or ''}{_OTHER_SIDE[name]}{side[3] or ''}"


def _follows(words: Sequence[str], i: int, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases is behind word `i`."""
    return any(list(words[i + 1 : i + 1 + len(p)]) == p for p in map(str.split, phrases))


def _says_oclock(words: Sequence[str], i: int) -> bool:
    return list(words[i : i + 1]) == ["oclock"] or list(words[i : i + 2]) == ["o", "clock"]


def _hour(word: str) -> int | None:
    """0 to 11, 0 for twelve; None where it is no hour."""
    if word.isdecimal():
        return int(word) % 12 if 1 <= int(word) <= 12 else None
    return _HOURS.index(word) if word in _HOURS else None


def _is_time(words: Sequence[str], i: int) -> bool:
    """Whether the hour, word `i`, has minutes, or is one of several."""
    before = list(words[:i])
    if before and before[-1] in ("and", "or", "to", "through"):
        before.pop()
        return bool(before) and (before[-1] == "quarter" or _is_number(before[-1]))
    return bool(before) and (before[-1] in ("half", "quarter", "past", "minutes") or _is_number(before[-1]))


def _is_number(word: str) -> bool:
    return word.isdecimal() or word in _HOURS


def _fold(word: str) -> str:
    """In lower case, without accents."""
    if word.isascii():
        return word.lower()
    return "".join(c for c in unicodedata.normalize("NFD", word.lower()) if not unicodedata.combining(c))


def _in_case_of(word: str, mirrored: str) -> str:
    if word.isupper():
        return mirrored.upper()
    return mirrored.capitalize() if word[:1].isupper() else mirrored
