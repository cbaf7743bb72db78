"""`data verify` and `data stats`: each check fires where a set is wrong in just that way, and only there."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import read_samples
from pycocotools import mask as coco
from webdataset import TarWriter

from dit_ds.cli.entry import main
from dit_ds.data.masks import run_lengths
from dit_ds.data.shards import published_counts as official
from dit_ds.data.shards.manifest import COUNTS, read_members, write_manifest
from dit_ds.data.shards.verify import verify_shards
from dit_ds.files import sha256_of


def edit_manifest(folder: Path, change) -> None:
    """Change the manifest and make its checksum match."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder / "manifest.json", manifest)


def edit_samples(folder: Path, change, split: str = "train", only_manifest: bool = False) -> None:
    """Change the first shard's samples, and write tar and manifest as if they had been so from the start."""

    def publish(manifest):
        entry = manifest["splits"][split]["shards"][0]
        path = folder / entry["name"]
        if not only_manifest:
            samples = read_samples(path)
            change(samples)
            with TarWriter(str(path), mtime=0, encoder=False) as tar:
                for key, (jpg, meta) in samples.items():
                    tar.write({"__key__": key, "jpg": jpg, "json": json.dumps(meta).encode()})
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path), "samples": read_members(path)}
        lengths = [n for s in entry["samples"] for n in s[7]]
        entry |= {"images": len(entry["samples"]), "refs": len(lengths), "sentences": sum(lengths)}
        whole = manifest["splits"][split]
        if not only_manifest:
            entry["no_target"] = sum(bool(r.get("no_target")) for _, m in samples.values() for r in m.get("refs", []))
        whole |= {k: sum(e[k] for e in whole["shards"]) for k in (*COUNTS, "no_target")}

    edit_manifest(folder, publish)


def first(samples: dict) -> dict:
    """The first sample's JSON."""
    return next(iter(samples.values()))[1]


def other_ref(samples):  # a second ref with the first one's number
    refs = first(samples)["refs"]
    refs[1]["ref_id"] = refs[0]["ref_id"]


def other_sentence(samples):
    sentences = first(samples)["refs"][0]["sentences"]
    sentences[1]["sent_id"] = sentences[0]["sent_id"]


def broken_rle(samples):
    annotation(samples)["rle"]["counts"] += "1"


def resized_picture(samples):
    sample = next(iter(samples.values()))
    sample[0] = simplejpeg.encode_jpeg(np.zeros((32, 48, 3), np.uint8))


def no_picture(samples):
    next(iter(samples.values()))[0] = b"no JPEG"


def annotation(samples) -> dict:
    return next(iter(first(samples)["anns"].values()))


def empty_mask(samples):
    rle = annotation(samples)["rle"]
    rle["counts"] = coco.encode(np.zeros(rle["size"], np.uint8, order="F"))["counts"].decode()


SAMPLES = {
    "split is 'val', not 'train'": lambda s: first(s).update(split="val"),
    "dataset is 'refcocog', not 'refcoco'": lambda s: first(s).update(dataset="refcocog"),
    "image_id is 5, not": lambda s: first(s).update(image_id=5),
    "schema is 1, not 2": lambda s: first(s).update(schema=1),
    "its picture is 48x32, its JSON says": resized_picture,
    "its picture can't be read": no_picture,
    "is not among its annotations": lambda s: first(s)["anns"].popitem(),
    "has no target, yet annotation": lambda s: first(s)["refs"][0].update(no_target=True),
    "is not marked as without target": lambda s: first(s)["refs"][0].update(ann_ids=[]),
    "'s mask is [3, 4], its picture": lambda s: annotation(s)["rle"].update(size=[3, 4]),
    "its mask's runs don't fill": broken_rle,
    "its mask is no compressed RLE": lambda s: annotation(s)["rle"].update(counts="~~"),
    "'s mask is empty": empty_mask,
    " is empty: remove": lambda s: first(s)["refs"][0]["sentences"][0].update(sent=" "),
    "not of the schema (KeyError: 'height')": lambda s: first(s).pop("height"),
    "not of the schema (TypeError: an id is [1])": lambda s: first(s)["refs"][0].update(ref_id=[1]),
}


@pytest.mark.parametrize("says", list(SAMPLES))
def test_each_sample_check_names_its_sample(folder, says):
    edit_samples(folder, SAMPLES[says])
    key = next(iter(read_samples(folder / "train-00000-of-00004.tar")))
    found = verify_shards(folder, 1)
    assert not found["ok"] and len(found["errors"]) == 1, found["errors"]
    assert says in found["errors"][0] and key in found["errors"][0] and "shard the dataset again" in found["errors"][0]


@pytest.mark.parametrize(
    ("change", "says"), [(other_ref, "split train: ref"), (other_sentence, "split train: sentence")]
)
def test_ids_are_unique_in_a_split(folder, change, says):
    edit_samples(folder, change)
    (error,) = verify_shards(folder, 1)["errors"]
    assert error.startswith(says) and "of refcoco is there more than once" in error


def test_refs_of_several_datasets_have_ids_of_their_own(folder):
    def two_datasets(samples):
        refs = first(samples)["refs"]
        refs[1] |= {"ref_id": refs[0]["ref_id"], "dataset": "refcoco+"}
        refs[1]["sentences"][0]["sent_id"] = refs[0]["sentences"][0]["sent_id"]
        meta = first(samples)  # ann ids may be strings
        meta["anns"] = {f"refcoco+ {k}" if k == str(refs[1]["ann_ids"][0]) else k: v for k, v in meta["anns"].items()}
        refs[1]["ann_ids"] = [f"refcoco+ {refs[1]['ann_ids'][0]}"]

    edit_samples(folder, two_datasets)
    assert verify_shards(folder, 1)["errors"] == []


def test_no_targets_are_counted_and_compared_with_the_manifest(folder):
    def no_target(samples):
        first(samples)["refs"][0] |= {"ann_ids": [], "no_target": True}

    edit_samples(folder, no_target)
    edit_manifest(folder, lambda m: m["splits"]["train"].update(no_target=1))
    found = verify_shards(folder, 1)
    assert found["ok"] and found["counts"]["train"]["no_target"] == 1
    edit_manifest(folder, lambda m: m["splits"]["train"].update(no_target=2))
    (error,) = verify_shards(folder, 1)["errors"]
    assert "has 1 refs without target, the manifest says 2" in error


def test_an_area_that_drawing_does_not_explain_is_a_warning(folder):
    ann = {}

    def half(samples):
        ann.update(annotation(samples))
        annotation(samples)["area"] = ann["area"] / 2

    edit_samples(folder, half)
    found = verify_shards(folder, 1)
    assert found["ok"] and len(found["warnings"]) == 1 and found["counts"]["train"]["area_differs"] == 1
    assert f"({coco.area(ann['rle'])} pixels, area {ann['area'] / 2:.0f})" in found["warnings"][0]
    # as COCO's area of the polygon differs from the pixels': by less than its outline is long
    edit_samples(folder, lambda s: annotation(s).update(area=ann["area"] + 0.5 * np.sqrt(ann["area"])))
    assert verify_shards(folder, 1)["warnings"] == []


def test_splits_that_share_an_image(folder):
    name = "train-00000-of-00004.tar"
    moved = next(iter(read_samples(folder / name).items()))
    val = json.loads(json.dumps(moved[1][1])) | {"split": "val"}
    edit_samples(folder, lambda s: s.update({moved[0]: [moved[1][0], val]}), "val")
    found = verify_shards(folder, 1)
    (error,) = found["errors"]
    assert "splits train and val share 1 images" in error or "splits val and train share 1 images" in error
    assert moved[0] in error and found["counts"]["val"]["shared_images"] == {"train": 1}


def test_googles_splits_share_images_by_design():
    assert official.shared_images_severity("refcocog", "google", ("train", "val")) == "design"
    assert official.shared_images_severity("refcocog", "umd", ("train", "val")) == "error"
    assert official.shared_images_severity("refclef", "unc", ("train", "testA")) == "error"
    assert official.shared_images_severity("refclef", "unc", ("testA", "testC")) == "warning"


def rewrite_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_members_that_are_not_the_samples(folder):
    """The tar's bytes are those of the manifest's SHA-256, but not its members' names."""
    path = folder / "val-00000-of-00001.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    rewrite_tar(path, [("000000000007.png", members[0][1]), *members[1:]])
    entry = {"sha256": sha256_of(path)}
    edit_manifest(folder, lambda m: m["splits"]["val"]["shards"][0].update(entry))
    errors = verify_shards(folder, 1)["errors"]
    assert len(errors) == 2 and all("val-00000" in e for e in errors)
    assert f"lacks {members[0][0]}" in errors[0] and "has besides its samples 000000000007.png" in errors[1]


def test_a_tar_that_does_not_end(folder):
    path = folder / "val-00000-of-00001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    edit_manifest(folder, lambda m: m["splits"]["val"]["shards"][0].update(sha256=sha256_of(path)))
    (error,) = verify_shards(folder, 1)["errors"]
    assert "does not end in empty blocks" in error


def moved_sample(m):
    samples = m["splits"]["train"]["shards"][0]["samples"]
    samples[0], samples[1] = samples[1], samples[0]


MANIFESTS = {
    "its samples have 8 images, the manifest says 9": lambda m: m["splits"]["train"]["shards"][0].update(images=9),
    "split val: its shards have 12 refs, the manifest says 13": lambda m: m["splits"]["val"].update(refs=13),
    "leave gaps or overlap": moved_sample,
    "have other CRC-32": lambda m: m["splits"]["val"]["shards"][0]["samples"][0].__setitem__(3, 1),
    "does not have the manifest's SHA-256 (outside": lambda m: m["splits"]["val"]["shards"][0].update(sha256="0" * 64),
}


@pytest.mark.parametrize("says", list(MANIFESTS))
def test_each_check_of_the_manifest(folder, says):
    edit_manifest(folder, MANIFESTS[says])
    errors = verify_shards(folder, 1)["errors"]
    assert any(says in e for e in errors) and len(errors) <= 2, errors  # swapped rows end elsewhere, too


def test_a_damaged_manifest_is_refused_in_one_line(folder, refusal):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for data in (whole.replace(b"\n", b"\r\n"), whole.replace(b"refcoco", b"ref\xed\xa0\x80", 1), whole[:-300], b""):
        path.write_bytes(data)
        assert "manifest" in refusal("data", "verify", folder)
    path.write_bytes(whole)
    edit_manifest(folder, lambda m: m["splits"]["train"].pop("shards"))
    assert "(it has no 'shards'): remove it and shard the dataset again" in refusal("data", "verify", folder)


def test_a_stray_tar_is_an_error_and_processes_change_nothing(folder):
    shutil.copy(folder / "val-00000-of-00001.tar", folder / "val-00001-of-00002.tar")
    edit_samples(folder, other_ref)
    (folder / "testA-00000-of-00001.tar").write_bytes(b"")
    alone = verify_shards(folder, 1)
    assert alone == verify_shards(folder, 3)
    assert any("val-00001-of-00002.tar is none of the manifest's shards" in e for e in alone["errors"])
    assert len(alone["errors"]) == 3 and "has 0 bytes" in alone["errors"][0]


def test_the_report_for_people_and_the_status(folder, capsys):
    assert main(["data", "verify", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "ok" and "train: 32 images, 96 refs" in "\n".join(printed)
    edit_samples(folder, other_ref)
    assert main(["data", "verify", str(folder)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "1 errors" and printed[-2].startswith("error: split train: ref")


# --- published counts ---------------------------------------------------------------------------------------------


def test_published_sentences_add_up():
    def sentences(dataset, split_by):
        return sum(s["sentences"].value for n, s in official.OFFICIAL[dataset, split_by].items() if n != "total")

    assert sentences("refcoco", "unc") == official.OFFICIAL["refcoco", "google"]["total"]["sentences"].value == 142_210
    assert sentences("refcoco+", "unc") == official.OFFICIAL["refcoco+", "unc"]["total"]["sentences"].value == 141_564
    assert sentences("refcocog", "umd") == sentences("refcocog", "google") == 95_010
    refs = [sum(s["refs"].value for s in official.OFFICIAL["refcocog", b].values()) for b in ("umd", "google")]
    assert refs == [49_822, 49_822]
    sure = official.OFFICIAL["refcoco", "unc"]["testB"]["sentences"]
    unsure = official.OFFICIAL["refcoco+", "unc"]["train"]["sentences"]
    assert sure == official.Figure(5095, True) and unsure == official.Figure(120_191, False)


TABLE = {("refcoco", "unc"): {"train": {"images": official.Figure(32, True), "refs": official.Figure(98, True)},
                              "val": {"sentences": official.Figure(50, False)}}}  # fmt: skip


def test_sure_counts_are_errors_unsure_ones_warnings(folder, monkeypatch):
    monkeypatch.setattr(official, "OFFICIAL", TABLE)
    assert verify_shards(folder, 1)["warnings"] == []  # the embedded set calls itself refcoco unc, and is not
    edit_manifest(folder, lambda m: m.update(description="COCO 2014 Dataset"))
    found = verify_shards(folder, 1)
    (error,) = found["errors"]
    assert "train has 96 refs, published are 98" in error
    assert any("val has 48 sentences, published are 50 (not sure)" in w for w in found["warnings"])
    assert any("split testA is none of refcoco unc's" in w for w in found["warnings"])


def test_what_was_left_out_explains_what_is_missing(folder, monkeypatch):
    monkeypatch.setattr(official, "OFFICIAL", TABLE)
    edit_manifest(folder, lambda m: m.update(description="COCO 2014 Dataset"))
    edit_manifest(folder, lambda m: m["splits"]["train"]["dropped"].update(refs=2))
    found = verify_shards(folder, 1)
    assert found["ok"] and any("published are 98: --skip-bad left out 2 refs" in w for w in found["warnings"])
    edit_manifest(folder, lambda m: m["splits"]["train"]["dropped"].update(refs=1))
    assert not verify_shards(folder, 1)["ok"]


def test_a_split_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(official, "OFFICIAL", {("refcoco", "unc"): {"testC": {}}})
    edit_manifest(folder, lambda m: m.update(description="COCO 2014 Dataset"))
    assert any("there is no split testC" in e for e in verify_shards(folder, 1)["errors"])


# --- run lengths --------------------------------------------------------------------------------------------------


def test_run_lengths_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 0.99, 1):
        for _ in range(20):
            mask = (rng.random(rng.integers(1, 90, 2)) < share).astype(np.uint8)
            rle = coco.encode(np.asfortranarray(mask))
            runs = run_lengths(rle | {"counts": rle["counts"].decode()})
            back = np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape[::-1]).T
            np.testing.assert_array_equal(back, mask)
    for counts in ("", "P", "~", "1" * 40, "PPPPPPPPPP1", "é"):
        with pytest.raises(ValueError, match="mask"):
            run_lengths({"size": [5, 7], "counts": counts})


# --- statistics ---------------------------------------------------------------------------------------------------
