"""What `data stats` says of a split, against plain Python."""

from __future__ import annotations

import statistics
import tarfile
from collections import Counter

import pytest
from conftest import dit_ds, read_samples, refused
from PIL import Image
from pycocotools import mask as coco

from dit_ds.cli.entry import main
from dit_ds.data.stats import split_stats
from dit_ds.errors import UserError
from dit_ds.visualize.figures import draw_sheet


def test_statistics_are_those_of_the_samples(shards):
    folder = shards / "refcoco/unc"
    metas = [m for p in sorted(folder.glob("train-*.tar")) for _, m in read_samples(p).values()]
    refs = [(m, r) for m in metas for r in m["refs"]]
    texts = [s["sent"] for _, r in refs for s in r["sentences"]]
    areas = [int(coco.area(m["anns"][str(r["ann_ids"][0])]["rle"])) for m, r in refs]
    found = split_stats(folder, "train", 1)
    lengths = [len(t.split()) for t in texts]
    words = found["words_per_expression"]
    assert (found["images"], found["refs"], found["expressions"]) == (len(metas), len(refs), len(texts))
    assert words["mean"] == pytest.approx(statistics.mean(lengths)) and words["max"] == max(lengths)
    assert words["median"] == statistics.median(lengths)
    assert words["histogram"] == {str(k): n for k, n in sorted(Counter(lengths).items())}
    assert found["mask_sizes"]["small"] == pytest.approx(sum(a < 1024 for a in areas) / len(areas))
    assert found["mask_sizes"]["large"] == pytest.approx(sum(a >= 9216 for a in areas) / len(areas))
    shares = [a / (m["height"] * m["width"]) for a, (m, _) in zip(areas, refs)]
    assert found["mask_share"]["p50"] == pytest.approx(statistics.median(shares))
    common = Counter(w for t in texts for w in t.split())
    assert all(common[w] == n for w, n in found["frequent_words"])
    assert found["frequent_words"][0][1] == max(common.values())
    sided = [t for t in texts if any(w.startswith(("left", "right")) for w in t.split())]
    assert found["left_right_share"] == pytest.approx(len(sided) / len(texts)) and sided
    assert sum(s["images"] for s in found["image_sizes"]) == len(metas)
    assert found == split_stats(folder, "train", 3)


def test_a_sheet_is_drawn_by_its_seed(folder, tmp_path):
    sheets = [tmp_path / f"{n}.png" for n in range(3)]
    for sheet, seed in zip(sheets, (0, 0, 1)):
        draw_sheet(folder, "train", sheet, seed)
    with Image.open(sheets[0]) as image:
        assert image.format == "PNG" and min(image.size) > 600
    assert sheets[0].read_bytes() == sheets[1].read_bytes() != sheets[2].read_bytes()


def test_statistics_of_what_cannot_be_read(folder, capsys, refusal):
    assert main(["data", "stats", str(folder), "--split", "val"]) == 0
    assert "val: 4 images, 12 refs (0 without target), 48 expressions" in capsys.readouterr().out
    assert "no split 'dev'" in refusal("data", "stats", folder, "--split", "dev")
    assert "is no picture's name" in refusal("data", "stats", folder, "--sheet", folder / "x.gif")
    path = folder / "val-00000-of-00001.tar"
    with tarfile.open(path) as tar:
        at = tar.getmembers()[1].offset_data
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert "json is damaged" in refusal("data", "stats", folder, "--split", "val")
    with pytest.raises(UserError, match="json is damaged"):
        split_stats(folder, "val", 2)
    assert "no manifest" in refused(dit_ds("data", "stats", folder / "none", check=None))
