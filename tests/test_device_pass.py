"""Batches finished on the device are those that the loader's workers make: masks the same, pictures to one level of 255."""

from __future__ import annotations

import io
import json
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import MINILM, dit_ds, metrics_of, tiny_config, warm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_ds.config.load import validate
from dit_ds.data.build import build_train_dataset
from dit_ds.data.loading import device_pass
from dit_ds.data.loading.announce import AnnouncingSampler
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.device_pass import finish_batch
from dit_ds.data.loading.index import JPG, SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.packed import PackedDataset
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.loading.sampler import TrainBatchSampler
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation, resize_mask_fast, resized_shape
from dit_ds.data.mask_runs import MaskRuns, encode_ones
from dit_ds.data.masks import decode_rle, encode_rle, run_lengths
from dit_ds.data.shards.manifest import KINDS
from dit_ds.errors import UserError
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.planning.memory.profiled_step import finished_pictures
from dit_ds.planning.memory.tracker import MemoryTracker

CPU = torch.device("cpu")
TEXTS = ("the left dog", "red ball", "man at the west end", "top right one")


def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids that tell texts apart."""
    return np.array([len(text), zlib.crc32(text.encode())], np.int64), np.ones(2, bool)


class InMemory:
    """A reader of samples in memory; `index` is theirs.

    Args:
        pictures: files with their kinds.
        masks: of each picture, (H, W) arrays, one for each annotation.
        refs: of each picture, positions of the annotations that each of its refs means.
    """

    def __init__(
        self, pictures: list[tuple[bytes, str]], masks: list[list[np.ndarray]], refs: list[list[list[int]]]
    ) -> None:
        self.files, images, rows = {}, [], []
        for i, ((data, _), drawn, meant) in enumerate(zip(pictures, masks, refs)):
            height, width = drawn[0].shape
            meta = {
                "image_id": i, "height": height, "width": width,
                "anns": {str(n): {"rle": encode_rle(m)} for n, m in enumerate(drawn)},
                "refs": [{"ann_ids": ids, "sentences": [{"sent": t} for t in TEXTS]} for ids in meant],
            }  # fmt: skip
            rows += [(i, j) for j in range(len(meant))]
            self.files[i] = data, json.dumps(meta).encode()
            images.append((0, i, 0, len(data), 0, 0, 0, 0))
        self.index = SplitIndex._of_one(
            ["memory.tar"], np.array(images, np.int64), np.array([KINDS.index(k) for _, k in pictures], np.uint8),
            np.array(rows, np.int64), np.full(len(rows), len(TEXTS)), name="a/b", manifest_sha="", generalized=True,
        )  # fmt: skip

    def read(self, image: int, member: int) -> bytes:
        data = self.files[image][member != JPG]
        if not data:
            raise self.index.damaged(image, member)
        return data


def both(
    reader: InMemory, items: list, side: int, *options: Any, device: torch.device = CPU, **named: Any
) -> list[dict]:
    """The workers' batch and the one finished on the device."""
    made = []
    for kind in (ExpressionDataset, PackedDataset):
        dataset = kind(reader.index, "ref", side, tokenize, *options, **named)
        dataset.reader = reader
        batch = dataset.__getitems__(items)
        if isinstance(batch, UserError):
            raise batch
        made.append(finish_batch(batch, device, side, named.get("mask_rule") == "soft"))
    return made


def assert_same(want: dict, got: dict) -> None:
    assert want.keys() == got.keys()
    for key, value in want.items():
        if key == "image":
            assert (
                got[key].shape == value.shape and got[key].dtype == value.dtype and got[key].stride() == value.stride()
            )
            assert (got[key].cpu().int() - value.int()).abs().max() <= 1
        elif isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype and torch.equal(got[key].cpu(), value), key
        else:
            assert got[key] == value


def picture(rng: np.random.Generator, height: int, width: int, kind: str) -> tuple[bytes, str]:
    """A file: smooth, with noise and saturated places; grey, CMYK, transparent or plain."""
    coarse = rng.integers(-60, 316, (3, 4, 3)).clip(0, 255).astype(np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, 3)
    pixels = (pixels + rng.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
    mode, form = {"grey": ("L", "JPEG"), "cmyk": ("CMYK", "JPEG"), "png": ("RGBA", "PNG")}.get(kind, ("RGB", "JPEG"))
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, **({"quality": 90} if form == "JPEG" else {}))
    return out.getvalue(), "png" if form == "PNG" else "jpg"


def mask(rng: np.random.Generator, height: int, width: int, kind: str) -> np.ndarray:
    """An object, a speck, a thin line, noise, everything, or nothing."""
    out = np.zeros((height, width), np.uint8)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    if kind == "object":
        cv2.ellipse(out, (x, y), (1 + width // 4, 1 + height // 3), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    elif kind == "noise":
        out[:] = rng.random(out.shape) < 0.5
    elif kind == "all":
        out[:] = 1
    elif kind != "none":
        out[y, x:] = 1
        out[y, x + 1 :] *= kind == "line"
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_finished_batches_are_the_workers(data):
    draw = lambda *of: data.draw(st.sampled_from(of))  # noqa: E731
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3))
    pictures = [picture(rng, h, w, draw("color", "grey", "cmyk", "png")) for h, w in sizes]
    kinds = ("object", "object", "speck", "line", "noise", "all", "none")
    prompts = draw(["text"], ["text"], ["text", "point"], ["point", "box"])
    if prompts != ["text"]:
        kinds = kinds[:-1]
    masks = [[mask(rng, h, w, draw(*kinds)) for _ in range(3)] for h, w in sizes]
    refs = [[[0], [1, 2], *([[]] if prompts == ["text"] else [])] for _ in sizes]
    reader = InMemory(pictures, masks, refs)
    side = data.draw(st.integers(16, 72))
    how = draw(Augmentation(), Augmentation(0.4, 0.5, 0.5), Augmentation(0.9, 1.0, 1.0), Augmentation(blur=1.0))
    scales = draw([], [], [16, side])
    options = {
        "seed": data.draw(st.integers(0, 99)), "resize": "pad" if scales else draw("pad", "pad", "stretch"),
        "prompts": Prompts.of(prompts, 3), "mask_rule": draw("half", "half", "half", "any", "soft"), "scales": scales,
        "on_vanished_target": draw("keep", "skip"), "skip_bad": draw(True, False),
    }  # fmt: skip
    item = st.tuples(st.integers(0, 3), st.integers(0, len(reader.index.refs) - 1), st.sampled_from([0.0, 1.5]))
    items = data.draw(st.lists(item, min_size=1, max_size=6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_pass, "_PIXELS", data.draw(st.sampled_from([1, 20_000, 1 << 22])))
        assert_same(*both(reader, items, side, how, **options))


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (640, 480), (333, 500), (1100, 1700)])
def test_photos_at_their_usual_size(size):
    rng = np.random.default_rng(0)
    reader = InMemory([picture(rng, *size, "color")], [[mask(rng, *size, "object")]], [[[0]]])
    want, got = both(reader, [(e, 0, 1.0) for e in range(6)], 512, Augmentation(0.4, 0.5, 0.5))
    assert_same(want, got)
    assert (want["image"] != got["image"]).float().mean() < 1e-4  # where sums in floats are rounded apart


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 60)] * 2, st.integers(0, 5)), min_size=1, max_size=4), st.integers(8, 120),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_runs_of_masks(sizes, side, seed):
    """They are the masks' own; what fills a block never vanishes; most objects do."""
    rng, kinds = np.random.default_rng(seed), ("object", "speck", "line", "noise", "all", "none")
    drawn = [mask(rng, h, w, kinds[k]) for h, w, k in sizes]
    runs = MaskRuns([encode_rle(m) for m in drawn])
    np.testing.assert_array_equal(runs.empty(), [not m.any() for m in drawn])
    for i, (m, fills) in enumerate(zip(drawn, runs.fill_block())):
        ends = np.cumsum(run_lengths(encode_rle(m)))
        np.testing.assert_array_equal(runs[i], ends[: len(ends) // 2 * 2].reshape(-1, 2))
        np.testing.assert_array_equal(encode_ones(m), runs[i])
        shape = resized_shape(*m.shape, side)
        if fills and min(shape[0] / m.shape[0], shape[1] / m.shape[1]) >= 0.5:
            assert resize_mask_fast(np.asfortranarray(m), side).any()
        assert fills or kinds[sizes[i][2]] != "all" or min(m.shape) < 3


@pytest.mark.parametrize("counts", ["", "0", "z~", "é", "P", "1" * 90, "14"])
def test_runs_of_what_is_no_rle(counts):
    good = encode_rle(np.eye(5, 4, dtype=np.uint8))
    for rles in ([{"size": [5, 4], "counts": counts}], [good, {"size": [5, 4], "counts": counts}, good]):
        with pytest.raises(ValueError, match="its mask"):
            MaskRuns(rles)
    with pytest.raises(ValueError, match="its mask"):
        decode_rle({"size": [5, 4], "counts": counts})


def test_a_picture_is_sent_once_for_all_its_expressions():
    rng = np.random.default_rng(0)
    size = (40, 60)
    reader = InMemory([picture(rng, *size, "color")], [[mask(rng, *size, "object")] * 3], [[[0], [1], [2]]])
    dataset = PackedDataset(reader.index, "ref", 64, tokenize, Augmentation())
    dataset.reader = reader
    sizes = [len(dataset.__getitems__([(0, s, 1.0) for s in range(n)])["packed"]) for n in (1, 3)]
    assert sizes[1] < sizes[0] + 40 * 60


def test_damaged_samples_become_zeros_or_end_the_run():
    rng = np.random.default_rng(0)
    size = (40, 60)
    good, png = picture(rng, *size, "color"), picture(rng, *size, "png")
    wrong, cut = picture(rng, 60, 40, "color"), (good[0][: len(good[0]) // 2], "jpg")
    pictures = [good, cut, wrong, (b"", "jpg"), png, (png[0][:-40], "png"), (picture(rng, 9, 9, "png")[0], "png")]
    reader = InMemory(pictures, [[mask(rng, *size, "object")]] * len(pictures), [[[0]]] * len(pictures))
    reader.files[0] = (good[0], b"")  # of which the annotations are damaged
    items = [(0, s, 1.0) for s in (6, 5, 4, 3, 2, 1, 0, 1)]
    named = {"skip_bad": True, "prompts": Prompts.of(["text", "point"], 2)}
    for rule in ("half", "soft"):
        packed = PackedDataset(reader.index, "ref", 64, tokenize, Augmentation(0.4, 1.0, 1.0), mask_rule=rule, **named)
        packed.reader = reader
        got = finish_batch(packed.__getitems__(items), CPU, 64, rule == "soft")
        assert len(got["bad"]) == 7 and "000000000000.json is damaged" in got["bad"][0]
        assert got["weight"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
        damaged = got["weight"] == 0
        assert not got["image"][damaged].any() and not got["mask"][damaged].any()
        assert got["image"][2].any() and got["mask"][2].any()
    with pytest.raises(UserError, match=r"000000000001.jpg is damaged"):
        both(reader, [(0, 4, 1.0), (0, 1, 1.0)], 64, Augmentation())
    packed = PackedDataset(reader.index, "ref", 64, tokenize, Augmentation())
    packed.reader = reader
    for sample in (1, 2, 6):
        assert f"{sample:012d}" in str(packed.__getitems__([(0, 4, 1.0), (0, sample, 1.0)]))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_loaders_give_the_same_batches_in_the_same_order(shards, streamed, workers):
    """Also from a step in the middle, and of slices that several workers read of one micro-batch."""
    index = SplitIndex.load(shards / "refcoco/unc", "train")
    words = make_tokenize(load_tokenizer(MINILM), 20)

    def load(kind: type, workers: int) -> list[dict]:
        dataset = kind(index, "ref", 64, words, Augmentation(0.4, 0.5, 0.5), seed=5, streamed=streamed)
        sampler = TrainBatchSampler(index.samples("ref", "shards" if streamed else "global"), 16, 8, 0, 1, seed=5)
        sampler.start_at(2, 1)
        return [finish_batch(b, CPU, 64, False) for b in iterate(make_loader(dataset, sampler, workers, pin=False))]

    want, got = load(ExpressionDataset, 0), load(PackedDataset, workers)
    assert len(want) == len(got) > 4
    for a, b in zip(want, got):
        assert_same(a, b)


@given(st.integers(0, 40), st.integers(1, 80), st.integers(0, 5))
def test_each_worker_is_told_once_what_it_loads_next(count, size, workers):
    batches, known = [[(0, n, 1.0)] * size for n in range(count)], [[] for _ in range(max(1, workers))]
    sampler = AnnouncingSampler(batches, workers)
    for n, items in enumerate(sampler):
        assert list(items) == batches[n]
        expected = known[n % len(known)]  # of which PyTorch gives it the first
        assert not items.coming if expected else len(items.coming) <= max(0, 64 // size - 1)
        expected += [] if expected else [items, *items.coming]
        assert expected.pop(0) == batches[n]
    assert not any(known) and len(sampler) == len(batches) == sum(1 for _ in sampler)


@pytest.mark.parametrize("skip_bad", [True, False])
@pytest.mark.parametrize("damaged", [{}, {3: "json", 6: "jpg"}, {0: "jpg"}, {2: "other", 7: "json"}, {11: "other"}])
def test_announced_batches_are_the_same_and_fail_when_they_are_due(damaged, skip_bad):
    """By a damaged picture, damaged annotations, or those of another picture, which end a run in any case."""
    rng, size = np.random.default_rng(0), (40, 60)
    reader = InMemory(
        [picture(rng, *size, "color") for _ in range(12)], [[mask(rng, *size, "object")]] * 12, [[[0]]] * 12
    )
    for image, what in damaged.items():
        jpg, text = reader.files[image]
        reader.files[image] = {
            "json": (jpg, b""),
            "jpg": (b"", text),
            "other": (jpg, reader.files[(image + 1) % 12][1]),
        }[what]
    batches = [[(0, 2 * n, 1.0), (0, 2 * n + 1, 0.5)] for n in range(6)]
    packed, plain = (PackedDataset(reader.index, "ref", 64, tokenize, Augmentation(), skip_bad=skip_bad) for _ in "ab")
    packed.reader = plain.reader = reader
    prepared = []
    prepare, packed._prepare = packed._prepare, lambda of: prepared.append(len(of)) or prepare(of)
    for items in AnnouncingSampler(batches, 0):
        want, got = plain.__getitems__(list(items)), packed.__getitems__(items)
        assert isinstance(got, UserError) == isinstance(want, UserError)
        if isinstance(got, UserError):
            assert str(got) == str(want)
        else:
            assert_same(*(finish_batch(b, CPU, 64, False) for b in (want, got)))
    assert prepared[0] == 6 and (damaged or len(prepared) == 1)


def test_one_sample_is_finished(shards):
    index = SplitIndex.load(shards / "refcoco/unc", "train")
    plain, packed = (
        k(index, "ref", 64, tokenize, Augmentation(0.4, 0.5, 0.5)) for k in (ExpressionDataset, PackedDataset)
    )
    for key, value in plain[(1, 3, 1.0)].items():
        np.testing.assert_array_equal(packed[(1, 3, 1.0)][key], value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("rule", ["half", "soft"])
def test_a_gpu_finishes_the_same(rule):
    rng = np.random.default_rng(0)
    sizes = [(480, 640), (333, 500), (90, 61), (700, 1300)]
    reader = InMemory(
        [picture(rng, *s, "color") for s in sizes], [[mask(rng, *s, k) for k in ("object", "line")] for s in sizes],
        [[[0], [0, 1]]] * len(sizes),
    )  # fmt: skip
    items = [(e, s, 1.0) for e in range(5) for s in range(8)]
    options = Augmentation(0.4, 0.5, 0.5)
    assert_same(*both(reader, items, 512, options, device=torch.device("cuda"), mask_rule=rule))


def test_without_a_gpu_workers_augment_and_the_log_says_so(shards, tmp_path, monkeypatch):
    settings = tiny_config(shards, tmp_path / "run")
    settings["data"]["augment_on"] = "device"
    config = validate(settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dataset = build_train_dataset(config)
    assert type(dataset) is ExpressionDataset and "there is no GPU here" in dataset.index.notes[-1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = build_train_dataset(config)
    assert type(dataset) is PackedDataset and not dataset.index.notes


def test_the_memory_plan_takes_the_pass_itself():
    """On pictures as large as any; beyond these, with what the pass's docstring says of a pixel."""
    with MemoryTracker() as tracker:
        tracker.restart()
        tracker.enter("forward")
        image, target = finished_pictures(3, 64, False, CPU)
        peak = tracker.profile().phases["forward"]
    assert image.shape == (3, 3, 64, 64) and image.is_contiguous() and target.shape == (3, 64, 64)
    sent, masks = 3 * 3 * 128**2, 3 * 128**2 * 13
    assert sent < peak < sent + masks + 3 * 70**2 * 90, peak


ON_THE_CPU = """
import sys
from dit_ds.cli.entry import main
from dit_ds.data import build
build._has_gpu = lambda: True
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_learns_the_same_and_goes_on_either_way(shards, tmp_path):
    """On two ranks, in micro-batches; the resumed run's workers augment."""
    for where in ("cpu", "device"):
        config = tiny_config(shards, tmp_path / where)
        config["data"] |= {"augment_on": where, "workers": 1}
        config["train"] |= {"max_steps": 4, "batch_size": 16}
        config["eval"] = {"every_epochs": 0}
        (tmp_path / f"{where}.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "train.py").write_text(ON_THE_CPU)
    dit_ds("train", "--config", tmp_path / "cpu.yaml", ranks=2)
    command = [str(tmp_path / "train.py"), "train", "--config", str(tmp_path / "device.yaml")]
    done = warm([*command, "--train.max_steps", "2"], ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    dit_ds("train", "--config", tmp_path / "device.yaml", "--resume", "--data.augment_on", "cpu", ranks=2)
    losses = [[m["loss"] for m in metrics_of(tmp_path / where)] for where in ("cpu", "device")]
    assert len(losses[0]) == len(losses[1]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-3)
