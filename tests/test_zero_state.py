"""What a rank holds of the training state: covered once by all ranks, under every layout; and its digests."""

from __future__ import annotations

import random

import torch
from conftest import ROOT, warm

from dit_ds.engine import zero_state
from dit_ds.engine.zero_layout import coverage_error
from dit_ds.engine.zero_state import digest


def test_every_layout_is_covered_and_a_renamed_attribute_is_an_error():
    done = warm([str(ROOT / "tests/zero_layouts.py")], timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "." * 16 in done.stdout  # all of them were run


def test_coverage_finds_every_gap_overlap_and_short_end():
    draw = random.Random(0)
    for _ in range(200):
        sizes = {name: draw.randint(1, 30) for name in "abc"}
        ranges = []
        for name, size in sizes.items():
            cuts = sorted({0, size, *(draw.randrange(size) for _ in range(draw.randrange(5)))})
            ranges += [(name, low, high - low) for low, high in zip(cuts, cuts[1:])]
        draw.shuffle(ranges)
        assert coverage_error(sizes, ranges) is None
        i = draw.randrange(len(ranges))
        name, start, numel = ranges[i]
        others = ranges[:i] + ranges[i + 1 :]
        for wrong in (
            [],  # a gap, a short end, or a parameter that is missing
            [ranges[i]] * 2,
            [(name, start, numel + 1)],
            [(name, start, numel - 1)],
            [(name, start + 1, numel)],
            [(name, start - 1, numel + 1)],
            [ranges[i], (name, start, 0)],
            [ranges[i], ("d", 0, 1)],
        ):
            assert coverage_error(sizes, others + wrong) is not None, (sizes, others, wrong)


def test_a_digest_does_not_depend_on_how_a_parameter_is_cut_up(monkeypatch):
    monkeypatch.setattr(zero_state, "_BLOCK", 64)
    x, draw = torch.randn(1000), random.Random(0)
    whole = digest("a", 0, x)
    for _ in range(20):
        cuts = sorted({0, 1000, *(draw.randrange(1000) for _ in range(draw.randrange(9)))})
        assert sum(digest("a", i, x[i:j]) for i, j in zip(cuts, cuts[1:])) % (1 << 64) == whole


def test_a_digest_tells_bits_places_and_names_apart():
    x = torch.randn(300_000)
    whole = digest("a", 0, x)
    assert whole != digest("b", 0, x) and whole != digest("a", 1, x)
    assert digest("a", 0, torch.tensor([0.0])) != digest("a", 0, torch.tensor([-0.0]))
    for i in (0, 1, 32_767, 32_768, 299_999):
        y = x.clone()
        y.view(torch.int32)[i] ^= 1
        assert digest("a", 0, y) != whole
    y = x.clone()
    y[[5, 6]] = x[[6, 5]]
    assert digest("a", 0, y) != whole
    y = x.clone()
    y[:1000], y[32_768:33_768] = x[32_768:33_768], x[:1000]  # at the same places of two blocks
    assert digest("a", 0, y) != whole
