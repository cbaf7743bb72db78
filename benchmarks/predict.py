"""`dit-ds predict` over a folder of pictures against `dit-ds eval` of the same pictures and expressions in shards.

Photos as `photos.py` makes them, the demo's model with random weights, which is small: what is not the model counts most.
Both are timed without the model's load, with their worker processes' start; of `predict` everything that it writes. They
take turns, and a share is the median of the rounds' ratios.

    python benchmarks/predict.py --json
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from photos import DATASET, write_photos

from dit_ds.checkpointing.weights import load_model, save_tensors
from dit_ds.config.load import load_config
from dit_ds.data.build import build_eval_dataset
from dit_ds.data.shards.write import shard_refer
from dit_ds.distributed import connect, disconnect
from dit_ds.evaluation.evaluate import evaluate
from dit_ds.evaluation.postprocess import MaskPostprocess
from dit_ds.models.build import build_model
from dit_ds.visualize.many_predictions import FORMATS, ManyPictures, predict_many

CONFIG = Path(__file__).parent.parent / "configs/sample.yaml"
DISTINCT = 50  # files; the others are links to them


def write_set(folder: Path, pictures: int, expressions: int) -> Path:
    """Photos, their shards, and up to so many expressions of each as a .jsonl file, which is returned."""
    write_photos(folder, pictures, min(DISTINCT, pictures), splits={"val": 1.0})
    refs = pickle.loads((folder / DATASET / "refs(unc).p").read_bytes())
    refs = list({r["image_id"]: r for r in reversed(refs)}.values())[::-1]  # the first one of each picture
    for ref in refs:
        ref["sentences"], ref["sent_ids"] = ref["sentences"][:expressions], ref["sent_ids"][:expressions]
    (folder / DATASET / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    shard_refer(folder, folder / "images", DATASET, "unc", folder / "shards", processes=1)
    lines = [{"image": f"{r['image_id'] - 1}.jpg", "text": s["sent"], "sent_id": s["sent_id"]}
             for r in refs for s in r["sentences"]]  # fmt: skip
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(map(json.dumps, lines)))
    return texts


def write_model(folder: Path, size: int) -> Path:
    """The demo's model with random weights, as `dit-ds export` writes it."""
    overrides = ["--data.root", str(folder / "shards"), "--data.dataset", DATASET, "--data.image_size", str(size)]
    config = load_config(CONFIG, overrides)
    torch.manual_seed(0)
    state = {n: x.contiguous() for n, x in build_model(config).state_dict().items()}
    header = {"step": 1, "epoch": 1, "config": config.model_dump(mode="json")}
    path = folder / "model.safetensors"
    save_tensors(state, path, {"dit_ds": json.dumps(header), "format": "pt"})
    return path


def measure(folder: Path, texts: Path, path: Path, rounds: int, batch: int, workers: int) -> list[dict[str, Any]]:
    """Expressions a second of `eval`, and of `predict` in each format."""
    model, config, _ = load_model(path)
    dataset, postprocess, world = build_eval_dataset(config, "val"), MaskPostprocess.from_config(config), connect()
    n = len(dataset)
    seconds: dict[str, list[float]] = {name: [] for name in ("eval", *FORMATS)}
    for i in range(rounds):
        start = time.perf_counter()
        evaluate(model, dataset, postprocess, world, batch_size=batch, workers=workers)
        seconds["eval"].append(time.perf_counter() - start)
        for form in FORMATS:
            asked = ManyPictures(
                images=str(folder / "images"), texts=str(texts), form=form, batch_size=batch, workers=workers
            )
            said = predict_many(str(path), str(folder / f"out_{form}_{i}"), asked)
            assert said["expressions"] == n and said["before"] == 0, said
            seconds[form].append(said["seconds"])
        print({k: round(v[-1], 1) for k, v in seconds.items()}, file=sys.stderr, flush=True)
    disconnect()
    rows = []
    for form in FORMATS:
        ratios = [a / b for a, b in zip(seconds["eval"], seconds[form])]
        rows.append(
            {"format": form, "expressions": n, "eval_per_second": round(n / statistics.median(seconds["eval"]), 1),
             "predict_per_second": round(n / statistics.median(seconds[form]), 1),
             "share": round(statistics.median(ratios), 3), "shares": [round(r, 3) for r in ratios]}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    rows = []
    for expressions in (1, 3):
        with tempfile.TemporaryDirectory(prefix="predict_") as scratch:
            folder = Path(scratch)
            texts = write_set(folder, args.pictures, expressions)
            path = write_model(folder, args.image_size)
            found = measure(folder, texts, path, args.rounds, args.batch_size, args.workers)
            rows += [{"pictures": args.pictures} | row for row in found]
    how = {"rounds": args.rounds, "image_size": args.image_size, "batch_size": args.batch_size, "workers": args.workers}
    result = common.conditions("cpu") | {"benchmark": "predict", "threads": torch.get_num_threads()} | how
    result["rows"] = rows
    text = f"# predict over {args.pictures} pictures against eval of the same expressions\n\n"
    text += f"{result['machine']}, {result['date']}; torch {result['torch']}. `python benchmarks/predict.py`\n\n"
    text += f"Photos of 640x480, the demo's model (ViT-T, {args.image_size} px) with random weights, batch {args.batch_size}, "
    text += f"{args.workers} worker, {result['threads']} thread; medians of {args.rounds} rounds in turns.\n\n"
    columns = {
        "pictures": lambda r: r["pictures"], "expressions": lambda r: r["expressions"], "format": lambda r: r["format"],
        "`eval`, expressions/s": lambda r: r["eval_per_second"],
        "`predict`, expressions/s": lambda r: r["predict_per_second"], "share": lambda r: f"{r['share']:.2f}",
    }  # fmt: skip
    common.write(args.out, "predict", result, text + common.table(rows, columns))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
