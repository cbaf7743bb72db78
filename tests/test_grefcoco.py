"""gRefCOCO: several targets or none, from its files through training to its metrics."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import dit_ds, tiny_config, write_random_model
from PIL import Image
from pycocotools import mask as coco
from refer_files import H, W, annotation, box, filled, image, python2_pickle, ref, samples_of, write_images, write_refer
from test_methods import inputs, tiny

from dit_ds.config.load import validate
from dit_ds.data.annotations.combine import load_source
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.index import SplitIndex
from dit_ds.data.loading.prompts import Prompts
from dit_ds.data.masks import annotation_rle
from dit_ds.data.shards.verify import verify_shards
from dit_ds.data.shards.write import shard_refer
from dit_ds.doctor import configured
from dit_ds.doctor.check import Context, run_checks
from dit_ds.errors import UserError
from dit_ds.evaluation.evaluate import evaluate
from dit_ds.evaluation.metrics import summarize, summarize_generalized
from dit_ds.evaluation.postprocess import MaskPostprocess
from dit_ds.models.losses import segmentation_loss
from dit_ds.models.segmenter import Prediction

# --- files --------------------------------------------------------------------------------------------------------

CROWD = {"size": [H, W], "counts": [0, 5, H * W - 5]}
ANNOTATIONS = [annotation(10, 1), annotation(11, 1, [box(20, 10, 25, 15)]), annotation(12, 1, CROWD, iscrowd=1)]
GREFS = [
    ref(0, [10, 11], 1, texts=["both blocks"]) | {"category_id": [1, 1]},
    ref(1, [-1], 1, texts=["the zebra", "no such thing"]) | {"category_id": [-1]},
    ref(2, [12, 10], 1, texts=["a block among dots"]) | {"category_id": [2, 1]},
    ref(3, [11], 1, "val") | {"category_id": 1},
]


def write_grefer(root: Path, grefs: list = GREFS, ending: str = "json", annotations: list = ANNOTATIONS) -> Path:
    """`ROOT/grefcoco/{grefs(unc).json or .p,instances.json}`."""
    folder = write_refer(root, "grefcoco", "unc", [], [image(1)], annotations) / "grefcoco"
    (folder / "refs(unc).p").unlink()
    data = json.dumps(grefs).encode() if ending == "json" else python2_pickle(grefs)
    (folder / f"grefs(unc).{ending}").write_bytes(data)
    return root


@pytest.mark.parametrize("ending", ["json", "p"])
def test_json_or_pickle_and_what_they_mean(tmp_path, ending):
    write_grefer(tmp_path, ending=ending)
    images = write_images(tmp_path / "images", [image(1)])
    manifest = shard_refer(tmp_path, images, "grefcoco", None, tmp_path / "out", processes=1)
    counts = {s: (x["refs"], x["sentences"], x["no_target"]) for s, x in manifest["splits"].items()}
    assert counts == {"train": (3, 4, 1), "val": (1, 1, 0)}
    folder = tmp_path / "out/grefcoco/unc"
    shard = manifest["splits"]["train"]["shards"][0]
    assert shard["no_target"] == 1 and shard["overlapping"] == 0
    (error,) = verify_shards(folder)["errors"]
    assert "splits train and val share 1 images" in error  # as they do here
    (folder / manifest["splits"]["val"]["shards"][0]["name"]).unlink()
    train = samples_of(folder)[1]
    assert [(r["ann_ids"], r["no_target"]) for r in train["refs"]] == [([10, 11], False), ([], True), ([10], False)]
    assert train["anns"].keys() == {"10", "11"}  # crowds are left out


def test_a_ref_of_crowds_alone_is_unusable(tmp_path):
    write_grefer(tmp_path, [*GREFS, ref(4, [12], 1)])
    images = write_images(tmp_path / "images", [image(1)])
    with pytest.raises(UserError, match="ref 4: all its annotations are crowds"):
        shard_refer(tmp_path, images, "grefcoco", "unc", tmp_path / "out", processes=1)
    manifest = shard_refer(tmp_path, images, "grefcoco", "unc", tmp_path / "out", skip_bad=True, processes=1)
    assert manifest["splits"]["train"]["dropped"]["refs"] == 1


def test_minus_one_is_no_annotation_of_refcoco(tmp_path):
    write_refer(tmp_path, "refcoco", "unc", [ref(0, -1, 1)], [image(1)], ANNOTATIONS)
    with pytest.raises(UserError, match="ref 0: annotation -1 is not in"):
        load_source("refcoco", refer_root=tmp_path)


def test_samples_of_several_targets_and_none(tmp_path):
    write_grefer(tmp_path)
    shard_refer(tmp_path, write_images(tmp_path / "i", [image(1)]), "grefcoco", "unc", tmp_path / "out", processes=1)
    index = SplitIndex.load(tmp_path / "out/grefcoco/unc", "train")
    assert index.generalized and not SplitIndex.load(tmp_path / "out/grefcoco/unc", "val").generalized

    def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(4, np.int64), np.ones(4, bool)

    dataset = ExpressionDataset(index, "sentence", 32, tokenize)
    samples = {s["text"]: s for s in (dataset[0, k, 1.0] for k in range(len(dataset)))}
    np.testing.assert_array_equal(samples["both blocks"]["original"], filled((3, 2, 11, 9), (20, 10, 25, 15)))
    assert samples["the zebra"]["original"].shape == (H, W)
    assert not samples["the zebra"]["original"].any() and not samples["the zebra"]["mask"].any()
    pointed = ExpressionDataset(index, "sentence", 32, tokenize, prompts=Prompts.of(["point"], 5))
    refused = [s for s in (pointed[0, k, 1.0] for k in range(len(pointed))) if isinstance(s, UserError)]
    assert len(refused) == 2 and all("no point to draw" in str(e) for e in refused)


# --- metrics ------------------------------------------------------------------------------------------------------


def plain_metrics(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """ReLA's metrics of (prediction, truth), one expression after the other."""
    tp = fn = tn = fp = shared = either = 0
    ious, of_targets = [], []
    for prediction, truth in pairs:
        i, u = int((prediction & truth).sum()), int((prediction | truth).sum())
        shared, either = shared + i, either + u
        if not truth.any():
            tp, fn = (tp + 1, fn) if not prediction.any() else (tp, fn + 1)
            ious.append(1.0 if not prediction.any() else 0.0)
        else:
            fp, tn = (fp + 1, tn) if not prediction.any() else (fp, tn + 1)
            ious.append(i / u)
            of_targets.append(i / u)
    out = {"giou": sum(ious) / len(ious), "ciou": shared / either, "n_acc": tp / (tp + fn), "t_acc": tn / (tn + fp)}
    return out | {f"pr@{x}": sum(v >= x for v in of_targets) / len(of_targets) for x in (0.7, 0.8, 0.9)}


def test_metrics_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(300):
        truth = rng.random((6, 7)) > 0.5
        prediction = truth ^ (rng.random((6, 7)) > rng.choice([0.7, 0.9, 0.97, 1.0]))
        pairs.append((prediction & (rng.random() > 0.2), truth & (rng.random() > 0.3)))
    table = np.array([((p & t).sum(), (p | t).sum(), t.sum()) for p, t in pairs])
    got, want = summarize_generalized(*table.T), plain_metrics(pairs)
    assert got.keys() == want.keys() and all(0 < v < 1 for v in want.values())
    assert got == pytest.approx(want)
    assert got["ciou"] == summarize(*table.T[:2])["oiou"]


def test_metrics_by_hand():
    # a correct no-target, a missed one of 10 pixels, IoU 0.9, a target of 20 pixels that is denied
    got = summarize_generalized(np.array([0, 0, 90, 0]), np.array([0, 10, 100, 20]), np.array([0, 0, 95, 20]))
    assert got == {"giou": 1.9 / 4, "ciou": 90 / 130, "n_acc": 0.5, "t_acc": 0.5, "pr@0.7": 0.5, "pr@0.8": 0.5,
                   "pr@0.9": 0.5}  # fmt: skip


def relas_metrics(samples: list[tuple[np.ndarray, np.ndarray, bool]]) -> dict[str, float]:
    """ReLA's evaluation of (mask, truth, the head says that there is no target), one expression after the other."""
    shared = either = 0
    ious, of_targets, right, wrong = [], [], {True: 0, False: 0}, {True: 0, False: 0}
    for mask, truth, denied in samples:
        i, u = int((mask & truth).sum()), int((mask | truth).sum())
        if not truth.any():
            ious.append(1.0 if denied else 0.0)
            i, u = 0, 0 if denied else u
        else:
            i = 0 if denied else i
            ious.append(i / u)
            of_targets.append(i / u)
        (right if denied == (not truth.any()) else wrong)[not truth.any()] += 1
        shared, either = shared + i, either + u
    out = {"giou": sum(ious) / len(ious), "ciou": shared / either}
    out |= {k: right[b] / (right[b] + wrong[b]) for k, b in (("n_acc", True), ("t_acc", False))}
    return out | {f"pr@{x}": sum(v >= x for v in of_targets) / len(of_targets) for x in (0.7, 0.8, 0.9)}


def test_a_head_that_denies_the_target_counts_as_in_relas_code(generalized, world):
    """Masks that the head vetoes are in the union; an empty mask does not say "no target" where there is a head."""
    index = SplitIndex.load(generalized / "shards/grefcoco/unc", "val")
    dataset = ExpressionDataset(index, "sentence", 32, lambda text: (np.zeros(4, np.int64), np.ones(4, bool)))
    config = validate({"model": {"name": "rela", "size": "swin_t_tiny"}, "data": {"image_size": 32}})
    postprocess = MaskPostprocess.from_config(config)
    assert postprocess.no_target_head and postprocess.no_target_pixels == 0
    g = torch.Generator().manual_seed(0)
    denied, logits = [], []

    def model(image, apart, **inputs):
        assert apart
        kind = torch.randint(4, (len(image),), generator=g)  # empty in a quarter of the masks, right in another
        truths = dataset_masks[len(denied) : len(denied) + len(image)]
        of_batch = [torch.full((32, 32), -9.0), *(torch.randn(2, 32, 32, generator=g))]
        masks = [(of_batch[k] if k < 3 else t.float() * 18 - 9) for k, t in zip(kind.tolist(), truths)]
        none = torch.rand(len(image), generator=g) > 0.5
        denied.extend(none.tolist())
        logits.extend(masks)
        return Prediction(torch.stack(masks), none)

    dataset_masks = [torch.from_numpy(np.asarray(dataset[0, k, 1.0]["mask"])) for k in range(len(dataset))]
    written = {}
    got = evaluate(model, dataset, postprocess, world, batch_size=5, workers=0,
                   collect=lambda batch, i, mask: written.setdefault(int(batch["sample"][i]), mask))  # fmt: skip
    samples = []
    for k, (none, raw) in enumerate(zip(denied, logits)):
        sample = dataset[0, k, 1.0]
        truth = sample["original"].astype(bool)
        mask = postprocess(raw, torch.as_tensor(sample["size"]), truth.shape, 32).numpy()
        np.testing.assert_array_equal(written[k], mask & (not none))
        samples.append((mask, truth, none))
    assert {(m.any(), t.any(), n) for m, t, n in samples} >= {(m, t, n) for m in (0, 1) for t in (0, 1) for n in (0, 1)}
    want = relas_metrics(samples)
    assert {k: got[k] for k in want} == pytest.approx(want) and 0 < want["ciou"] < 1 and 0 < want["pr@0.7"]
    assert got["oiou"] == got["ciou"]
    emptied = relas_metrics([(m & (not n), t, n) for m, t, n in samples])
    assert emptied["ciou"] > want["ciou"]


def test_relas_head_and_its_mask_apart():
    model = tiny("rela").eval()
    with torch.no_grad():
        for bias, says in ((9.0, True), (-9.0, False)):
            model.predictor.no_target[2].bias.copy_(torch.tensor([0.0, bias]))
            logits, none = model(*inputs(), apart=True)
            assert none.tolist() == [says, says] and logits.max() > logits.min()
            assert torch.equal(model(*inputs()), torch.full_like(logits, -20) if says else logits)
    with pytest.raises(UserError, match="model.name rela says by itself that there is no target"):
        validate({"model": {"name": "rela", "size": "swin_t_tiny"}, "eval": {"no_target_pixels": 10}})


# --- end to end ---------------------------------------------------------------------------------------------------

FEW = 3000  # pixels that a prediction must have: what the tiny model predicts lies on both sides of it


@pytest.fixture(scope="module")
def generalized(refer_tree, tmp_path_factory) -> Path:
    """The sample set's pictures with expressions of one object, of two, and of none; sharded."""
    folder = tmp_path_factory.mktemp("grefcoco")
    refs = pickle.loads((refer_tree / "refcoco/refs(unc).p").read_bytes())
    instances = json.loads((refer_tree / "refcoco/instances.json").read_text())
    crowds = {a["id"] for a in instances["annotations"] if a["iscrowd"]}
    grefs, of_image = [], {}
    for r in refs:
        if r["ann_id"] not in crowds:
            of_image.setdefault(r["image_id"], []).append(r)
    for of_one in of_image.values():
        first = of_one[0]
        texts = [["the purple elephant", "nothing here"], ["everything there is"]]
        grefs += [r | {"ann_id": [r["ann_id"]], "category_id": [r["category_id"]]} for r in of_one]
        grefs.append(first | {"ann_id": [-1], "category_id": [-1]})
        grefs.append(first | {"ann_id": [r["ann_id"] for r in of_one]})
        for r, of in zip(grefs[-2:], texts):
            r["sentences"] = [{"sent_id": 0, "raw": t, "sent": t, "tokens": t.split()} for t in of]
    sent_id = 0
    for n, r in enumerate(grefs):
        r["ref_id"] = n
        r["sentences"] = [s | {"sent_id": sent_id + k} for k, s in enumerate(r["sentences"])]
        sent_id += len(r["sentences"])
    (folder / "refer/grefcoco").mkdir(parents=True)
    (folder / "refer/grefcoco/grefs(unc).json").write_text(json.dumps(grefs))
    shutil.copy(refer_tree / "refcoco/instances.json", folder / "refer/grefcoco")
    dit_ds("data", "shard", "--refer-root", folder / "refer", "--images", refer_tree / "images/train2014",
           "--dataset", "grefcoco", "--out", folder / "shards", "--processes", "1")  # fmt: skip
    return folder


def test_points_of_what_is_not_there_are_refused_at_the_start(generalized, tmp_path, refusal):
    config = tiny_config(generalized / "shards", tmp_path / "run")
    config["data"] |= {"dataset": "grefcoco", "split_by": "unc"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    says = "has expressions without a target, of which no box can be drawn"
    for prompts in ("[text, box]", "[box]"):
        assert says in refusal("train", "--config", tmp_path / "c.yaml", "--data.prompts", prompts)
        c = Context(config=validate(config | {"data": config["data"] | {"prompts": yaml.safe_load(prompts)}}))
        (check,) = run_checks([configured.shards], c, 60)
        assert check.status == "fail" and says in check.found
    assert not (tmp_path / "run").exists()


def test_eval_with_points_of_what_is_not_there(trained, refusal):
    assert "of which no point can be drawn" in refusal("eval", trained / "run", "--prompt", "point")


@pytest.fixture(scope="module")
def trained(generalized) -> Path:
    """A run of a few steps on it."""
    config = tiny_config(generalized / "shards", generalized / "run")
    config["data"] |= {"dataset": "grefcoco", "split_by": "unc"}
    config["eval"] = {"no_target_pixels": FEW, "threshold": 0.2}
    (generalized / "tiny.yaml").write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", generalized / "tiny.yaml", "--train.max_steps", "6")
    return generalized


def masks_of(folder: Path, refer: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, truth) of each written mask, the truth from the annotation file."""
    instances = json.loads((refer / "grefcoco/instances.json").read_text())
    images = {i["id"]: i for i in instances["images"]}
    annotations = {a["id"]: a for a in instances["annotations"]}
    grefs = json.loads((refer / "grefcoco/grefs(unc).json").read_text())
    truths: dict[int, list[np.ndarray]] = {}
    for r in (r for r in grefs if r["split"] == "val"):
        height, width = images[r["image_id"]]["height"], images[r["image_id"]]["width"]
        rles = [annotation_rle(annotations[a], height, width) for a in r["ann_id"] if a != -1]
        mask = coco.decode(coco.merge(rles)) > 0 if rles else np.zeros((height, width), bool)
        truths.setdefault(r["image_id"], []).extend([mask] * len(r["sentences"]))
    pairs = []
    for image_id, of_image in truths.items():
        files = sorted(folder.glob(f"{image_id:012d}_*.png"))
        assert len(files) == len(of_image)
        pairs += [(np.asarray(Image.open(f)) > 0, t) for f, t in zip(files, of_image)]
    return pairs


def test_a_run_is_evaluated_by_the_metrics_of_generalized_sets(trained, tmp_path):
    """One rank equals two, and both what a plain loop makes of the masks that are written."""
    arguments = ("eval", trained / "run", "--split", "val", "--json")
    one = json.loads(dit_ds(*arguments, "--write-masks", tmp_path / "masks").stdout.splitlines()[-1])
    pairs = masks_of(tmp_path / "masks", trained / "refer")
    areas = [int(p.sum()) for p, _ in pairs]
    assert one["n"] == len(pairs) and min(areas) == 0 and max(areas) >= FEW
    assert all(a == 0 or a >= FEW for a in areas)
    want = plain_metrics(pairs)
    assert {k: one[k] for k in want} == pytest.approx(want)
    assert one["oiou"] == one["ciou"] and {"miou", "p@0.5"} <= one.keys()
    assert json.loads(dit_ds(*arguments, ranks=2).stdout.splitlines()[-1]) == one


@pytest.mark.parametrize("name", ["dit_sam", "rela"])
def test_a_file_of_results_scores_as_the_model_does(trained, tmp_path, name):
    """Also where a no-target head vetoes masks, which stay in the union, and masks are too small to count."""
    config = tiny_config(trained / "shards", tmp_path / "run")
    config["data"] |= {"dataset": "grefcoco", "split_by": "unc"}
    if name == "rela":
        config |= {"model": {"name": "rela", "size": "swin_t_tiny"}, "train": {"batch_size": 8}}
        config["data"]["resize"] = "stretch"
    path = write_random_model(config, tmp_path / "m.safetensors") if name == "rela" else trained / "run"
    dit_ds("predict", path, "--split", "val", "--out", tmp_path / "out", "--workers", "0")
    results = tmp_path / "out/results.json"
    says = [r["no_target"] for r in json.loads(results.read_text())]
    assert 0 < sum(says) < len(says)
    score, model = ("--predictions", results), json.loads(dit_ds("eval", path, "--json").stdout)
    found = json.loads(dit_ds("eval", path, *score, "--json").stdout)
    assert {k: v for k, v in found.items() if k != "predictions"} == {k: v for k, v in model.items() if k != "prompt"}
    alone = ("--data-root", trained / "shards", "--dataset", "grefcoco", "--json")
    assert json.loads(dit_ds("eval", *score, *alone).stdout) == found


def test_training_evaluates_so_too_and_other_sets_are_as_before(trained):
    line = [json.loads(x) for x in (trained / "run/metrics.jsonl").read_text().splitlines() if '"eval"' in x][-1]
    assert {"giou", "ciou", "n_acc", "t_acc", "pr@0.7", "pr@0.8", "pr@0.9", "miou"} <= line.keys()
    left = json.loads(next((trained / "run/evaluations").glob("val-*.json")).read_text())
    assert left["no_target_pixels"] == FEW and "giou" in left


@pytest.mark.parametrize("name", ["lavt", "rela"])
def test_methods_learn_from_a_batch_without_targets(name):
    model = tiny(name).train()
    loss = model.loss(model(*inputs()), torch.zeros(2, 64, 64, dtype=torch.uint8), torch.ones(2))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and loss > 0 and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_the_papers_loss_teaches_emptiness(dice):
    logits = torch.zeros(2, 16, 16, requires_grad=True)
    loss = segmentation_loss(logits, torch.zeros(2, 64, 64), torch.ones(2), dice)
    loss.backward()
    assert torch.isfinite(loss) and (logits.grad > 0).all()  # a step goes down everywhere
