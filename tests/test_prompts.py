"""Points and boxes: as segment_anything computes them, where the object is, the same on any number of ranks."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import MINILM

from dit_ds.checkpointing.weights import LoadedModel
from dit_ds.config.load import validate
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import JPG, SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.prompts import Prompts, mask_to_box, prompt_mask, sample_points, scale_coordinates
from dit_ds.data.loading.sampler import TrainBatchSampler
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation, resize_mask
from dit_ds.errors import UserError
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.evaluation.predictor import Predictor
from dit_ds.models.build import build_model
from dit_ds.models.dit_sam import DITSAM
from dit_ds.models.losses import segmentation_loss
from dit_ds.models.sam import SIZES
from dit_ds.models.text_encoder import TextEncoder, load_tokenizer

MIX = ["text", "point", "box"]


def small_model(scheme="layer_wise", **options):
    torch.manual_seed(0)
    return DITSAM(TextEncoder(MINILM, layers=1), "vit_t", 64, scheme, **options).eval()


def sam_of(model):
    """segment_anything's own model of the same weights."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    s = SIZES["vit_t"]
    sam = Sam(
        ImageEncoderViT(64, 16, 3, s.embed_dim, s.depth, s.num_heads, out_chans=64, use_rel_pos=True,
                        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)),
        PromptEncoder(64, (4, 4), (64, 64), mask_in_chans=16),
        MaskDecoder(transformer_dim=64, transformer=TwoWayTransformer(2, 64, 8, s.decoder_mlp_dim)),
    )  # fmt: skip
    missing, _ = sam.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return sam.eval()


def sams_logits(sam, image, size, points=None, box=None):
    """Of one image, by SAM's encoder, prompt encoder and mask decoder."""
    features = sam.image_encoder(sam.preprocess(image[:, : size[0], : size[1]].float())[None])
    given = None if points is None else (points[None].float(), torch.ones(1, len(points), dtype=torch.int))
    sparse, dense = sam.prompt_encoder(points=given, boxes=None if box is None else box[None].float(), masks=None)
    positions = sam.prompt_encoder.get_dense_pe()
    return sam.mask_decoder(features, positions, sparse, dense, multimask_output=False)[0][0, 0]


@pytest.mark.parametrize("what", ["points", "box", "both"])
@torch.no_grad()
def test_points_and_boxes_give_what_segment_anything_gives(what):
    """Image encoder, prompt encoder and mask decoder; points are followed by one that is none, boxes are not."""
    model = small_model()
    for e in model.prompt_encoder.point_embeddings:
        torch.nn.init.normal_(e.weight)
    torch.nn.init.normal_(model.prompt_encoder.not_a_point_embed.weight)
    sam, g = sam_of(model), torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=g, dtype=torch.uint8)
    sizes = torch.tensor([[64, 48], [40, 64]])
    points = torch.randint(0, 40, (2, 5, 2), generator=g) if what != "box" else None
    box = torch.tensor([[3, 5, 20, 31], [10, 2, 33, 30]]) if what != "points" else None
    layout = [
        Prompts(("point",)).points_and_labels(
            None if points is None else points[i].numpy(), None if box is None else box[i].numpy()
        )
        for i in range(2)
    ]
    assert layout[0]["labels"].tolist() == {"points": [1] * 5 + [-1], "box": [2, 3], "both": [1] * 5 + [2, 3]}[what]
    both = [torch.from_numpy(np.stack([x[k] for x in layout])) for k in ("points", "labels")]
    got = model(images, sizes, None, None, *both)
    for i in range(2):
        of = [None if x is None else x[i] for x in (points, box)]
        assert (got[i] - sams_logits(sam, images[i], sizes[i], *of)).abs().max() <= 1e-5


@torch.no_grad()
def test_one_picture_goes_through_as_through_sams_predictor():
    """Coordinates of the original picture, resized and padded."""
    from segment_anything import SamPredictor

    config = validate(
        {"data": {"image_size": 64}, "model": {"size": "vit_t", "scheme": "default"},
         "text": {"name": MINILM, "layers": 1, "freeze": True}, "eval": {"threshold": 0.5}}
    )  # fmt: skip
    model = build_model(config).eval()
    ours = Predictor(LoadedModel(model, config, {"step": 0}))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 128, 3), dtype=np.uint8)
    predictor = SamPredictor(sam_of(model))
    predictor.set_image(pixels)
    box = (12.0, 7.0, 80.0, 66.5)
    for prompt in ({"points": [(100.0, 20.0), (3.5, 88.0)]}, {"box": box}):
        given = [None, None, np.array(box)]
        if "points" in prompt:
            given = [np.array(prompt["points"]), np.ones(2, int), None]
        want = predictor.predict(*given, multimask_output=False)[0][0]
        found = ours.segment(pixels, **prompt).mask
        assert (found == want).mean() > 0.99  # SAM resizes with antialiasing


def test_boxes_are_segment_anythings():
    from segment_anything.utils.amg import batched_mask_to_box

    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = np.zeros((40, 50), np.uint8)
        y, x = sorted(rng.integers(0, 40, 2)), sorted(rng.integers(0, 50, 2))
        mask[y[0] : y[1] + 1, x[0] : x[1] + 1] = 1
        assert mask_to_box(mask).tolist() == batched_mask_to_box(torch.from_numpy(mask).bool()[None])[0].tolist()


def test_points_lie_on_the_mask_and_differ_while_they_can():
    mask, rng = np.zeros((30, 20), np.uint8), np.random.default_rng(0)
    mask[5, 3:8] = 1
    assert sorted(sample_points(mask, 5, rng).tolist()) == [[x, 5] for x in range(3, 8)]
    mask[5, 4:] = 0
    assert sample_points(mask, 3, rng).tolist() == [[3, 5]] * 3


def test_what_resizing_left_nothing_of_is_still_found():
    whole = np.zeros((480, 640), np.uint8)
    whole[475, 630] = 1
    small = resize_mask(whole, 64)
    assert not small.any()
    assert np.argwhere(prompt_mask(small, whole)).tolist() == [[47, 63]]
    assert scale_coordinates([[630, 475]], (480, 640), (48, 64)).round(2).tolist() == [[63.0, 47.5]]


@pytest.fixture(scope="module")
def tokenize():
    return make_tokenize(load_tokenizer(MINILM), 20)


@pytest.fixture(scope="module")
def index(shards):
    return SplitIndex.load(shards / "refcoco/unc", "train")


def dataset(index, tokenize, kinds, augmentation=Augmentation(0.4, 0.5, 0.5), size=64, **options):  # noqa: B008
    return ExpressionDataset(
        index, "ref", size, tokenize, augmentation, seed=5, prompts=Prompts.of(kinds, 5), **options
    )


def corners(sample):
    return sample["points"][np.isin(sample["labels"], (2, 3))].reshape(-1).tolist()


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("scales", [[], [48]])
@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_prompts_follow_resize_and_flip(index, tokenize, flip, scales, resize):
    """They are where the mask is that the model is shown."""
    if scales and resize == "stretch":
        pytest.skip("refused")
    options = {"augmentation": Augmentation(0.2, 0.5, flip), "scales": scales, "resize": resize}
    points, boxes, words = (dataset(index, tokenize, [k], **options) for k in ("point", "box", "text"))
    for i in range(0, len(points), 9):
        p, b, w = (d[(0, i, 1.0)] for d in (points, boxes, words))
        assert np.array_equal(p["mask"], w["mask"]) and np.array_equal(b["image"], w["image"])
        assert p["labels"].tolist() == [1] * 5 + [-1] and "tokens" not in p
        x, y = p["points"][:5].astype(int).T
        assert p["mask"][y, x].all() and len({*zip(x, y)}) == 5
        assert corners(b) == mask_to_box(b["mask"]).tolist() and b["labels"].tolist() == [2, 3]
        assert max(w["size"]) == (scales or [64])[0] and w["image"].shape == (3, 64, 64)


def test_text_alone_is_what_it_was_and_prompts_shift_no_other_draw(index, tokenize):
    """With mixed prompts the same pictures, masks and, where there are words, words."""
    words, mixed = dataset(index, tokenize, ["text"]), dataset(index, tokenize, MIX)
    assert "points" not in words[(0, 0, 1.0)] and "labels" not in words[(0, 0, 1.0)]
    kinds = []
    for i in range(len(words)):
        w, m = words[(1, i, 1.0)], mixed[(1, i, 1.0)]
        assert all(np.array_equal(w[k], m[k]) for k in ("image", "mask", "size", "weight"))
        assert m["points"].shape == (6, 2) and m["labels"].shape == (6,) and m["labels"].dtype == np.int64
        kind = "box" if 2 in m["labels"] else "point" if 1 in m["labels"] else "text"
        kinds.append(kind)
        assert m["token_mask"].any() == (kind == "text")
        if kind == "text":
            assert all(np.array_equal(w[k], m[k]) for k in ("tokens", "token_mask"))
    assert all(0.15 < kinds.count(k) / len(kinds) < 0.55 for k in MIX)
    again = ["text" if m["token_mask"].any() else "other" for m in (mixed[(2, i, 1.0)] for i in range(len(words)))]
    assert again != ["text" if k == "text" else "other" for k in kinds]  # drawn anew each epoch


def test_scales_shift_no_other_draw(index, tokenize):
    plain, scaled = (dataset(index, tokenize, ["point"], scales=s) for s in ([], [32, 48, 64]))
    sizes = [max(scaled[(0, i, 1.0)]["size"]) for i in range(40)]
    assert set(sizes) == {32, 48, 64}
    i = sizes.index(64)
    a, b = plain[(0, i, 1.0)], scaled[(0, i, 1.0)]
    assert all(np.array_equal(a[k], b[k]) for k in a)
    for_evaluation = ExpressionDataset(index, "ref", 64, tokenize, scales=[32])
    assert max(for_evaluation[(0, 0, 1.0)]["size"]) == 64


def test_workers_and_ranks_draw_the_same_prompts(index, tokenize):
    def run(workers, world=1):
        data, samples = dataset(index, tokenize, MIX, scales=[48, 64]), {}
        for rank in range(world):
            sampler = TrainBatchSampler(len(data), 16, 8, rank, world, seed=5)
            sampler.start_at(2, 0)
            for batch in iterate(make_loader(data, sampler, workers, pin=False)):
                for i, s in enumerate(batch["sample"].tolist()):
                    samples[s] = [batch[k][i] for k in ("points", "labels", "token_mask", "image")]
        return samples

    alone = run(0)
    for other in (run(2), run(0, world=2)):
        assert alone.keys() == other.keys()
        assert all(torch.equal(a, b) for s in alone for a, b in zip(alone[s], other[s]))


def test_the_released_codes_masks():
    mask = np.zeros((240, 320), np.uint8)
    mask[60:180, 81:160] = 1
    half, any_, soft = (resize_mask(mask, 128, rule=r) for r in ("half", "any", "soft"))
    assert half.dtype == any_.dtype == np.uint8 and soft.dtype == np.float32
    assert np.array_equal(any_, soft > 0) and ((soft > 0) & (soft < 1)).any() and soft.max() == 1
    assert abs(soft.mean() - mask.mean()) < 1e-3 and any_.sum() > half.sum()
    assert np.array_equal(half, np.round(soft * 255) >= 128)
    loss = segmentation_loss(torch.zeros(1, 32, 32), torch.from_numpy(soft[:96, :96])[None], torch.ones(1))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_the_released_codes_evaluation_dilates():
    """A step at the edge of a pixel: the rule of the paper's code adds what bilinear resizing smears over it."""
    logits = torch.full((16, 16), -9.0)
    logits[4:12, 4:12] = 9.0
    size, shape = torch.tensor([64, 64]), (200, 200)
    exact = MaskPostprocess(0.35)(logits, size, shape, 64)
    grown = MaskPostprocess(0.35, "resize_then_any")(logits, size, shape, 64)
    assert grown[exact].all() and 1.02 < grown.sum() / exact.sum() < 1.2
    inside = torch.nn.functional.interpolate(logits[None, None], (64, 64), mode="bilinear")[0, 0].sigmoid() > 0.35
    want = torch.nn.functional.interpolate(inside[None, None].float(), shape, mode="bilinear")[0, 0] > 0
    assert torch.equal(grown, want)


def test_aligned_corners_in_loss_and_evaluation():
    logits, mask = torch.randn(2, 16, 16), torch.rand(2, 64, 64) > 0.5
    up = torch.nn.functional.interpolate(logits[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0]
    want = torch.nn.functional.binary_cross_entropy_with_logits(up, mask.float())
    config = {"model": {"size": "vit_t", "align_corners": True}, "data": {"image_size": 64},
              "text": {"name": MINILM, "layers": 1}}  # fmt: skip
    model = build_model(validate(config))
    torch.testing.assert_close(model.loss(logits, mask, torch.ones(2)), want)
    got = MaskPostprocess.from_config(validate(config))(logits[0], torch.tensor([64, 64]), (64, 64), 64)
    assert torch.equal(got, up[0].sigmoid() > 0.35)


def mixed_batch():
    """Three samples: words, points, a box."""
    g = torch.Generator().manual_seed(2)
    layouts = [
        Prompts.of(MIX, 5).points_and_labels(*x) for x in ((), (np.full((5, 2), 9),), (None, np.array([2, 3, 30, 40])))
    ]
    return {
        "image": torch.randint(0, 256, (3, 3, 64, 64), generator=g, dtype=torch.uint8),
        "size": torch.tensor([[64, 64], [64, 32], [32, 64]]),
        "tokens": torch.randint(1000, 3000, (3, 20), generator=g),
        "token_mask": torch.arange(20)[None] < torch.tensor([[7], [0], [0]]),
        **{k: torch.from_numpy(np.stack([x[k] for x in layouts])) for k in ("points", "labels")},
    }


def model_of(**settings):
    values = {"model": {"size": "vit_t"}, "data": {"image_size": 64, "prompts": MIX},
              "text": {"name": MINILM, "layers": 1, "freeze": True}}  # fmt: skip
    return build_model(validate({k: values.get(k, {}) | settings.get(k, {}) for k in values.keys() | settings.keys()}))


@pytest.mark.parametrize("scheme", ["layer_wise", "end_to_end", "default", "cascade", "cross_attention_ffn"])
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("attention", ["eager", "chunked"])
def test_without_words_the_image_encoder_hears_none(scheme, mask_padding, attention):
    """A sample with points or a box is encoded as by plain SAM, whatever ids lie in its places for words."""
    model = model_of(model={"scheme": scheme, "mask_padding": mask_padding, "attention": attention, "size": "vit_t"},
                     text={"freeze": False}).eval()  # fmt: skip
    batch, seen = mixed_batch(), []
    model.image_encoder.register_forward_hook(lambda m, x, out: seen.append(out))
    whole = model(**batch)
    other = model(**batch | {"tokens": torch.where(batch["token_mask"], batch["tokens"], 1234)})
    torch.testing.assert_close(whole[1:], other[1:], rtol=1e-4, atol=1e-5)
    plain = {k: batch[k] for k in ("image", "size", "points", "labels")}
    model(**plain)
    torch.testing.assert_close(seen[0][1:], seen[-1][1:], rtol=1e-4, atol=1e-5)
    assert torch.isfinite(whole).all()
    for i in range(3):
        alone = model(**{k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_nothing_at_all_is_a_prompt_too():
    model, batch = small_model(), mixed_batch()
    assert torch.isfinite(model(batch["image"], batch["size"], None, None)).all()


@pytest.mark.parametrize("text", ["frozen", "cached", "tuned", "static tokens", "padding attended to"])
@pytest.mark.parametrize("kinds", [MIX, ["point"], ["box"], ["text", "box"], ["text"]])
def test_every_trained_parameter_has_a_gradient_whatever_was_drawn(kinds, text):
    """ZeRO-3 counts on it. The batch holds but one kind of sample."""
    model = model_of(data={"prompts": kinds, "image_size": 64},
                     model={"size": "vit_t", "mask_padding": text != "padding attended to",
                            "static_tokens": 3 * (text == "static tokens")},
                     text={"freeze": text != "tuned", "cache": 9 * (text == "cached")}).train()  # fmt: skip
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    embeddings = {n.split(".")[2] for n in names if "point_embeddings" in n}
    assert embeddings == ({"1"} if "point" in kinds else set()) | ({"2", "3"} if "box" in kinds else set())
    assert any(n.startswith(("text_", "image_encoder.instruction")) for n in names) == ("text" in kinds)
    prompts = Prompts.of(kinds, 5)
    for kind in kinds:
        batch = mixed_batch()
        row = {"text": 0, "point": 1, "box": 2}[kind]
        inputs = {k: v[row : row + 1] for k, v in batch.items() if prompts.has_text or not k.startswith("token")}
        drawn = prompts.points_and_labels(
            *{"text": (), "point": (np.full((5, 2), 9),), "box": (None, np.arange(4))}[kind]
        )
        inputs = {k: v for k, v in inputs.items() if k not in ("points", "labels")}
        inputs |= {k: torch.from_numpy(v)[None] for k, v in drawn.items()}
        model.zero_grad()
        model.loss(model(**model_inputs(inputs, torch.device("cpu"))), torch.ones(1, 64, 64), torch.ones(1)).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_frozen_embeddings_stay_frozen():
    model = small_model(freeze_mask_decoder=True, prompts=MIX)
    assert not any(p.requires_grad for p in model.prompt_encoder.parameters())
    with pytest.raises(UserError, match="nothing is left to train"):
        validate({"data": {"prompts": ["point"]},
                  "model": {"freeze_image_encoder": True, "freeze_mask_decoder": True}})  # fmt: skip


@torch.no_grad()
def test_bf16_and_autocast_embed_points_exactly():
    model, batch = model_of(), mixed_batch()
    exact = model.prompt_encoder.embed_points(batch["points"], batch["labels"])
    half = model.bfloat16().prompt_encoder.embed_points(batch["points"], batch["labels"])
    assert half.dtype == torch.bfloat16 and (half.float() - exact).abs().max() < 0.05  # a weight's rounding
    assert torch.isfinite(model(**batch)).all()
    encoder = model.float().prompt_encoder
    exact = [encoder.embed_points(batch["points"], batch["labels"]), encoder(None, None)[2]]
    with torch.autocast("cpu", torch.bfloat16):
        under = [encoder.embed_points(batch["points"], batch["labels"]), encoder(None, None)[2]]
    for a, b in zip(under, exact):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_mask_without_pixels_is_named(index, tokenize):
    from pycocotools.mask import encode

    data = dataset(index, tokenize, ["box"])
    read = data.reader.read

    def without(image, member):
        found = read(image, member)
        if member == JPG:
            return found
        meta = json.loads(found)
        for ann in meta["anns"].values():
            shape = ann["rle"]["size"]
            ann["rle"]["counts"] = encode(np.zeros(shape, np.uint8, order="F"))["counts"].decode()
        return json.dumps(meta).encode()

    data.reader.read = without
    message = str(data[(0, 0, 1.0)])
    assert isinstance(data[(0, 0, 1.0)], UserError) and "\n" not in message
    assert index.shards[0].name.split("-")[0] in message and data.key(0) in message and "no box to draw" in message
    data.prompts = Prompts()
    assert not isinstance(data[(0, 0, 1.0)], UserError)


def test_prompts_get_the_places_they_were_trained_with():
    assert Prompts.of(["text"], 5) == Prompts()
    assert Prompts.of(MIX, 5) == Prompts(tuple(MIX), 5, True, 6)
    assert Prompts.of(MIX, 5, ["box"]) == Prompts(("box",), 5, True, 6)
    assert Prompts.of(["text"], 5, ["point"]) == Prompts(("point",), 5, False, 0)  # as SAM
    assert Prompts.of(["box"], 5) == Prompts(("box",), 5, False, 2)
    assert Prompts.of(["text"], 5, ["text", "point"]).has_text
    assert Prompts.of([], 5, ["box"]) == Prompts(("box",), 5, False, 0)  # SAM's own weights
