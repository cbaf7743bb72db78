"""Everything that the training loop works on, made once before it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing import weights
from dit_ds.checkpointing.local import LocalSaver, local_folder, other_runs
from dit_ds.checkpointing.local_resume import new_run_id, newest_checkpoint, run_id
from dit_ds.checkpointing.nodes import node_name
from dit_ds.checkpointing.writer import Saver, restore
from dit_ds.config.schema import RunConfig, TrainConfig
from dit_ds.data.build import build_train_dataset, build_val_dataset
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.loader import Loader, make_loader
from dit_ds.data.loading.sampler import TrainBatchSampler
from dit_ds.data.progress import progress_bar
from dit_ds.distributed import World, all_or_none, gather_objects, share_cores
from dit_ds.engine import engine as ds
from dit_ds.engine.batch_split import exact_split
from dit_ds.engine.batchnorm import SyncedBatchNormStats
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.engine.deepspeed_schema import require_monitors
from dit_ds.engine.optimizers import muon_matrices
from dit_ds.engine.rates import part_rates, rate_factors
from dit_ds.engine.zero_state import TrainingState
from dit_ds.errors import UserError
from dit_ds.files import GIB
from dit_ds.models.attention import require
from dit_ds.models.build import build_model
from dit_ds.models.segmenter import Segmenter
from dit_ds.models.text_encoder import text_config
from dit_ds.planning.attention_probe import choose_kernels
from dit_ds.planning.flops import step_flops
from dit_ds.planning.gpus import peak_flops
from dit_ds.planning.memory.allocator_settings import described
from dit_ds.training.requests import Requests
from dit_ds.training.run_log import RunLog
from dit_ds.training.signals import StopSignal
from dit_ds.training.throughput import FlopsPerSample
from dit_ds.training.watchdog import Watchdog


class Datasets(NamedTuple):
    """The datasets of a run: one to train on, one to evaluate on, without which it never evaluates."""

    train: ExpressionDataset
    val: ExpressionDataset | None


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside weights, optimizer states and the sampler's state."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # the current epoch, counted from 0
    batch: int = 0  # global batches taken in it
    seconds: float = 0.0  # of training, without evaluation and saving
    best_score: float = -1.0  # mIoU; gIoU for datasets with expressions that have no target
    best_step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last evaluation
    evaluated: int = 0  # the step of the last evaluation
    bad_samples: list[str] = field(default_factory=list)  # damaged samples that were skipped, each once


@dataclass
class Run:
    """The parts of a run and its counters; `set_up` makes it."""

    config: RunConfig
    world: World
    stop_signal: StopSignal
    datasets: Datasets
    engine: Any  # deepspeed.DeepSpeedEngine
    state: TrainingState
    batchnorm: SyncedBatchNormStats
    batches: TrainBatchSampler
    loader: Loader
    total_steps: int
    flops: FlopsPerSample
    part_factors: dict[str, float]  # of the learning rate, see `part_rates`; empty where all parameters have one rate
    log: RunLog
    saver: Saver
    local: LocalSaver | None  # saves to the nodes' disks; also in `saver`
    resume_keys: dict[str, Any]  # what must be the same when the run is resumed
    frozen_digest: str  # of the weights that are not trained; on rank 0
    progress: Progress
    progress_bar: tqdm
    watchdog: Watchdog
    requests: Requests  # of rank 0
    skipped_in_a_row: int = 0  # optimizer steps whose gradient was not finite, since the last that was
    save_seconds: float = 0.0  # for which the loop waited when the pending checkpoint was begun
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was begun, or the run was set up
    local_fails: bool = False  # the last checkpoint on the nodes' disks met an error
    local_failures: int = 0  # of those checkpoints, how many are not whole
    copy_failures: int = 0  # and how many could not be copied to other nodes


def check_request(config: RunConfig, world_size: int) -> Datasets:
    """Open the datasets, and check what a rank can check without the others.

    Raises:
        UserError: a file is missing, or parts of the configuration contradict each other.
    """
    require_monitors(deepspeed_config(config, world_size))
    local_folder(config)
    text_config(config.text.name, config.text.layers, config.data.tokens)
    return Datasets(build_train_dataset(config), build_val_dataset(config))


def set_up(config: RunConfig, datasets: Datasets, world: World, stop_signal: StopSignal) -> Run:
    """Model, engine, loader and log of a run, from its newest whole checkpoint where there is one. Collective.

    The run's folder is written to only once nothing can be refused any more.

    Raises:
        UserError: the checkpoint is of another run or model, or the folder can't be written.
    """
    threads = share_cores(world.world_size, config.data.workers)
    dtype = DeepSpeedJson(deepspeed_config(config, world.world_size)).dtype
    require(config.model.attention, world.device.type, dtype)
    newest = newest_checkpoint(config, world)
    resume_keys = _resume_keys(config, datasets.train, dtype)
    model, progress, loaded = _load_model(config, newest, resume_keys)
    rates, part_factors = _rates(model, config.train)
    log = RunLog(config, world, None if newest is None else progress.step, progress.evaluated)
    log.log(f"PyTorch's threads: {threads}")
    if world.device.type == "cuda":
        log.log(f"{described(os.environ)}; dit-ds memory plan --alloc-conf says what others would reserve")
    if loaded is not None and newest is None:
        log.describe_checkpoint(loaded)
    _describe(model, rates, config, datasets.train, log)
    _choose_attention(model, config, world, log)
    frozen_digest = weights.frozen_digest(model) if world.main else ""
    frozen = _store_frozen(model, config, world, frozen_digest, newest)
    model.checkpoint_activations(config.train.activation_checkpointing)
    if config.train.compile:
        model.compile_blocks()
    engine = ds.initialize(model, config, world, monitors=True)
    state = TrainingState(engine, config.train.ema_decay)
    state.check_coverage()
    batchnorm = SyncedBatchNormStats(engine.module)
    if newest is not None:
        start = time.perf_counter()
        restore(engine, state, newest)
        log.log(f"resumed from {newest} at step {progress.step} ({time.perf_counter() - start:.1f} s to load)")
        for change in _changed_rates(checkpoint.read_meta(newest)["config"], config.train):
            log.log(change)
    local = _local_saver(config, world, state, log, newest)
    saver = Saver(config, world, state, frozen, local)
    batches = _make_batches(config, datasets.train, world, engine, log)
    if newest is not None:
        batches.resume(checkpoint.read_meta(newest))
        progress.batch = batches.first_batch
    pin, d = world.device.type == "cuda", config.data
    loader = make_loader(datasets.train, batches, d.workers, pin=pin, timeout=d.worker_timeout)
    epochs_steps = config.train.epochs * batches.batches_per_epoch
    total_steps = min(epochs_steps, config.train.max_steps or epochs_steps)
    log.started(progress.step, total_steps)
    return Run(
        config, world, stop_signal, datasets, engine,
        state=state, batchnorm=batchnorm, batches=batches, loader=loader, total_steps=total_steps,
        flops=_flops_per_sample(config, world, dtype), part_factors=part_factors, log=log, saver=saver,
        local=local, resume_keys=resume_keys, frozen_digest=frozen_digest, progress=progress,
        progress_bar=_progress_bar(world, progress.step, total_steps),
        watchdog=Watchdog(world, config.log.stall_seconds, lambda why: log.ended("stalled", progress.step, why)),
        requests=Requests(config.run_dir),
    )  # fmt: skip


def _describe(
    model: Segmenter, rates: dict[str, float], config: RunConfig, data: ExpressionDataset, log: RunLog
) -> None:
    """Log what trains, how, and what of the data is to be known."""
    log.describe_parameters(model, rates)
    if muon := muon_matrices(model, config.train):
        log.log(f"Muon takes {len(muon)} matrices of hidden layers, AdamW the rest")
    for note in data.index.notes:
        log.log(note)


def _choose_attention(model: Segmenter, config: RunConfig, world: World, log: RunLog) -> None:
    """Measure which attention kernels are the fastest, see `choose_kernels`. Collective."""
    ds_json = DeepSpeedJson(deepspeed_config(config, world.world_size))
    split = exact_split(config.train.batch_size, world.world_size, ds_json.micro_batch)
    words = config.data.tokens + (0 if config.model.static_form == "add" else config.model.static_tokens)
    encoder = getattr(model, "image_encoder", None)
    requested, dtype = config.model.attention, ds_json.compute_dtype
    for line in choose_kernels(encoder, requested, words, micro_batch=split.micro_batch, dtype=dtype, world=world):
        log.log(line)


def _resume_keys(config: RunConfig, data: ExpressionDataset, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "manifest_sha": data.index.manifest_sha,
        "unit": config.data.unit,
        "order": config.data.sample_order,
        "dtype": str(dtype),
        "optimizer": config.train.optimizer,
    }


def _rates(model: Segmenter, t: TrainConfig) -> tuple[dict[str, float], dict[str, float]]:
    """The learning rate of each trained parameter by name, and its factors for the metrics; none where all have one.

    Raises:
        UserError: see `rate_factors`.
    """
    factors, muon = rate_factors(model, t), muon_matrices(model, t)
    if set(factors.values()) == {1.0} and not muon:
        return {}, {}
    rates = {n: (t.muon_lr if n in muon else t.lr) * x for n, x in factors.items()}
    return rates, part_rates(factors) | ({"muon": t.muon_lr / t.lr} if muon else {})


def _changed_rates(saved: dict[str, Any], t: TrainConfig) -> list[str]:
    """What of the learning rates is another than in the checkpoint, which is allowed: it holds from here on."""
    before, now = saved.get("train", {}), t.model_dump(mode="json")
    default = TrainConfig().model_dump(mode="json")
    return [
        f"train.{key} is {now[key]} from here on, {was} until now"
        for key in ("lr", "lr_scale", "layer_decay", "muon_lr")
        if (was := before.get(key, default[key])) != now[key]
    ]


def _load_model(
    config: RunConfig, newest: Path | None, resume_keys: dict[str, Any]
) -> tuple[Segmenter, Progress, dict[str, list[str]] | None]:
    """The model with its weights, how far the run is, and which tensors `model.checkpoint` gave, if it was read."""
    model, progress, loaded = build_model(config), Progress(), None
    if config.model.checkpoint and (newest is None or not (newest / checkpoint.FROZEN).exists()):
        loaded = model.load_pretrained(config.model.checkpoint)
    if newest is not None:
        checkpoint.check_resumable(newest, resume_keys)
        progress = Progress(**checkpoint.read_meta(newest)["progress"])
        weights.load_weights(model, newest)
    return model, progress, loaded


def _store_frozen(model: Segmenter, config: RunConfig, world: World, digest: str, newest: Path | None) -> Path | None:
    """Write the weights that are not trained, once for the run. Collective."""
    if config.checkpoint.frozen != "store":
        return None
    path, error = None, None
    try:
        if world.main:
            path = weights.store_frozen(model, digest, config.run_dir)
            if newest is not None and not (newest / checkpoint.FROZEN).exists():
                checkpoint.relink_frozen(config.run_dir, path)
    except UserError as e:
        error = e
    all_or_none(error)
    return path


def _local_saver(
    config: RunConfig, world: World, state: TrainingState, log: RunLog, newest: Path | None
) -> LocalSaver | None:
    """For `checkpoint.local`. A run that starts anew has a new ID: what lies on disks of a former one isn't its. Collective."""
    folder = local_folder(config)
    if folder is None:
        return None
    known = run_id(config.run_dir) if newest is not None else None
    identity = gather_objects(known or new_run_id())[0]
    local = LocalSaver(config, world, state, folder, identity)
    copies = "with copies on the next node" if len(local.nodes) > 1 else "one node, so without copies on another"
    minutes = config.checkpoint.local_every_minutes
    log.log(f"checkpoints to {local.folder} on {len(local.nodes)} nodes every {minutes:g} minutes, {copies}")
    for node, (count, size) in dict(gather_objects((node_name(), other_runs(folder, identity)))).items():
        if count:
            log.log(f"{count} other runs' checkpoints take {size / GIB:.2f} GiB of {folder} on {node}: remove those of "
                    "runs that were given up")  # fmt: skip
    return local


def _make_batches(
    config: RunConfig, data: ExpressionDataset, world: World, engine: Any, log: RunLog
) -> TrainBatchSampler:
    micro_batch = engine.train_micro_batch_size_per_gpu()
    shares = f"{micro_batch} a rank at once, {engine.gradient_accumulation_steps()} times"
    log.log(f"batch of {config.train.batch_size} on {world.world_size} ranks: {shares}")
    samples = data.index.samples(config.data.unit, config.data.sample_order)
    return TrainBatchSampler(
        samples, config.train.batch_size, micro_batch, rank=world.rank, world_size=world.world_size, seed=config.seed
    )


def _flops_per_sample(config: RunConfig, world: World, dtype: torch.dtype) -> FlopsPerSample:
    """For rank 0's report; FLOPs are counted only where the GPU's peak is known."""
    peak = peak_flops(torch.cuda.get_device_name(), dtype) if world.device.type == "cuda" else None
    flops = step_flops(config) if peak and world.main else None
    return FlopsPerSample((config.data.image_size // 16) ** 2 + config.data.tokens, flops, peak)


def _progress_bar(world: World, step: int, total_steps: int) -> tqdm:
    return progress_bar(
        desc="train", total=total_steps, initial=step, unit="step", disable=not world.main, mininterval=2
    )
