"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from dit_ds.evaluation.metrics import intersection_and_union, summarize


def test_intersection_and_union():
    a, b = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    a[0:2, 0:4] = True  # 8 pixels
    b[1:3, 2:6] = True  # 8 pixels, 2 shared
    assert intersection_and_union(a, b) == (2, 14)
    assert intersection_and_union(a, ~a) == (0, 24)


def test_summarize():
    # IoUs 0.5, 0.9, 0.75, 0
    metrics = summarize(np.array([50, 90, 300, 0]), np.array([100, 100, 400, 50]))
    assert metrics["oiou"] == pytest.approx(440 / 650)
    assert metrics["miou"] == pytest.approx((0.5 + 0.9 + 0.75) / 4)
    # strictly above: 0.5 is not above 0.5, 0.9 not above 0.9
    assert [metrics[f"p@{x}"] for x in (0.5, 0.6, 0.7, 0.8, 0.9)] == [0.5, 0.5, 0.5, 0.25, 0.0]


def test_an_empty_union_counts_as_zero():
    assert summarize(np.array([0, 10]), np.array([0, 10]))["miou"] == 0.5
