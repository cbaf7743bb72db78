"""Damaged sets: each damage is found, and no sample is silently wrong."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

from dit_ds.data.loading.index import SplitIndex

sys.path.append(str(ROOT / "benchmarks"))

import mutations


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_damage_is_found_and_none_is_silent(tmp_path, times):
    result = mutations.run(times * len(mutations.DAMAGES), 7, tmp_path, images=40)
    assert result["missed"] == []
    total = result["total"]
    assert total["damages"] == total["found_by_verify"] == times * len(mutations.DAMAGES)
    for reader in mutations.READERS:
        assert total[reader]["stopped"] and total[reader]["bad samples named"] and total[reader]["identical"]


@pytest.mark.parametrize("check", ["check", "parse"])
def test_without_a_check_it_would_be_seen(tmp_path, monkeypatch, check):
    """The script compares for real: with the CRC or the refs unchecked, it reports samples that are silently wrong."""
    if check == "check":
        monkeypatch.setattr(SplitIndex, "check", lambda self, image, member, data: data)
        kinds = ["bytes flipped in a tar", "samples swapped in a tar"]
    else:
        monkeypatch.setattr(SplitIndex, "parse", lambda self, image, data: mutations.json.loads(data))
        kinds = ["manifest sealed again: a number, sums agree"]
    monkeypatch.setattr(mutations, "DAMAGES", {k: mutations.DAMAGES[k] for k in kinds})
    total = mutations.run(4, 7, tmp_path, images=40)["total"]
    assert all(total[r]["silently wrong"] + total[r]["traceback"] > 0 for r in mutations.READERS)
