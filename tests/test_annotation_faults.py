"""Every source's records pass the same checks: ids, names, sizes, texts, twice the same; and pickles are data only."""

from __future__ import annotations

import collections
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import dit_ds
from hypothesis import given, settings
from hypothesis import strategies as st
from refer_files import annotation, image, python2_pickle, ref, samples_of, write_images

from dit_ds.data.annotations import published
from dit_ds.data.annotations.combine import load_source
from dit_ds.data.annotations.plain_pickle import load_plain
from dit_ds.data.annotations.refer import load_refer, load_refs
from dit_ds.data.shards.verify import verify_shards
from dit_ds.data.shards.write import LEFT_OUT, shard_refer
from dit_ds.errors import UserError

IMAGES = [image(1), image(2), image(3)]
ANNOTATIONS = [annotation(10, 1), annotation(11, 1), annotation(20, 2), annotation(30, 3), annotation(31, 3)]
REFS = [ref(0, 10, 1, texts=["a", "b"]), ref(1, 11, 1), ref(2, 20, 2, "val"), ref(3, 30, 3, "testA")]


class Files:
    """The annotation files of one set in each form, and a way to damage them."""

    def __init__(self, images: list = IMAGES, annotations: list = ANNOTATIONS, refs: list = REFS):
        self.images, self.annotations, self.refs = copy.deepcopy((images, annotations, refs))

    def refer(self, folder: Path, protocol: int = 2) -> dict[str, Any]:
        """As a REFER tree; what `load_source` takes to read it."""
        (folder / "refcoco").mkdir(parents=True, exist_ok=True)
        (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps(self.refs, protocol))
        instances = {"images": self.images, "annotations": self.annotations}
        (folder / "refcoco/instances.json").write_text(json.dumps(instances))
        return {"refer_root": folder}

    def own(self, folder: Path) -> dict[str, Any]:
        """As a COCO file with expressions."""
        expressions = [{"image_id": r["image_id"], "annotation_ids": [r["ann_id"]], "split": r["split"],
                        "text": [s["raw"] for s in r["sentences"]]} for r in self.refs]  # fmt: skip
        file = {"images": self.images, "annotations": self.annotations, "expressions": expressions}
        (folder / "own.json").write_text(json.dumps(file))
        return {"coco": folder / "own.json"}

    def parquet(self, folder: Path) -> dict[str, Any]:
        """As parquet with a row a ref; the n-th ref has the n-th annotation and the image at its place in `images`."""
        rows = []
        for r, (a, i) in zip(self.refs, ((0, 0), (1, 0), (2, 1), (3, 2))):
            texts = {"raw_anns": json.dumps(self.annotations[a]), "raw_image_info": json.dumps(self.images[i])}
            rows.append(r | texts)
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
        return {"parquet": folder}

    def refusal(self, write: Callable[[Path], dict[str, Any]], folder: Path) -> str:
        """The one line that reading them ends with."""
        with pytest.raises(UserError) as e:
            load_source("refcoco", **write(folder))
        line = str(e.value)
        assert len(line.splitlines()) == 1 and len(line) < 400 + len(str(folder)) and line.isprintable()
        return line


def set_image(**changes: Any) -> Callable[[Files], None]:
    return lambda f: f.images[1].update(changes)


def set_annotation(**changes: Any) -> Callable[[Files], None]:
    return lambda f: f.annotations[2].update(changes)


def set_ref(**changes: Any) -> Callable[[Files], None]:
    return lambda f: f.refs[2].update(changes)


def set_sentence(**changes: Any) -> Callable[[Files], None]:
    return lambda f: f.refs[2]["sentences"][0].update(changes)


# of the COCO tables: each in a REFER tree, an own set and parquet
TABLES = {
    "image ids must be whole numbers": [set_image(id=x) for x in ("2", -2, 2.0, None, True, 2**63, [2])],
    "a file_name must be a string": [set_image(file_name=x) for x in (None, 5, "", "a\0.jpg", "a\n.jpg", "\ud83d", ["a"])],
    "leads out of the folder of images": [set_image(file_name=x) for x in ("/etc/a.jpg", "../a.jpg", "a/../../b.jpg")],
    "its height must be a whole number": [set_image(height=x) for x in (None, "20", 0, -20, 20.5, float("nan"), True)],
    "its width must be a whole number": [set_image(width=x) for x in (float("inf"), 10**400, [30])],
    "annotation ids must be whole numbers": [set_annotation(id=x) for x in ("20", -20, 20.0, True)],
    "its iscrowd must be 0 or 1": [set_annotation(iscrowd=x) for x in ("0", 2, [])],
    "its area must be a number": [set_annotation(area=x) for x in ("56", float("nan"), {})],
    "its bbox must be a list of numbers": [set_annotation(bbox=x) for x in ("56", [1, None], 5)],
    "its category_id must be": [set_annotation(category_id=x) for x in ([1], "\ud83d")],
    "have the same id": [set_image(id=1), lambda f: f.images.insert(1, image(1, "b.jpg")),
                         set_annotation(id=10, image_id=1, area=3)],
}  # fmt: skip
CASES = [(says, change) for says, changes in TABLES.items() for change in changes]


@pytest.mark.parametrize("form", ["refer", "own", "parquet"])
def test_a_fault_of_the_tables_is_one_line_whatever_the_form(tmp_path, form):
    for n, (says, change) in enumerate(CASES):
        files = Files()
        change(files)
        if form == "parquet" and "id" in says:
            says += "|comes with annotation"  # another one than the row's ref names
        folder = tmp_path / str(n)
        folder.mkdir()
        line = files.refusal(getattr(files, form), folder)
        assert any(s in line for s in says.split("|")) and str(folder) in line, (says, line)


REFERS = {
    "ref ids must be whole numbers": [set_ref(ref_id=x) for x in ("2", -2, 2.0, None, True, (2,), np.float64(2))],
    "ref 1 is there twice": [set_ref(ref_id=1), set_ref(ref_id=np.int64(1)), lambda f: f.refs.append(f.refs[1])],
    "its image_id is": [set_ref(image_id=x) for x in ("2", 2.0, None, [2], {})],
    "its annotation id is": [set_ref(ann_id=x) for x in ("20", 20.0, None, [[20]], {}, [20, None])],
    "ref 2: image 7 is not in": [set_ref(image_id=7)],
    "ref 2: annotation -1 is not in": [set_ref(ann_id=-1)],
    "ref 2 has no annotation": [set_ref(ann_id=[]), set_ref(ann_id=())],
    "can't name files": [set_ref(split=x) for x in (None, 5, "", "a/b", "..", "val\n", "x" * 300, b"val", "\ud83d")],
    "its sentences must be a list": [set_ref(sentences=x) for x in (None, "a cat", ["a cat"], {"a": 1})],
    "sentence ids must be whole numbers": [set_sentence(sent_id=x) for x in ("20", -1, None, 2.0)],
    "has the id of one of ref": [set_sentence(sent_id=10), lambda f: f.refs[0]["sentences"][1].update(sent_id=0)],
    "its text must be a string": [set_sentence(raw=x) for x in (None, 5, ["a"])] + [set_sentence(sent=None)],
    "its text has half a character": [set_sentence(sent="a \ud83d dog")],
    "has no 'split'": [lambda f: f.refs[2].pop("split")],
    "does not hold a list of refs": [lambda f: setattr(f, "refs", {"a": f.refs}), lambda f: f.refs.append(5)],
}  # fmt: skip


@pytest.mark.parametrize("says", list(REFERS))
def test_a_fault_of_the_refs_is_one_line(tmp_path, says):
    for n, change in enumerate(REFERS[says]):
        files = Files()
        change(files)
        assert says in files.refusal(files.refer, tmp_path / str(n))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpys_numbers_ordered_dicts_and_tuples_are_data(tmp_path, protocol):
    files = Files()
    plain = load_source("refcoco", **files.refer(tmp_path / "plain"))
    for r in files.refs:
        for key in ("ref_id", "image_id"):
            r[key] = np.int32(r[key])
        r |= {"ann_id": np.array([r["ann_id"]]), "split": np.str_(r["split"]), "bbox": np.zeros((2, 2), np.float32)}
        r["sentences"] = tuple(collections.OrderedDict(s, sent_id=np.uint16(s["sent_id"])) for s in r["sentences"])
    files.refs = tuple(collections.defaultdict(list, r) for r in files.refs)
    assert load_source("refcoco", **files.refer(tmp_path / "numpy", protocol)).splits == plain.splits


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5))  # fmt: skip
NUMPY = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(np.int64), st.integers(0, 255).map(np.uint8), st.floats(allow_nan=False).map(np.float64),
    st.booleans().map(np.bool_), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5).map(np.str_),
)  # fmt: skip
VALUES = st.recursive(
    PLAIN | NUMPY,
    lambda x: st.one_of(st.lists(x, max_size=3), st.tuples(x, x), st.dictionaries(st.text(max_size=3), x, max_size=3),
                        st.dictionaries(st.text(max_size=3), x, max_size=3).map(collections.OrderedDict)),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_data_in_a_pickle_comes_as_it_is_and_plain(value, protocol):
    got = load_plain(pickle.dumps(value, protocol))
    assert got == value

    def is_plain(x: Any) -> bool:
        if isinstance(x, dict):
            return type(x) is dict and all(map(is_plain, x.values()))
        return all(map(is_plain, x)) if isinstance(x, (list, tuple)) else type(x).__module__ == "builtins"

    assert is_plain(got)


class Calls:
    """Pickled so that reading it calls something."""

    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce__(self) -> tuple:
        return self.reduced


def test_no_name_of_a_pickle_runs_or_changes_anything(tmp_path):
    mark = tmp_path / "ran"
    bombs = [
        Calls(Path.touch, (mark,)), Calls(eval, (f"open({str(mark)!r}, 'w')",)), Calls(getattr, ({}, "clear")),
        Calls(np.load, (str(mark),)), Calls(np.fromfile, (str(mark),)), Calls(int, ("5",)), Calls(str, (5,)),
        Calls(collections.namedtuple, ("a", "b")), Calls(bytearray, (10**12,)), Calls(np.zeros, (10**12,)),
    ]  # fmt: skip
    for bomb in bombs:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(pickle.UnpicklingError):
                load_plain(pickle.dumps([bomb], protocol))
    # BUILD on what a name stands for: sets its attributes, if it lets them be set
    for state in (b"}X\x01\x00\x00\x00aK\x01s", b"(NX\x0c\x00\x00\x00__defaults__)st"):
        for name in (b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"c__builtin__\nlist\n"):
            with pytest.raises(Exception):  # noqa: B017
                load_plain(b"\x80\x02" + name + state + b"b.")
    assert not mark.exists() and load_plain(pickle.dumps(collections.OrderedDict(a=1))) == {"a": 1}
    # an empty array whose shape would ask for a billion lists
    shape = np.zeros((10**9, 0), np.int8)
    assert load_plain(pickle.dumps(shape)) == []


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_data_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any_bytes.p"
    path.write_bytes(data)
    try:
        load_refs(path)
    except UserError as e:
        assert len(str(e).splitlines()) == 1


WRONG = st.one_of(
    st.none(), st.text(max_size=3), st.floats(), st.lists(st.integers(), max_size=2), st.booleans(), st.just({})
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_value_of_another_type_is_refused_or_harmless(tmp_path_factory, data):
    """In any field that is read; those that are not may hold anything."""
    folder = tmp_path_factory.mktemp("wrong")
    files = Files()
    table = data.draw(st.sampled_from(["images", "annotations", "refs"]))
    keys = {"images": ["id", "file_name", "height", "width"], "annotations": ["id", "iscrowd", "area", "bbox"],
            "refs": ["ref_id", "ann_id", "image_id", "split", "sentences"]}  # fmt: skip
    entry, key = data.draw(st.sampled_from(getattr(files, table)[:3])), data.draw(st.sampled_from(keys[table]))
    entry[key] = data.draw(WRONG)
    try:
        tree = load_source("refcoco", **files.refer(folder))
    except UserError as e:
        assert len(str(e).splitlines()) == 1
        return
    for record in (r for records in tree.splits.values() for r in records):
        assert all(type(r["ref_id"]) is int for r in record.refs) and type(record.image["id"]) is int
        assert isinstance(record.image["file_name"], str) and record.image["height"] >= 1
        json.dumps(record.refs, ensure_ascii=False).encode()


def test_what_is_not_read_may_be_anything(tmp_path):
    files = Files()
    for i in files.images:
        i |= {"id2": None, "flickr_url": ["?"], "file_name2": {"a": 1}}
    for r in files.refs:
        r |= {"file_name": None, "category_id": None, "sent_ids": None}
    files.annotations.append({"id": 99, "image_id": "none", "segmentation": "none"})  # that no ref names
    assert (
        load_source("refcoco", **files.refer(tmp_path)).splits
        == load_source("refcoco", **Files().refer(tmp_path / "b")).splits
    )


def test_two_unread_annotations_of_one_id_are_named(tmp_path):
    files = Files()
    files.annotations.append(annotation(31, 2))
    assert "two of its annotations have the same id, 31" in files.refusal(files.refer, tmp_path)


def test_combined_sets_are_checked_one_by_one(tmp_path):
    files = Files()
    files.refer(tmp_path)
    (tmp_path / "refcoco").rename(tmp_path / "refcoco+")
    files.refs[2]["ref_id"] = 1
    files.refer(tmp_path)
    with pytest.raises(UserError, match=r"refcoco/refs\(unc\).p: ref 1 is there twice"):
        load_source("refcoco+,refcoco", refer_root=tmp_path)


def test_a_published_set_keeps_its_faults_that_nobody_can_mend(tmp_path, monkeypatch, caplog):
    """RefCOCO has 142,209 expressions in some counts and 142,210 in others: an id may be there twice."""
    files = Files()
    files.refs[1]["sentences"][0]["sent_id"] = 0
    files.annotations[0]["segmentation"] += [[1, 2, 3, 4], [], [1.0] * 7]
    source = files.refer(tmp_path)
    pictures = write_images(tmp_path / "images", IMAGES)
    with pytest.raises(UserError, match="ref 1: its sentence 0 has the id of one of ref 0"):
        shard_refer(tmp_path, pictures, "refcoco", "unc", tmp_path / "out", processes=1)
    counts = {s: {"refs": published.Figure(n, True)} for s, n in (("train", 2), ("val", 1), ("testA", 1))}
    monkeypatch.setitem(published.OFFICIAL, ("refcoco", "unc"), counts)
    assert load_source("refcoco", **source).published
    shard_refer(tmp_path, pictures, "refcoco", "unc", tmp_path / "out", processes=1)
    assert "3 parts of 1 annotations are no polygons" in caplog.text and "annotation 10" in caplog.text
    anns = samples_of(tmp_path / "out/refcoco/unc")[1]["anns"]
    assert anns["10"]["rle"] == anns["11"]["rle"]


def test_skip_bad_names_what_it_leaves_out(tmp_path):
    files = Files()
    files.annotations[0]["segmentation"] = []
    files.refs[1]["sentences"] = [{"sent_id": 5, "raw": "?", "sent": ""}, {"sent_id": 6, "raw": "a", "sent": "a"}]
    files.refer(tmp_path)
    pictures = write_images(tmp_path / "images", IMAGES)
    (pictures / IMAGES[2]["file_name"]).write_bytes(b"none")
    command = ["data", "shard", "--refer-root", tmp_path, "--images", pictures, "--out", tmp_path / "out"]
    done = dit_ds(*command, "--skip-bad", "--json")
    assert json.loads(done.stdout)["train"]["dropped"] == {"images": 0, "refs": 1, "sentences": 1}
    folder = tmp_path / "out/refcoco/unc"
    lines = (folder / LEFT_OUT).read_text().splitlines()
    assert len(lines) == 3 and all(f"left out: {line}" in done.stderr for line in lines)
    assert any("ref 0: annotation 10" in x for x in lines) and any("ref 1: sentence 5 is empty" in x for x in lines)
    assert any(IMAGES[2]["file_name"] in x for x in lines) and "3 records left out" in done.stderr
    assert not [e for e in verify_shards(folder, 1)["errors"] if "published" not in e and "no split" not in e]
    Files().refer(tmp_path)
    write_images(pictures, IMAGES)
    dit_ds(*command, "--overwrite")
    assert not (folder / LEFT_OUT).exists()


def test_python_2_is_read_as_before(tmp_path):
    files = Files()
    files.refer(tmp_path)
    (tmp_path / "refcoco/refs(unc).p").write_bytes(python2_pickle(files.refs))
    assert load_refer(tmp_path, "refcoco", "unc").splits == load_source("refcoco", **files.refer(tmp_path)).splits
