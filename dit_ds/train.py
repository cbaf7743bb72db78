"""Training: one loop, read from top to bottom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dit_ds import checkpoint
from dit_ds import engine as ds
from dit_ds.config import RunConfig
from dit_ds.data.loader import ExpressionDataset, SplitIndex, TrainBatches, checked, make_loader, make_tokenize
from dit_ds.data.transforms import Augmentation
from dit_ds.distributed import World, connect, disconnect, set_environment
from dit_ds.errors import RunFailed, UserError
from dit_ds.evaluate import INPUTS, evaluate
from dit_ds.files import write_json
from dit_ds.models.attention import require
from dit_ds.models.dit_sam import segmentation_loss
from dit_ds.models.sam import load_sam_checkpoint
from dit_ds.models.text_encoder import load_tokenizer
from dit_ds.record import RunRecord, Window


@dataclass
class Progress:
    """Where a run is: what a checkpoint holds besides weights and optimizer states."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # the epoch under way
    batch: int = 0  # global batches of it that were taken
    seconds: float = 0.0  # of training; evaluation and saving not counted
    best_miou: float = -1.0
    best_step: int = 0


def train(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train as configured; return the last evaluation with `run`, `step` and `train_seconds`, the same on every rank.

    Runs as one process, or as one of many under torchrun or srun.

    Raises:
        UserError: a request that can't be met.
        RunFailed: the loss is no longer finite.
    """
    # what can be refused without the other ranks is refused before any waits for another
    _, world_size, _ = set_environment()
    ds.deepspeed_config(config, world_size)
    data = _Data(config)
    newest = _newest_checkpoint(config, resume)
    world = connect()
    try:
        return _Run(config, data, world, newest).train()
    finally:
        disconnect()


def _newest_checkpoint(config: RunConfig, resume: bool) -> Path | None:
    there = checkpoint.all_checkpoints(config.run_dir)
    if there and not resume:
        raise UserError(f"{config.run_dir} holds a run already: go on with --resume, or choose another --run_dir")
    return there[-1] if there else None


def _seed_of(*position: int) -> int:
    return int(np.random.SeedSequence(position).generate_state(1)[0])


class _Data:
    """The datasets of a run."""

    def __init__(self, config: RunConfig):
        d = config.data
        folder = Path(d.root) / d.dataset / d.split_by
        self.index, val_index = SplitIndex.load(folder, d.train_split), SplitIndex.load(folder, d.val_split)
        tokenize = make_tokenize(load_tokenizer(config.text.tokenizer or config.text.name), d.tokens)
        how = Augmentation(d.color, d.blur, d.flip)
        self.train = ExpressionDataset(self.index, d.unit, d.image_size, tokenize, how, config.seed)
        self.val = ExpressionDataset(val_index, "sentence", d.image_size, tokenize)


class _Run:
    """The parts of a run, made once, and the loop over them."""

    def __init__(self, config: RunConfig, data: _Data, world: World, newest: Path | None):
        self.config, self.data, self.world = config, data, world
        ds_config = ds.deepspeed_config(config, world.world_size)
        self.fixed = {  # what must be the same when the run is resumed
            "world_size": world.world_size,
            "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0),
            "seed": config.seed,
            "batch_size": config.train.batch_size,
            "manifest_sha": data.index.manifest_sha,
        }
        require(config.model.attention, world.device.type, ds.dtype(ds_config))
        model = checkpoint.build_model(config)
        self.text_digest = checkpoint.text_digest(model)
        self.progress, loaded = Progress(), None
        if newest is not None:
            checkpoint.check_resumable(newest, self.fixed)
            self.progress = Progress(**checkpoint.read_meta(newest)["progress"])
            checkpoint.load_weights(model, newest)
        elif config.model.checkpoint:
            loaded = load_sam_checkpoint(model, config.model.checkpoint)
        # the folder is touched only once nothing can be refused any more
        self.record = RunRecord(config, world, None if newest is None else self.progress.step)
        if loaded is not None:
            self.record.describe_checkpoint(loaded)
        self.record.describe_parameters(model)
        model.image_encoder.checkpoint_activations(config.train.activation_checkpointing)
        if config.train.compile:
            model.image_encoder.compile_blocks()
        self.engine = ds.initialize(model, config, world)
        if newest is not None:
            checkpoint.resume(self.engine, newest)
            self.record.log(f"resumed from {newest} at step {self.progress.step}")

        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        self.batches = TrainBatches(
            len(data.train), config.train.batch_size, micro_batch, world.rank, world.world_size, config.seed
        )
        self.loader: DataLoader = make_loader(
            data.train, self.batches, config.data.workers, pin=world.device.type == "cuda"
        )
        every_step = config.train.epochs * self.batches.batches_per_epoch
        self.total_steps = min(every_step, config.train.max_steps or every_step)

    def train(self) -> dict[str, Any]:
        """Epoch by epoch: train, evaluate, save."""
        progress, config = self.progress, self.config
        metrics: dict[str, Any] = {}
        self.bar = tqdm(
            desc="train",
            total=self.total_steps,
            initial=progress.step,
            unit="step",
            disable=not self.world.main,
            mininterval=2,
        )
        while progress.step < self.total_steps:
            self.train_epoch()
            if progress.batch == self.batches.batches_per_epoch:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            over = progress.step == self.total_steps
            if over or progress.epoch % config.eval.every_epochs == 0:
                metrics = self.evaluate()
            if over or progress.epoch % config.checkpoint.every_epochs == 0 or progress.best_step == progress.step:
                self.save()
        self.bar.close()
        metrics = metrics or self.evaluate()  # a finished run that was resumed has none yet
        self.record.close()
        seconds = round(progress.seconds, 1)
        return metrics | {"run": config.run_dir, "step": progress.step, "train_seconds": seconds}

    def train_epoch(self) -> None:
        """Take optimizer steps to the end of the epoch or of the run."""
        progress, engine, config, device = self.progress, self.engine, self.config, self.world.device
        self.batches.start_at(progress.epoch, progress.batch)
        engine.train()
        accumulation = engine.gradient_accumulation_steps()
        window = Window(self.world)
        window.waiting()
        for i, batch in enumerate(checked(self.loader)):
            window.got()
            lr = ds.learning_rate(progress.step, self.batches.batches_per_epoch, config.train)
            ds.set_learning_rate(engine, lr)
            # dropout draws from the step and the rank, so that a resumed run draws the same
            torch.manual_seed(_seed_of(config.seed, progress.step, i % accumulation, self.world.rank))
            inputs = (batch[k].to(device, non_blocking=True) for k in INPUTS)
            mask, weight = (batch[k].to(device, non_blocking=True) for k in ("mask", "weight"))
            loss = segmentation_loss(engine(*inputs), mask, weight, config.train.dice_weight)
            window.add(loss.detach(), int((batch["weight"] > 0).sum()))
            engine.backward(loss)
            engine.step()
            if (i + 1) % accumulation == 0:
                progress.step += 1
                progress.batch += 1
                self.bar.update()
                last = progress.step == self.total_steps
                if progress.step % config.log.every_steps == 0 or last:
                    window = self.report(window, lr)
                if last:
                    break
                if config.checkpoint.every_steps and progress.step % config.checkpoint.every_steps == 0:
                    progress.seconds += window.close()["seconds"]
                    self.save()
                    window = Window(self.world)
            window.waiting()
        progress.seconds += window.close()["seconds"]

    def report(self, window: Window, lr: float) -> Window:
        """Write the window's averages; return a new one.

        Raises:
            RunFailed: the loss is not finite, on every rank alike.
        """
        line = window.close()
        self.progress.seconds += line.pop("seconds")
        line |= {"lr": lr, "grad_norm": ds.gradient_norm(self.engine)}
        self.record.metrics("train", {"step": self.progress.step, "epoch": self.progress.epoch} | line)
        self.bar.set_postfix(loss=f"{line['loss']:.4f}", samples_s=f"{line['samples_per_second']:.0f}")
        if not math.isfinite(line["loss"]):
            raise RunFailed(
                f"the loss is {line['loss']} at step {self.progress.step}: lower train.lr, or clip the gradient"
            )
        return Window(self.world)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate on the validation split, and note whether it is the best so far."""
        config, progress = self.config, self.progress
        self.engine.eval()
        metrics = evaluate(
            self.engine, self.data.val, config.eval.batch_size, config.eval.threshold, config.data.workers, self.world
        )
        metrics = {"split": config.data.val_split} | metrics
        self.record.metrics("eval", {"step": progress.step, "epoch": progress.epoch} | metrics)
        self.record.log(f"step {progress.step}: mIoU {metrics['miou']:.4f}, oIoU {metrics['oiou']:.4f}")
        if metrics["miou"] > progress.best_miou:
            progress.best_miou, progress.best_step = metrics["miou"], progress.step
        return metrics

    def save(self) -> None:
        """Save a checkpoint; point `best.json` to it if it is the best; remove what need not be kept."""
        progress, config = self.progress, self.config
        seen = min(progress.batch * config.train.batch_size, len(self.data.train))
        meta = self.fixed | {"step": progress.step, "epoch": progress.epoch, "samples_seen": seen}
        meta |= {"progress": vars(progress), "config": config.model_dump(mode="json"), "text_digest": self.text_digest}
        checkpoint.save(self.engine, config, self.world, meta)
        if self.world.main:
            if progress.best_step == progress.step:
                write_json(Path(config.run_dir) / "best.json", {"step": progress.step, "miou": progress.best_miou})
            checkpoint.prune(config, progress.best_step)
