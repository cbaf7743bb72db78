"""Every number of every command has a range that is checked before the command runs: a walk over the parser itself."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_ds.cli.arguments import Coordinates, Number, Several, names
from dit_ds.cli.entry import main, make_parser
from dit_ds.errors import UserError

_TEXTS = {None, str, names}  # types of arguments that are no numbers


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list]]:
    """Each command and its arguments."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups or parser.get_default("run"):  # some groups are commands themselves
        yield words, [a for a in parser._actions if a not in groups]
    for group in groups:
        for name, below in group.choices.items():
            yield from commands(below, (*words, name))


COMMANDS = dict(commands(make_parser()))
NUMBERS = {
    (*words, action.option_strings[0]): action
    for words, actions in COMMANDS.items()
    for action in actions
    if hasattr(action.type, "number")
}


def test_the_walk_finds_every_command():
    assert len(COMMANDS) > 15 and len(NUMBERS) > 35
    assert {("eval", "--threshold"), ("data", "stats", "--seed"), ("memory", "plan", "--gpus")} <= NUMBERS.keys()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_argument_is_a_number_without_a_range(words):
    """A new option that is read as `int` or `float`, or by a function of its own, is refused here."""
    for action in COMMANDS[words]:
        said = f"{' '.join(words)} {action.dest}: give it a type of dit_ds/cli/arguments.py"
        if hasattr(action.type, "number"):
            number = action.type.number
            assert isinstance(number, Number) and math.isfinite(number.least) and number.least < number.most, said
            assert math.isfinite(number.most) and number.kind in (int, float), said
        else:
            assert action.type in _TEXTS, said
            assert isinstance(action.default, bool) or not isinstance(action.default, (int, float, list)) or (
                action.default == [] and action.type is None
            ), said  # fmt: skip


def read(option: tuple[str, ...], text: str) -> object:
    """What the parser reads for an option of a command, whose other arguments are made up; nothing runs."""
    *words, name = option
    rest: list[str] = []
    for action in COMMANDS[tuple(words)]:
        if action.required and not action.option_strings:
            rest.append("x")
        elif action.required and name not in action.option_strings:
            rest += [action.option_strings[0], "1" if hasattr(action.type, "number") else "x"]
    if tuple(words) == ("data", "shard"):
        rest += ["--coco", "x"]
    arguments, _ = make_parser().parse_known_args([*words, *rest, f"{name}={text}"])
    return getattr(arguments, NUMBERS[option].dest)


def written(option: tuple[str, ...], number: str) -> str:
    """The number as this option takes it: alone, or in a list."""
    kind = NUMBERS[option].type
    if isinstance(kind, Coordinates):
        return ",".join([number] * len(kind.names.split(",")))
    return {"Number": "{}", "Several": "1,{}", "ShardCounts": "train={}"}[type(kind).__name__].format(number)


def inside(number: Number, value: float) -> bool:
    low = value > number.least if number.above else value >= number.least
    return low and (value < number.most if number.below else value <= number.most)


texts = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.floats(-1, 2).map(repr),
    st.sampled_from(
        ["nan", "-nan", "inf", "-inf", "1e400", "-0.0", "", " ", "x", "1,5x", "0x10", "9" * 5000, "35", "1"]
    ),
    st.text(max_size=5),
)


@given(st.sampled_from(sorted(NUMBERS)), texts)
def test_what_is_outside_is_refused_in_a_line_that_names_the_option(option, text):
    number = NUMBERS[option].type.number
    try:
        value = number.kind(text)
        fits = inside(number, value)
    except ValueError:
        fits = False
    if not fits and not (set(text) & set(",=")):
        with pytest.raises(UserError) as refused:
            read(option, written(option, text))
        assert option[-1] in str(refused.value)
    elif fits:
        got = read(option, written(option, text))
        flat = got.values() if isinstance(got, dict) else got if isinstance(got, (list, tuple)) else [got]
        assert all(type(x) is number.kind and inside(number, x) for x in _flat(flat))


def _flat(values) -> Iterator[float]:
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from _flat(x)
        else:
            yield x


@pytest.mark.parametrize("option", sorted(NUMBERS), ids=" ".join)
def test_the_ends_of_each_range(option):
    number = NUMBERS[option].type.number
    for end, is_open, outwards in ((number.least, number.above, -1), (number.most, number.below, 1)):
        beyond = end + outwards if number.kind is int else math.nextafter(end, outwards * math.inf)
        for value, fits in ((end, not is_open), (beyond, False)):
            text = written(option, str(value) if number.kind is int else repr(float(value)))
            if fits:
                read(option, text)
            else:
                with pytest.raises(UserError, match="from|above|does not read"):
                    read(option, text)
    default = NUMBERS[option].default
    assert default in (None, []) or all(inside(number, x) for x in _flat([default]))


def test_refusals_are_one_line_and_status_2(capsys):
    for arguments, says in [
        (["eval", "x", "--threshold=nan"], "argument --threshold: 'nan' is not a number above 0 and below 1"),
        (["eval", "x", "--batch-size=-1"], "argument --batch-size: '-1' is not a whole number from 1 to 2147483647"),
        (["scaling", "--config", "c", "--nodes", "1,0"], "does not read NUMBER,NUMBER,.. as in 1,4,12"),
        (["data", "shard", "--coco", "c", "--images", "i", "--shards", "train"], "does not read SPLIT=NUMBER"),
        (["doctor", "--timeout", "0"], "'0' is not a number of seconds above 0, up to 3600"),
        (["frobnicate"], "invalid choice"),
        (["eval"], "required"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and error.startswith("dit-ds: error: "), error
    assert Several(Number(int, 0, 5))("1,4") == [1, 4]
