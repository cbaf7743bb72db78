"""The digest that tells whether weights and states are the ones that were saved."""

from __future__ import annotations

import random

import torch

from dit_ds.engine import zero_state as fragments
from dit_ds.engine.zero_state import digest


def test_a_digest_does_not_depend_on_how_a_parameter_is_cut_up(monkeypatch):
    monkeypatch.setattr(fragments, "_BLOCK", 64)
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
