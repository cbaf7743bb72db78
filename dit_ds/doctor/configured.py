"""Checks of a configuration and of what it names: batch, shards, weights, the run's folder."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dit_ds.checkpointing.local import KEEP, local_folder, other_runs
from dit_ds.checkpointing.local_resume import run_id
from dit_ds.config.schema import RunConfig, TextConfig
from dit_ds.doctor.check import Check, Context
from dit_ds.doctor.node import addresses, write_and_remove
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.engine.deepspeed_schema import require_monitors
from dit_ds.errors import UserError
from dit_ds.files import GIB, full_disk_is_user_error
from dit_ds.models.segmenter import Segmenter


def configuration(c: Context) -> Iterator[Check]:
    """Whether the batch can be split over the ranks, and the DeepSpeed JSON is valid."""
    ds = DeepSpeedJson(deepspeed_config(c.run_config, c.world_size))
    require_monitors(ds.raw)
    micro, steps, stage = ds.micro_batch, ds.accumulation, ds.stage
    text = f"batch {c.run_config.train.batch_size} is micro-batch {micro} x {c.world_size} ranks x {steps} accumulated"
    yield Check("configuration", "ok", f"{text}, ZeRO stage {stage}")


def shards(c: Context) -> Iterator[Check]:
    """Manifest, sizes of shards, one sample that depends on the rank, and the speed of reading."""
    from dit_ds.data.build import require_targets, run_val_index, train_index
    from dit_ds.data.loading.dataset import ExpressionDataset

    d = c.run_config.data
    index = train_index(d, evaluates=c.run_config.eval.every_epochs > 0)
    require_targets(index, d.train_split, d.prompts)
    if (val := run_val_index(c.run_config)) is not None:
        require_targets(val, d.val_split, [d.default_prompt])
    dataset = ExpressionDataset(
        index, "ref", d.image_size, lambda text: (np.zeros(1, np.int64), np.ones(1, bool)), streamed=d.streamed
    )
    sample = dataset[(0, c.rank * len(dataset) // max(1, c.world_size) % len(dataset), 1.0)]
    if isinstance(sample, UserError):
        raise sample
    found = f"{d.root}: {len(index.image_ids())} images in {len(index.shards)} shards of {d.train_split}"
    found += "".join(f"; {note}" for note in index.notes)
    if d.streamed:
        yield Check("shards", "ok", found)
        return
    rate = _read_rate(Path(index.shards[c.rank % len(index.shards)]))
    slow = rate < 20
    found += f", read at {rate:.0f} MB/s"
    yield Check("shards", "warn" if slow else "ok", found, "copy the shards to a faster file system" if slow else "")


def _read_rate(path: Path) -> float:
    """MB/s of the file's first 32 MiB; its pages are dropped from the page cache before, where the system allows."""
    with open(path, "rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, count = time.perf_counter(), 0
        while count < 32 << 20 and time.perf_counter() - start < 5 and (part := f.read(1 << 20)):
            count += len(part)
    return count / 1e6 / (time.perf_counter() - start)


def sam_checkpoint(c: Context) -> Iterator[Check]:
    """The file to start from, by names and shapes: the tensors themselves are not read."""
    from dit_ds.models import authors
    from dit_ds.models.checkpoint_file import read_tensors
    from dit_ds.models.sam_checkpoint import check_sam_checkpoint

    path, m = c.run_config.model.checkpoint, c.run_config.model
    if path is None:
        yield Check("sam checkpoint", "ok", "none configured: random weights")
    elif Path(path).is_file() and (said := authors.check(path, _model_shapes(c.run_config), m.scheme)):
        yield Check("sam checkpoint", "ok", f"{path}, {said}")
    elif m.name == "dit_sam":
        yield Check("sam checkpoint", "ok", f"{path}, {check_sam_checkpoint(path, _model_shapes(c.run_config))}")
    else:
        yield Check("sam checkpoint", "ok", f"{path}, {len(read_tensors(path, values=False))} tensors")


def _model_shapes(config: RunConfig) -> dict[str, torch.Tensor]:
    """The model's tensors without data; of SAM's parts alone where the text encoder, of which another check tells, is
    not there."""
    from dit_ds.models.text_encoder import offline_text

    try:
        return _fake_model(config).state_dict()
    except UserError:
        stand_in = config.model_copy(update={"text": TextConfig(name="bert-base-uncased")})
        with offline_text(stand_in):
            state = _fake_model(stand_in).state_dict()
    return {n: x for n, x in state.items() if n.startswith(("image_encoder.", "prompt_encoder.", "mask_decoder."))}


def _fake_model(config: RunConfig) -> Segmenter:
    """The configuration's model with tensors that have no data.

    Raises:
        UserError: there is no text encoder.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dit_ds.models.build import build_model

    with FakeTensorMode():
        return build_model(config, text_weights=False)


def text_encoder(c: Context) -> Iterator[Check]:
    """The encoder's files on this machine; the hub is not asked."""
    from dit_ds.models.text_encoder import load_tokenizer, resolve_name, text_config

    name = resolve_name(c.run_config.text.name)
    needed: list[tuple[str, ...]] = [("config.json",)]  # of each tuple, one file
    files = ("model.safetensors", "pytorch_model.bin")
    needed += [] if c.run_config.text.random_init else [(*files, *(f"{f}.index.json" for f in files))]
    absent = [files[0] for files in needed if not any(_on_disk(name, f) for f in files)]
    if not absent:
        load_tokenizer(c.run_config.text.tokenizer or name)
        text_config(name, c.run_config.text.layers, c.run_config.data.tokens)
        yield Check("text encoder", "ok", name)
        return
    remedy = f"hf download {name} where there is a network, or set text.name to a folder"
    offline = c.facts.get("offline") or not addresses("huggingface.co")
    found = f"{name} has no {' and no '.join(absent)} on this machine"
    if offline or Path(name).is_dir():
        yield Check(
            "text encoder", "fail", f"{found}, and the hub can't be asked" * (not Path(name).is_dir()) or found, remedy
        )
    else:
        yield Check("text encoder", "warn", f"{found}: every rank will ask the hub", remedy)


def _on_disk(name: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return (Path(name) / file).exists()
    return isinstance(try_to_load_from_cache(name, file), str)


def run_folder(c: Context) -> Iterator[Check]:
    """Whether this rank can write there, and whether there is space for the checkpoints."""
    run = Path(c.run_config.run_dir).absolute()
    free, each = _writable_gib(run, c), _checkpoint_bytes(c) / GIB
    text = f"{run} can be written, {free:.1f} GiB free"
    count = c.run_config.checkpoint.keep + 2  # the best, and the one being written
    if each:
        text += f" for {count} checkpoints of about {each:.2f}"
    status = "fail" if free < each else "warn" if free < each * count else "ok"
    remedy = "" if status == "ok" else "free some, choose another --run_dir, or lower checkpoint.keep"
    yield Check("run folder", status, text, remedy)


def local_disk(c: Context) -> Iterator[Check]:
    """`checkpoint.local`: whether this rank can write there, and whether there is space."""
    folder = local_folder(c.run_config)
    if folder is None:
        return
    free = _writable_gib(folder.absolute(), c)
    share = _checkpoint_bytes(c) * c.local_ranks / max(1, c.world_size) / GIB  # of the node's ranks
    copies = 2 if c.nodes > 1 else 1
    each, count = share * copies, KEEP + 1  # one is being written
    text = f"{folder} can be written, {free:.1f} GiB free"
    if each:
        text += f" for {count} checkpoints of about {each:.2f} on this node"
        text += ", another node's copies included" * (copies > 1)
    others, size = other_runs(folder, run_id(c.run_config.run_dir))
    if others:
        text += f"; {others} other runs' run_* take {size / GIB:.2f}: remove those of runs that were given up"
    status = "fail" if free < each else "warn" if free < each * count else "ok"
    yield Check("local disk", status, text, "" if status == "ok" else "free some, or choose another checkpoint.local")


def _writable_gib(folder: Path, c: Context) -> float:
    """The free space where `folder` is or will be made, in GiB.

    Raises:
        UserError: this rank can't write there.
    """
    there = next(p for p in [folder, *folder.parents] if p.exists())
    with full_disk_is_user_error(there):
        write_and_remove(there, c.rank)
    return shutil.disk_usage(there).free / GIB


def _checkpoint_bytes(c: Context) -> int:
    """fp32 masters, Adam's two moments and the moving average of trained parameters; 0 if the model can't be built."""
    config = c.run_config
    try:
        model = _fake_model(config)
    except UserError:  # no text encoder: the check `text_encoder` reports it
        return 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained * (16 if config.train.ema_decay else 12)
