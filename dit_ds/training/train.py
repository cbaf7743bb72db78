"""Training: one loop, read from top to bottom."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dit_ds.checkpointing import reader as checkpoint
from dit_ds.checkpointing import weights
from dit_ds.checkpointing.writer import Saver, restore
from dit_ds.config.schema import RunConfig
from dit_ds.data.build import build_eval_dataset, build_train_dataset
from dit_ds.data.loading.dataset import ExpressionDataset
from dit_ds.data.loading.loader import iterate, make_loader, worker_failures
from dit_ds.data.loading.sampler import TrainBatchSampler
from dit_ds.distributed import World, all_or_none, connect, disconnect, gather_objects, set_environment
from dit_ds.engine import engine as ds
from dit_ds.engine.batchnorm import SyncedBatchNormStats
from dit_ds.engine.deepspeed_json import deepspeed_config, model_dtype
from dit_ds.engine.zero_state import TrainingState
from dit_ds.errors import Interrupted, RunFailed, UserError
from dit_ds.evaluation.evaluate import evaluate
from dit_ds.evaluation.postprocess import MaskPostprocess, model_inputs
from dit_ds.models.attention import require
from dit_ds.models.build import build_model
from dit_ds.models.segmenter import Segmenter
from dit_ds.models.text_encoder import text_config
from dit_ds.planning.flops import step_flops
from dit_ds.planning.gpus import peak_flops
from dit_ds.training.run_log import RunLog
from dit_ds.training.schedule import learning_rate, set_learning_rate
from dit_ds.training.signals import StopSignal
from dit_ds.training.throughput import FlopsPerSample, ThroughputMeter
from dit_ds.training.watchdog import Watchdog

_MOST_SKIPPED = 50  # steps in a row, after which nothing is to be hoped for


@dataclass
class Progress:
    """Where a run is: what a checkpoint holds besides weights and optimizer states."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # the epoch under way
    batch: int = 0  # global batches of it that were taken
    seconds: float = 0.0  # of training; evaluation and saving not counted
    best_score: float = -1.0  # mIoU, of sets with expressions without target gIoU
    best_step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last evaluation
    evaluated: int = 0  # the step it was made at
    bad_samples: list[str] = field(default_factory=list)  # what was skipped, each once


def train(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train as configured; return the last evaluation with `run`, `step` and `train_seconds`, the same on every rank.

    Runs as one process, or as one of many under torchrun or srun.

    Raises:
        UserError: a request that can't be met.
        RunFailed: the gradient is not finite, and goes on so or must not be.
        RankFailed: this rank's loader workers died or stalled.
        Interrupted: on SIGUSR2 or SIGTERM, once a checkpoint is saved.
    """
    with StopSignal() as control:
        # what can be refused without the other ranks is refused before any waits for another
        _, world_size, _ = set_environment()
        deepspeed_config(config, world_size)
        text_config(config.text.name, config.text.layers, config.data.tokens)
        data = _Data(build_train_dataset(config), build_eval_dataset(config, config.data.val_split))
        if not resume and any(Path(config.run_dir).glob("checkpoints/*step_*/manifest.json")):
            raise UserError(f"{config.run_dir} holds a run already: go on with --resume, or choose another --run_dir")
        world = connect()
        control.connect(world)
        try:
            with worker_failures():
                result = _Run(config, data, world, control).train()
        except (Interrupted, RunFailed):  # of all ranks alike
            disconnect()
            raise
        disconnect()
        return result


def _seed_of(*position: int) -> int:
    return int(np.random.SeedSequence(position).generate_state(1)[0])


class _Data(NamedTuple):
    """The datasets of a run."""

    train: ExpressionDataset
    val: ExpressionDataset


def _rates(config: RunConfig, world: World, dtype: torch.dtype) -> FlopsPerSample:
    """For rank 0's report; FLOPs are counted where there is a peak to compare them with."""
    peak = peak_flops(torch.cuda.get_device_name(), dtype) if world.device.type == "cuda" else None
    flops = step_flops(config) if peak and world.main else None
    return FlopsPerSample((config.data.image_size // 16) ** 2 + config.data.tokens, flops, peak)


class _Run:
    """The parts of a run, made once, and the loop over them."""

    def __init__(self, config: RunConfig, data: _Data, world: World, control: StopSignal):
        self.config, self.data, self.world, self.control = config, data, world, control
        ds_config = deepspeed_config(config, world.world_size)
        require(config.model.attention, world.device.type, model_dtype(ds_config))
        newest = checkpoint.newest_whole(config.run_dir, world)
        self.fixed = {  # what must be the same when the run is resumed
            "seed": config.seed,
            "batch_size": config.train.batch_size,
            "manifest_sha": data.train.index.manifest_sha,
            "unit": config.data.unit,
            "order": config.data.sample_order,
            "dtype": str(model_dtype(ds_config)),
        }
        model, self.progress, loaded = build_model(config), Progress(), None
        if config.model.checkpoint and (newest is None or not (newest / checkpoint.FROZEN).exists()):
            loaded = model.load_pretrained(config.model.checkpoint)
        if newest is not None:
            checkpoint.check_resumable(newest, self.fixed)
            self.progress = Progress(**checkpoint.read_meta(newest)["progress"])
            weights.load_weights(model, newest)
        # the folder is touched only once nothing can be refused any more
        self.record = RunLog(config, world, None if newest is None else self.progress.step, self.progress.evaluated)
        if loaded is not None and newest is None:
            self.record.describe_checkpoint(loaded)
        self.record.describe_parameters(model)
        for note in data.train.index.notes:
            self.record.log(note)
        self.frozen = weights.frozen_digest(model) if world.main else ""
        frozen = self.store_frozen(model)
        model.checkpoint_activations(config.train.activation_checkpointing)
        if config.train.compile:
            model.compile_blocks()
        self.engine = ds.initialize(model, config, world)
        self.state = TrainingState(self.engine, config.train.ema_decay)
        self.state.check_coverage()
        self.statistics = SyncedBatchNormStats(self.engine.module)
        if newest is not None:
            start = time.perf_counter()
            restore(self.engine, self.state, newest)
            took = time.perf_counter() - start
            self.record.log(f"resumed from {newest} at step {self.progress.step} ({took:.1f} s to load)")
        self.saver, self.saved_at = Saver(config, world, self.state, frozen), time.monotonic()

        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        shares = f"{micro_batch} a rank at once, {self.engine.gradient_accumulation_steps()} times"
        self.record.log(f"batch of {config.train.batch_size} on {world.world_size} ranks: {shares}")
        d = config.data
        samples = data.train.index.samples(d.unit, d.sample_order)
        self.batches = TrainBatchSampler(
            samples, config.train.batch_size, micro_batch, world.rank, world.world_size, config.seed
        )
        if newest is not None:
            self.batches.resume(checkpoint.read_meta(newest))
            self.progress.batch = self.batches.first_batch
        self.loader = make_loader(
            data.train, self.batches, d.workers, pin=world.device.type == "cuda", timeout=d.worker_timeout
        )
        every_step = config.train.epochs * self.batches.batches_per_epoch
        self.total_steps = min(every_step, config.train.max_steps or every_step)
        self.rates = _rates(config, world, model_dtype(ds_config))
        self.skipped_in_a_row = 0

    def store_frozen(self, model: Segmenter) -> Path | None:
        """Write what doesn't train once for the run. Collective."""
        path, error = None, None
        if self.config.checkpoint.frozen == "store":
            try:
                if self.world.main:
                    path = weights.store_frozen(model, self.frozen, self.config.run_dir)
            except UserError as e:
                error = e
            all_or_none(error)
        return path

    def train(self) -> dict[str, Any]:
        """Epoch by epoch: train, evaluate, save."""
        progress, config = self.progress, self.config
        self.bar = tqdm(
            desc="train",
            total=self.total_steps,
            initial=progress.step,
            unit="step",
            disable=not self.world.main,
            mininterval=2,
        )
        self.watch = Watchdog(self.world, config.log.stall_seconds)
        try:
            while progress.step < self.total_steps:
                self.train_epoch()
                if progress.batch == self.batches.batches_per_epoch:
                    progress.epoch, progress.batch = progress.epoch + 1, 0
                over = progress.step == self.total_steps
                every = config.eval.every_epochs
                if every and (over or progress.epoch % every == 0):
                    self.evaluate()
                if over or progress.epoch % config.checkpoint.every_epochs == 0 or progress.best_step == progress.step:
                    self.save()
            self.bar.close()
            self.commit()
        except RunFailed:  # on all ranks alike: what is being written is kept
            self.commit()
            raise
        finally:
            self.watch.close()
            self.record.close()
        seconds = round(progress.seconds, 1)
        skipped = {"bad_samples": len(progress.bad_samples)} if config.data.max_bad_samples else {}
        return progress.metrics | {"run": config.run_dir, "step": progress.step, "train_seconds": seconds} | skipped

    def train_epoch(self) -> None:
        """Take optimizer steps to the end of the epoch or of the run."""
        progress, engine, config, device = self.progress, self.engine, self.config, self.world.device
        self.batches.start_at(progress.epoch, progress.batch)
        engine.train()
        accumulation = engine.gradient_accumulation_steps()
        window = ThroughputMeter(self.world, self.rates)
        taken: list[tuple[Tensor, list[int]]] = []  # this step's micro-batches: loss, real samples
        bad: list[str] = []  # and what was skipped in them
        window.waiting()
        self.watch.at(progress.step, "loading data")
        for i, batch in enumerate(iterate(self.loader)):
            window.got()
            self.watch.at(progress.step, "forward and backward")
            lr = learning_rate(progress.step, self.batches.batches_per_epoch, config.train)
            set_learning_rate(engine, lr)
            # dropout draws from the step and the rank, so that a resumed run draws the same
            torch.manual_seed(_seed_of(config.seed, progress.step, i % accumulation, self.world.rank))
            mask, weight = (batch[k].to(device, non_blocking=True) for k in ("mask", "weight"))
            loss = engine.module.loss(engine(**model_inputs(batch, device)), mask, weight)
            taken.append((loss.detach(), batch["sample"][batch["weight"] > 0].tolist()))
            bad += batch.get("bad", [])
            window.add(loss.detach(), len(taken[-1][1]))
            engine.backward(loss)
            norm = ds.step(engine)
            if (i + 1) % accumulation == 0:
                progress.step += 1
                progress.batch += 1
                self.stepped(norm, taken)
                self.skipped(bad)
                taken, bad = [], []
                self.bar.update()
                window.stepped()
                last = progress.step == self.total_steps
                if progress.step % config.log.every_steps == 0 or last:
                    window = self.report(window, lr, norm)
                if last:
                    break
                self.boundary(window)
            window.waiting()
            self.watch.at(progress.step, "loading data")
        progress.seconds += window.close()["seconds"]

    def stepped(self, norm: float, taken: list[tuple[Tensor, list[int]]]) -> None:
        """After an optimizer step: running statistics, the moving average, the sample log, and what was left out.

        Raises:
            RunFailed: the gradient was not finite and must be, or was not for too long.
        """
        progress, config = self.progress, self.config.train
        samples = [s for _, micro_batch in taken for s in micro_batch]
        self.record.samples(progress.step, progress.epoch, samples)
        self.statistics.stepped(math.isfinite(norm))
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.state.update_average()
            return
        self.skipped_in_a_row += 1
        losses = [float(loss) for loss, _ in taken]
        keys = [self.data.train.key(s) for s in samples]
        ranks = gather_objects({"rank": self.world.rank, "losses": losses, "samples": samples, "keys": keys})
        self.record.nonfinite({"step": progress.step, "epoch": progress.epoch, "ranks": ranks})
        finite_losses = all(math.isfinite(x) for r in ranks for x in r["losses"])
        hopeless = self.skipped_in_a_row >= _MOST_SKIPPED
        if (
            self.engine.fp16_enabled() and finite_losses and not hopeless
        ):  # its loss scale was too high: part of how fp16 works
            return
        culprits = [str(r["rank"]) for r in ranks if not all(map(math.isfinite, r["losses"]))]
        where = f"the loss of rank {', '.join(culprits)}" if culprits else "the gradient"
        what = (
            f"{where} is not finite at step {progress.step} (its samples are in {self.record.folder}/nonfinite.jsonl)"
        )
        if config.on_nonfinite == "stop" or hopeless:
            raise RunFailed(f"{what}: lower train.lr, or clip the gradient (train.gradient_clipping)")
        self.record.log(f"warning: {what}: this step is left out")

    def skipped(self, bad: list[str]) -> None:
        """Name the damaged samples that this step left out.

        Raises:
            UserError: with them there are more than the run may skip, on all ranks alike.
        """
        budget, skipped = self.config.data.max_bad_samples, self.progress.bad_samples
        if not budget:
            return
        for message in itertools.chain(*gather_objects(bad)):
            if message not in skipped:
                skipped.append(message)
                self.record.log(f"warning: skipped, {len(skipped)} of {budget}: {message}")
        if len(skipped) > budget:
            raise UserError(f"more than data.max_bad_samples ({budget}) samples are damaged; the last is {skipped[-1]}")

    def boundary(self, window: ThroughputMeter) -> None:
        """Between two steps: commit what is written, save what is due, stop if asked to.

        Raises:
            Interrupted: a signal came, and the run is saved.
        """
        c, progress = self.config.checkpoint, self.progress
        self.watch.at(progress.step, "waiting for the other ranks")
        start = time.perf_counter()
        late = bool(c.every_minutes) and time.monotonic() - self.saved_at > 60 * c.every_minutes
        agreed = self.control.agree(save_due=self.world.main and late, written=self.saver.written)
        if agreed.written:
            self.commit()
        if agreed.save or agreed.stop or (c.every_steps and progress.step % c.every_steps == 0):
            self.save()
        window.leave_out(time.perf_counter() - start)
        if agreed.stop:
            self.commit()
            name = next(n for n in gather_objects(self.control.signal) if n)
            last = self.saver.published
            saved = "saved" if last == progress.step else f"last saved at step {last}" if last else "not saved"
            raise Interrupted(f"stopped by {name} at step {progress.step}, {saved}: go on with --resume")

    def report(self, window: ThroughputMeter, lr: float, norm: float) -> ThroughputMeter:
        """Write the window's averages; return a new one."""
        line = window.close()
        self.progress.seconds += line.pop("seconds")
        line |= {"lr": lr, "grad_norm": norm, "skipped_steps": self.engine.skipped_steps}
        self.metrics("train", line)
        self.bar.set_postfix(loss=f"{line['loss']:.4f}", samples_s=f"{line['samples_per_second']:.0f}")
        return ThroughputMeter(self.world, self.rates)

    def metrics(self, kind: str, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl, TensorBoard, and DeepSpeed's monitors."""
        values = {"step": self.progress.step, "epoch": self.progress.epoch} | values
        self.record.metrics(kind, values)
        ds.write_events(self.engine, kind, values)

    def evaluate(self) -> None:
        """Evaluate on the validation split, and note whether it is the best so far."""
        config, progress = self.config, self.progress
        self.engine.eval()

        def model(**inputs: Tensor) -> Tensor:
            self.watch.at(progress.step, "evaluating")
            return self.engine(**inputs)

        with ds.averaged(self.state):
            metrics = evaluate(
                model,
                self.data.val,
                MaskPostprocess.from_config(config),
                self.world,
                batch_size=config.eval.batch_size,
                workers=config.data.workers,
                timeout=config.data.worker_timeout,
            )
        progress.metrics = metrics = {"split": config.data.val_split} | metrics
        progress.evaluated = progress.step
        self.metrics("eval", metrics)
        self.record.log(f"step {progress.step}: mIoU {metrics['miou']:.4f}, oIoU {metrics['oiou']:.4f}")
        score = metrics.get("giou", metrics["miou"])  # which alone knows that there may be no target
        if score > progress.best_score:
            progress.best_score, progress.best_step = score, progress.step

    def save(self) -> None:
        """Begin a checkpoint of this step; in the foreground, finish it, too."""
        progress, config = self.progress, self.config
        self.commit()
        self.watch.at(progress.step, "saving")
        meta = self.fixed | {"step": progress.step} | self.batches.state(progress.epoch, progress.batch)
        meta |= {"progress": dict(vars(progress)), "config": config.model_dump(mode="json"), "frozen": self.frozen}
        meta |= {"engine": ds.counters(self.engine), "world_size": self.world.world_size}
        meta |= {"zero_stage": self.engine.zero_optimization_stage()}
        self.blocked, self.saved_at = self.saver.begin(meta), time.monotonic()
        if not config.checkpoint.asynchronous:
            self.commit()

    def commit(self) -> None:
        """Publish the checkpoint that was begun, if one was.

        Raises:
            UserError: it could not be written, and the run is to stop then.
        """
        if not self.saver.pending:
            return
        start, step = time.perf_counter(), self.saver.step
        try:
            line = self.saver.commit()
        except UserError as e:
            if self.config.checkpoint.on_full_disk == "stop":
                raise
            self.record.log(f"warning: {e}: going on, the former checkpoint is whole")
            return
        line |= {"blocked_seconds": self.blocked + time.perf_counter() - start}
        self.record.metrics("save", {"step": step} | line)
