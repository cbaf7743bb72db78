"""The sample set: every expression true of exactly one object, by an interpreter that shares no code with the writer."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from dit_ds.data.annotations.refer import load_refer
from dit_ds.data.directions import mirror_expression
from dit_ds.data.masks import annotation_rle, decode_rle
from dit_ds.data.sample_set.language import expressions
from dit_ds.data.sample_set.write import annotation, scene_of, split_of, write_sample_set
from dit_ds.errors import UserError

SIZES, FILLS = {"small", "big"}, {"solid", "striped", "spotted"}
COLOURS = {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"}


def noun_phrase(words: str, things: list[dict]) -> list[dict]:
    """The things that e.g. "small red star" or "group of blue dots" is true of."""
    kept = list(things)
    for word in words.replace("group of ", "").split():
        if word in SIZES:
            kept = [t for t in kept if t["size"] == word]
        elif word in FILLS:
            kept = [t for t in kept if t["fill"] == word]
        elif word in COLOURS:
            kept = [t for t in kept if t["colour"] == word]
        elif word != "thing":
            kept = [t for t in kept if t["shape"] == word]
    return kept


DIRECTION = {
    "left": lambda t: t["x"], "leftmost": lambda t: t["x"], "right": lambda t: -t["x"], "rightmost": lambda t: -t["x"],
    "top": lambda t: t["y"], "topmost": lambda t: t["y"], "bottom": lambda t: -t["y"], "lowest": lambda t: -t["y"],
}  # fmt: skip
ORDINAL = {"first": 0, "second": 1, "third": 2, "fourth": 3}


def first(things: list[dict], key, nth: int = 0) -> list[dict]:
    ranked = sorted(things, key=key)
    return [ranked[nth]] if nth < len(ranked) else []


def meant(text: str, things: list[dict], width: int, height: int) -> list[dict]:
    """All things that the expression is true of."""
    text = text.removeprefix("the ")
    if m := re.fullmatch(r"(.+?) (?:to the )?(left of|right of|above|below) the (.+)", text):
        anchors = noun_phrase(m[3], things)
        assert len(anchors) == 1, f"'{m[3]}' is true of {len(anchors)}"
        dx, dy = (lambda t: t["x"] - anchors[0]["x"]), (lambda t: t["y"] - anchors[0]["y"])
        along = {"left of": lambda t: -dx(t), "right of": dx, "above": lambda t: -dy(t), "below": dy}[m[2]]
        across = dy if m[2] in ("left of", "right of") else dx
        candidates = [t for t in noun_phrase(m[1], things) if t is not anchors[0]]
        return [t for t in candidates if along(t) > 0 and abs(across(t)) < along(t)]
    if m := re.fullmatch(r"(.+) in the (top|bottom) (left|right) corner", text):
        inside = [t for t in noun_phrase(m[1], things) if (t["y"] < height / 2) == (m[2] == "top")]
        return [t for t in inside if (t["x"] < width / 2) == (m[3] == "left")]
    if m := re.fullmatch(r"(.+) (?:on|at) the (left|right|top|bottom)", text):
        candidates = noun_phrase(m[1], things)
        assert len(candidates) == 2
        return first(candidates, DIRECTION[m[2]])
    if m := re.fullmatch(r"(first|second|third|fourth) (.+) from the (left|right|top|bottom)", text):
        candidates = noun_phrase(m[2], things)
        assert len(candidates) >= 3
        return first(candidates, DIRECTION[m[3]], ORDINAL[m[1]])
    word, _, rest = text.partition(" ")
    if word in DIRECTION:
        return first(noun_phrase(rest, things), DIRECTION[word])
    if word in ("bigger", "biggest", "smaller", "smallest"):
        candidates = noun_phrase(rest, things)
        assert (len(candidates) == 2) == word.endswith("er")
        return first(candidates, lambda t: -t["radius"] if word.startswith("big") else t["radius"])
    return noun_phrase(text, things)


def scenes(count: int = 150):
    for index in range(count):
        scene, rng = scene_of(11, index)
        fields = ("shape", "colour", "fill", "size", "radius", "x", "y")
        things = [{f: getattr(t, f) for f in fields} for t in scene.things]
        texts = {i: expressions(scene, i, rng) for i in range(len(things))}
        yield scene, things, texts


def test_expressions_are_true_of_one_object_also_in_the_mirror():
    seen = 0
    for scene, things, texts in scenes():
        mirrored = [t | {"x": scene.width - t["x"]} for t in things]
        for i, found in texts.items():
            assert len(set(found)) == len(found)
            for text in found:
                assert meant(text, things, scene.width, scene.height) == [things[i]], text
                assert meant(mirror_expression(text), mirrored, scene.width, scene.height) == [mirrored[i]], text
                seen += 1
    assert seen > 2000


def test_every_kind_of_expression_occurs():
    said = " | ".join(t for _, _, texts in scenes(150) for found in texts.values() for t in found)
    for sample in ("left ", " on the right", "leftmost", "corner", " above the ", "to the left of the ", "second ", "bigger ",
                   "smallest ", "striped", "group of "):  # fmt: skip
        assert sample in said, sample


def refers_mask(a: dict, height: int, width: int) -> tuple[np.ndarray, int]:
    """What REFER's own `getMask` makes of a ref's annotation, and its area: polygons go through COCO's API, all else is
    taken as a list of compressed RLE; the masks are summed. A crowd's dict raises KeyError."""
    of = a["segmentation"]
    rles = coco.frPyObjects(of, height, width) if type(of[0]) is list else of
    return coco.decode(rles).sum(axis=2), int(sum(coco.area(rles)))


def test_annotations_are_what_can_be_seen_and_those_of_refs_what_refer_reads():
    kinds = set()
    for scene, things, _ in scenes(80):
        assert 4 <= len(things) <= 9
        for i, referred in ((i, r) for i, t in enumerate(things) for r in {False, t["shape"] == "dots"}):
            a = annotation(scene, i, 1, 1, referred)
            coded = decode_rle(annotation_rle(a, scene.height, scene.width))
            shown = scene.mask(i)
            assert (shown & coded).sum() / (shown | coded).sum() > 0.9
            if a["iscrowd"]:
                assert not referred and isinstance(a["segmentation"]["counts"], list)
                kinds.add("crowd")
                continue
            np.testing.assert_array_equal(refers_mask(a, scene.height, scene.width)[0], coded)
            parts = a["segmentation"]
            kinds.add(("dots " if referred else "") + ("rle" if isinstance(parts[0], dict) else f"{len(parts)} parts"))
    assert {"crowd", "dots rle", "rle", "1 parts", "2 parts"} <= kinds


def test_refers_own_reader_reads_every_ref(refer_tree: Path):
    """As in REFER's files, no ref is to a crowd."""
    refs = pickle.loads((refer_tree / "refcoco/refs(unc).p").read_bytes())
    instances = json.loads((refer_tree / "refcoco/instances.json").read_text())
    annotations, images = ({x["id"]: x for x in instances[k]} for k in ("annotations", "images"))
    assert len(refs) > 100
    for ref in refs:
        a, image = annotations[ref["ann_id"]], images[ref["image_id"]]
        mask, area = refers_mask(a, image["height"], image["width"])
        ours = decode_rle(annotation_rle(a, image["height"], image["width"]))
        np.testing.assert_array_equal(mask, ours)  # no pixel twice, either
        assert area == ours.sum() and abs(area - a["area"]) <= 0.1 * a["area"] and a["iscrowd"] == 0


def test_the_tree_is_refers(refer_tree: Path):
    refs = pickle.loads((refer_tree / "refcoco/refs(unc).p").read_bytes())
    instances = json.loads((refer_tree / "refcoco/instances.json").read_text())
    keys = {"ref_id", "ann_id", "image_id", "category_id", "split", "file_name", "sent_ids", "sentences"}
    images_of = {}
    for ref in refs:
        assert set(ref) == keys and len(ref["sentences"]) >= 3
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        for s in ref["sentences"]:
            assert set(s) == {"raw", "sent", "sent_id", "tokens"} and s["tokens"] == s["sent"].split()
        images_of.setdefault(ref["split"], set()).add(ref["image_id"])
    assert set(images_of) == {"train", "val", "testA", "testB"}
    assert sum(map(len, images_of.values())) == len(set.union(*images_of.values()))
    for image in instances["images"]:
        path = refer_tree / "images/train2014" / image["file_name"]
        assert image["file_name"] == f"COCO_train2014_{image['id']:012d}.jpg"
        assert Image.open(path).size == (image["width"], image["height"])
    tree = load_refer(refer_tree, "refcoco", "unc")
    assert sum(len(r.refs) for rs in tree.splits.values() for r in rs) == len(refs)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    for name, processes in (("a", 1), ("b", 2)):
        write_sample_set(tmp_path / name, images=20, seed=5, processes=processes)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 22
    for f in files:
        assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes(), f
    assert [split_of(i) for i in (0, 15, 16, 17, 18, 19)] == ["train", "train", "val", "val", "testA", "testB"]


def test_a_foreign_dataset_is_left_alone(tmp_path: Path):
    folder = tmp_path / "refcoco"
    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps({"info": {"description": "COCO 2014"}}))
    with pytest.raises(UserError, match="holds another dataset"):
        write_sample_set(tmp_path, images=20)
    with pytest.raises(UserError, match="--images 3"):
        write_sample_set(tmp_path / "x", images=3)
