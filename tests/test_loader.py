"""The loader: one order for every world size, worker count and resumption; every sample once; words that follow flips."""

from __future__ import annotations

import copy
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import MINILM
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds.data.jpeg import decode_jpeg
from dit_ds.data.loading import index as index_module
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import JPG, BadSample, SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.loading.readers import MemberReader
from dit_ds.data.loading.sampler import EvalBatchSampler, TrainBatchSampler
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation, resize_mask, resized_shape
from dit_ds.errors import UserError
from dit_ds.models.text_encoder import load_tokenizer


@pytest.fixture(scope="module")
def tokenize():
    return make_tokenize(load_tokenizer(MINILM), 20)


@pytest.fixture(scope="module")
def index(shards):
    return SplitIndex.load(shards / "refcoco/unc", "train")


@pytest.mark.parametrize(("unit", "order"), [("ref", "global"), ("image", "global"), ("sentence", "shards")])
def test_workers_give_the_same_samples(index, tokenize, unit, order):
    def run(workers):
        dataset = ExpressionDataset(index, unit, 64, tokenize, Augmentation(0.4, 0.5, 0.5), seed=5)
        sampler = TrainBatchSampler(index.samples(unit, order), 16, 8, 0, 1, seed=5)
        sampler.start_at(2, 1)
        return list(iterate(make_loader(dataset, sampler, workers, pin=False)))

    alone = run(0)
    assert len(alone) > 4
    for workers in (1, 3, 8):
        together = run(workers)
        assert len(alone) == len(together)
        for a, b in zip(alone, together):
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_workers_give_the_same_evaluation(index, tokenize):
    dataset = ExpressionDataset(index, "sentence", 64, tokenize)
    batches = EvalBatchSampler(len(dataset), 8, 0, 1)
    for a, b in zip(*(iterate(make_loader(dataset, batches, workers, pin=False)) for workers in (0, 3))):
        assert a["text"] == b["text"] and a["image_id"] == b["image_id"]
        assert all(np.array_equal(x, y) for x, y in zip(a["original"], b["original"], strict=True))
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_samples_do_not_depend_on_their_company(index, tokenize, data):
    """Nor on what came before, in whichever order and however often."""
    evaluates = data.draw(st.booleans())
    augmentation = None if evaluates else Augmentation(0.4, 0.5, 0.5)
    make = lambda: ExpressionDataset(  # noqa: E731
        index, "sentence", 48, tokenize, augmentation, seed=5, prompts=Prompts.of(["text", "box"], 5),
        scales=[] if evaluates else [32, 48], mask_rule=data.draw(st.sampled_from(["half", "soft"])),
    )  # fmt: skip
    item = st.tuples(st.integers(0, 2), st.integers(0, 11), st.sampled_from([0.0, 1.0]))
    dataset = make()
    for items in data.draw(st.lists(st.lists(item, min_size=1, max_size=6), min_size=1, max_size=3)):
        batch = dataset.__getitems__(items)
        assert batch["image"].shape == (len(items), 3, 48, 48)
        for row, i in enumerate(items):
            alone = dataset.__class__.__getitem__(copy.copy(dataset), i)
            assert same(
                alone, {k: np.asarray(batch[k][row]) if k not in ("text", "image_id") else batch[k][row] for k in alone}
            )


def test_an_image_is_decoded_once_for_its_expressions(index, tokenize, monkeypatch):
    decoded = []
    monkeypatch.setattr("dit_ds.data.loading.dataset.decode_picture", lambda *a: decoded.append(1) or decode_jpeg(*a))
    dataset = ExpressionDataset(index, "sentence", 64, tokenize)
    for items in EvalBatchSampler(len(dataset), 5, 0, 1):
        dataset.__getitems__(items)
    assert len(decoded) == len(index.images) < len(dataset) / 2
    decoded.clear()
    dataset.__getitems__([(0, s, 1.0) for s in (0, len(dataset) - 1, 1, len(dataset) - 2)])
    assert len(decoded) == 2


def test_more_shards_than_a_process_may_open(index, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    reader = MemberReader(index)
    images = np.random.default_rng(0).integers(0, len(index.images), 200).tolist()
    assert [reader.read(i, JPG) for i in images] == [MemberReader(index).read(i, JPG) for i in images]
    assert len(index.shards) > len(reader._files) == 2


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(_VALUES, st.booleans())
def test_annotations_are_read_as_by_json(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    for data in (text, text[:-1], text + b"x", b"\xff" + text):
        try:
            want = json.loads(data.decode())
        except ValueError:
            with pytest.raises(ValueError):
                index_module._parse(data)
        else:
            assert repr(index_module._parse(data)) == repr(want)


def test_an_expression_of_nothing_has_an_empty_mask(index, tokenize, monkeypatch):
    def without_target(data):
        meta = json.loads(data)
        meta["refs"][0]["ann_ids"] = []
        return meta

    monkeypatch.setattr("dit_ds.data.loading.index.from_json", without_target)
    for augmentation in (None, Augmentation(0.4, 0.5, 0.5)):
        for rule in ("half", "any", "soft"):
            sample = ExpressionDataset(index, "sentence", 64, tokenize, augmentation, mask_rule=rule)[0, 0, 1.0]
            assert sample["mask"].shape == (64, 64) and not sample["mask"].any() and sample["image"].any()
            assert augmentation or (sample["original"].shape[0] > 64 and not sample["original"].any())


@pytest.mark.parametrize("augmentation", [None, Augmentation(0.4, 0.5, 0.5)])
@pytest.mark.parametrize("kinds", [["text"], ["text", "point", "box"], ["box"]])
def test_damaged_samples_are_skipped_where_they_may_be(index, tokenize, augmentation, kinds, monkeypatch):
    bad = set(range(0, len(index.images), 2))

    def check(self, image, member, data):
        if image in bad and member == JPG:
            raise self.damaged(image, member)
        return data

    make = lambda skips: ExpressionDataset(  # noqa: E731
        index, "ref", 64, tokenize, augmentation, prompts=Prompts.of(kinds, 5), skip_bad=skips
    )
    items = [(0, s, 2.0) for s in range(12)]
    whole = make(True).__getitems__(items)
    assert whole["bad"] == [] and (whole["weight"] == 2).all()
    monkeypatch.setattr(SplitIndex, "check", check)
    stopped = make(False).__getitems__(items)
    assert isinstance(stopped, BadSample) and "jpg is damaged" in str(stopped)
    batch = make(True).__getitems__(items)
    is_bad = torch.from_numpy(np.isin(index.refs[:12, 0], list(bad)))
    assert len(batch["bad"]) == is_bad.sum() > 0 and all("jpg is damaged" in line for line in batch["bad"])
    assert torch.equal(batch["weight"], torch.where(is_bad, 0.0, 2.0))
    assert torch.equal(batch["sample"], whole["sample"])
    for key in (k for k, v in batch.items() if isinstance(v, torch.Tensor)):
        assert batch[key].shape == whole[key].shape and torch.equal(batch[key][~is_bad], whole[key][~is_bad])
    assert not batch["image"][is_bad].any() and not batch["mask"][is_bad].any()
    alone = make(True).__getitems__([items[int(is_bad.nonzero()[0])]])  # of nothing else
    assert len(alone["bad"]) == 1 and alone["weight"].tolist() == [0] and alone["image"].shape == (1, 3, 64, 64)


def test_lengths_and_contents(index, tokenize):
    refs = ExpressionDataset(index, "ref", 96, tokenize)
    sentences = ExpressionDataset(index, "sentence", 96, tokenize)
    assert len(refs) == len(index.refs) and len(sentences) == len(index.sentences) == index.refs[:, 3].sum()
    sample = sentences[(0, 5, 1.0)]
    assert sample["image"].shape == (3, 96, 96) and sample["image"].dtype == np.uint8
    assert sample["mask"].shape == (96, 96) and sample["tokens"].shape == sample["token_mask"].shape == (20,)
    h, w = sample["size"]
    assert max(h, w) == 96 and (h, w) == resized_shape(*sample["original"].shape, 96)
    assert not sample["image"][:, h:].any() and not sample["image"][:, :, w:].any()  # padding
    assert sample["original"].sum() > 0
    # over the epochs, a ref shows each of its sentences
    seen = {refs[(e, 0, 1.0)]["text"] for e in range(40)}
    assert len(seen) == index.refs[0, 3]


def test_a_flip_turns_image_mask_and_words(index, tokenize):
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :10] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)
    rng = np.random.default_rng(0)
    drawn, out = Augmentation(flip=1.0).draw(rng), np.empty_like(image)
    drawn.apply_image(image, out)
    np.testing.assert_array_equal(out, image[:, ::-1])
    np.testing.assert_array_equal(drawn.apply_mask(mask), mask[:, ::-1])
    assert drawn.with_text("the left man") == (drawn, "the right man")
    assert not drawn.with_text("the man at the west end")[0].flipped
    drawn = Augmentation().draw(rng)
    drawn.apply_image(image, out)
    assert np.array_equal(out, image) and np.array_equal(drawn.apply_mask(mask), mask)
    assert drawn.with_text("the left man") == (drawn, "the left man")


def test_augmentation_draws_from_epoch_and_sample(index, tokenize):
    dataset = ExpressionDataset(index, "ref", 64, tokenize, Augmentation(0.4, 0.5, 0.5), seed=5)
    assert np.array_equal(dataset[(1, 3, 1.0)]["image"], dataset[(1, 3, 1.0)]["image"])
    assert not np.array_equal(dataset[(1, 3, 1.0)]["image"], dataset[(2, 3, 1.0)]["image"])


def test_resizing_a_mask_keeps_its_share():
    mask = np.zeros((240, 320), np.uint8)
    mask[60:180, 80:160] = 1
    small = resize_mask(mask, 128)
    assert small.shape == (96, 128) and abs(small.mean() - mask.mean()) < 0.005


def test_shuffled_words_come_from_another_image(index, tokenize):
    plain = ExpressionDataset(index, "sentence", 64, tokenize)
    shuffled = ExpressionDataset(index, "sentence", 64, tokenize, sentence_shift=1)
    pairs = [(plain[(0, s, 1.0)], shuffled[(0, s, 1.0)]) for s in range(0, len(plain), 7)]
    assert all(np.array_equal(a["mask"], b["mask"]) for a, b in pairs)
    assert np.mean([a["text"] == b["text"] for a, b in pairs]) < 0.2


def test_what_is_damaged_is_named(shards, tokenize, tmp_path):
    import shutil

    folder = tmp_path / "unc"
    shutil.copytree(shards / "refcoco/unc", folder)
    with pytest.raises(UserError, match="no split .dev.*it has"):
        SplitIndex.load(folder, "dev")
    index = SplitIndex.load(folder, "train")
    shard, _, at, length, *_ = index.images[0]
    data = bytearray(index.shards[shard].read_bytes())
    data[at + length // 2 : at + length] = bytes(length - length // 2)  # the JPEG's second half is gone
    index.shards[shard].write_bytes(data)
    dataset = ExpressionDataset(index, "ref", 64, tokenize)
    sampler = TrainBatchSampler(len(dataset), 4, 4, 0, 1, 0)
    for workers in (0, 2):
        with pytest.raises(UserError, match=rf"{index.shards[shard].name}: \d+.jpg is damaged"):
            list(iterate(make_loader(dataset, sampler, workers, pin=False)))
    index.shards[shard].write_bytes(data[:-10240])
    with pytest.raises(UserError, match="the manifest says"):
        SplitIndex.load(folder, "train")


def test_jpeg_decoders_agree(refer_tree):
    import io

    from PIL import Image

    for path in sorted((refer_tree / "images/train2014").iterdir())[:5]:
        data = path.read_bytes()
        np.testing.assert_array_equal(decode_jpeg(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    with pytest.raises(ValueError):
        decode_jpeg(data[:500])


def test_a_shard_that_goes_away_is_named(shards, tokenize, tmp_path, monkeypatch):
    folder = tmp_path / "unc"
    shutil.copytree(shards / "refcoco/unc", folder)
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))  # no limit of open files
    index = SplitIndex.load(folder, "train")
    dataset = ExpressionDataset(index, "ref", 64, tokenize)
    first, last = index.shards[0], index.shards[-1]
    assert not isinstance(dataset[0, 0, 1.0], UserError)
    for shard in (first, last):
        shard.unlink()
    assert not isinstance(dataset[0, 1, 1.0], UserError)  # still open
    gone = dataset[0, len(dataset) - 1, 1.0]
    assert isinstance(gone, UserError) and f"cannot read {last}" in str(gone) and "No such file" in str(gone)
