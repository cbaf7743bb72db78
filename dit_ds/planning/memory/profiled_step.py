"""Training steps whose memory is tracked: the real model, loss, backward pass and DeepSpeed engine, on real tensors or
fake ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.device_pass import Chunk, augment, chunk_rows
from dit_ds.data.loading.packed_layout import ALIGNED
from dit_ds.data.loading.prompts import TEXT_ONLY, Prompts
from dit_ds.distributed import World
from dit_ds.engine import engine as ds
from dit_ds.engine.zero_state import TrainingState
from dit_ds.models.build import build_model

ResultT = TypeVar("ResultT")
ResultCo = TypeVar("ResultCo", covariant=True)


class PhasePeaks(Protocol[ResultCo]):
    """What a step reports its phases to: a `MemoryTracker`, or an `AllocatorPhasePeaks`."""

    def enter(self, phase: str) -> None:
        """Start a phase."""

    def restart(self) -> None:
        """Start a step."""

    def profile(self) -> ResultCo:
        """End the step and return its memory."""
        ...

    def tag(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Set the category of these tensors."""

    def watch(self, model: nn.Module) -> None:
        """From now on note the module whose forward allocates a tensor."""

    def unwatch(self) -> None:
        """Undo `watch`."""


def fake_batch(
    batch: int, image_size: int, tokens: int, prompts: Prompts = TEXT_ONLY, soft: bool = False
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch of zeros of the loader's shapes.

    Returns:
        The model's inputs by name (image (B, 3, S, S) uint8; size (B, 2); tokens, token_mask (B, T); points (B, P, 2),
        labels (B, P)), the mask (B, S, S), uint8 or fp32 where `soft`, and the samples' weight (B,).
    """
    inputs = {
        "image": torch.zeros(batch, 3, image_size, image_size, dtype=torch.uint8),
        "size": torch.full((batch, 2), image_size),
    }
    if prompts.has_text:
        inputs["tokens"] = torch.zeros(batch, tokens, dtype=torch.long)
        inputs["token_mask"] = torch.ones(batch, tokens, dtype=torch.bool)
    if prompts.slots:
        inputs["points"] = torch.zeros(batch, prompts.slots, 2)
        inputs["labels"] = torch.zeros(batch, prompts.slots, dtype=torch.long)
    mask = torch.zeros(batch, image_size, image_size, dtype=torch.float32 if soft else torch.uint8)
    return inputs, mask, torch.ones(batch)


def finished_pictures(batch: int, image_size: int, soft: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and masks of zeros from the device's own pass, for `data.augment_on` device.

    Their pictures are as large as any that workers send: twice `image_size` in both directions.
    """
    side = 2 * image_size
    place = [ALIGNED, side, side, 0, 0, 1 if soft else side, 1 if soft else side]
    layout = torch.tensor([place] * batch).to(device)
    draws = torch.ones(batch, 8, dtype=torch.float64).to(device)
    size = torch.full((batch, 2), image_size).to(device)
    packed = torch.zeros(ALIGNED + batch * 3 * side * side, dtype=torch.uint8, device=device)
    step = chunk_rows(image_size)
    rows = [slice(first, min(first + step, batch)) for first in range(0, batch, step)]
    chunks = [Chunk(r, 0, (r.stop - r.start) * side * side) for r in rows]
    image, mask = augment(packed, layout, draws, size, chunks, image_size=image_size, soft=soft)
    return image.contiguous(), mask


@dataclass
class Steps(Generic[ResultT]):
    """Training steps of a run whose memory is tracked.

    Attributes:
        config: the run.
        world: this rank.
        tracker: what the phases are reported to. A `MemoryTracker` is active already.
        engine: DeepSpeed's, with the run's model.
        state: the engine's fp32 state.
    """

    config: RunConfig
    world: World
    tracker: PhasePeaks[ResultT]
    engine: Any
    state: TrainingState

    @classmethod
    def load(cls, config: RunConfig, world: World, tracker: PhasePeaks[ResultT]) -> Steps[ResultT]:
        """Build the model and its engine, in the phase "load"."""
        tracker.enter("load")
        model = build_model(config, text_weights=False)
        model.checkpoint_activations(config.train.activation_checkpointing)
        if config.train.compile and world.device.type == "cuda":  # fake tensors can't be compiled for
            model.compile_blocks()
        engine = ds.initialize(model, config, world)
        steps = cls(config, world, tracker, engine, TrainingState(engine, config.train.ema_decay))
        steps.tag_state()
        engine.train()
        return steps

    def warm_up(self) -> None:
        """Make what the first step makes and later ones reuse: Adam's states, ZeRO-3's trace of the modules' order."""
        if self.engine.zero_optimization_stage() == 3:
            self.take(1)
        else:
            self.state.make_states()
            self.tag_state()

    def take(self, micro_batch: int, micro_batches: int | None = None) -> ResultT:
        """Take one optimizer step, in the phases forward, backward and step.

        Args:
            micro_batch: samples.
            micro_batches: of the step. By default at most two, the last of the accumulation: from the second on
                accumulated gradients are there.
        Returns:
            The tracker's profile of it.
        """
        tracker, engine = self.tracker, self.engine
        tracker.restart()
        tracker.watch(engine.module)
        micro_batches = micro_batches or min(2, engine.gradient_accumulation_steps())
        for i in range(1, micro_batches + 1):
            engine.set_gradient_accumulation_boundary(i == micro_batches)
            self._pass(micro_batch)
        tracker.enter("step")
        ds.step(engine)
        self.tag_state()
        self.state.update_average()
        tracker.unwatch()
        return tracker.profile()

    def _pass(self, micro_batch: int) -> None:
        d, device, tracker, engine = self.config.data, self.world.device, self.tracker, self.engine
        tracker.enter("forward")
        soft = d.train_mask_rule == "soft"
        inputs, mask, weight = fake_batch(micro_batch, d.image_size, d.tokens, Prompts.of(d.prompts, d.points), soft)
        if d.augment_on == "device" and device.type != "cpu":
            inputs["image"], mask = finished_pictures(micro_batch, d.image_size, soft, device)
        inputs, mask, weight = {k: x.to(device) for k, x in inputs.items()}, mask.to(device), weight.to(device)
        tracker.tag("inputs", (*inputs.values(), mask, weight))
        loss = engine.module.loss(engine(**inputs), mask, weight)
        tracker.enter("backward")
        engine.backward(loss)
        del loss, inputs, mask, weight
        self.tag_state()
        if not engine.is_gradient_accumulation_boundary():
            ds.step(engine)

    def tag_state(self) -> None:
        """Tag the tensors that outlive a step: parameters, gradients, optimizer states, moving average."""
        module, optimizer, tag = self.engine.module, self.engine.optimizer, self.tracker.tag
        # a later tag replaces an earlier one: in fp32 at stage 0 the master is the parameter itself
        tag("gradients", _tensors(*(getattr(optimizer, name, None) for name in _GRADIENTS)))
        tag("gradients", (p.grad for p in module.parameters() if p.grad is not None))
        base = self.engine.basic_optimizer
        tag("optimizer", (x for g in base.param_groups for x in g["params"]))
        tag("optimizer", _tensors(dict(base.state)))
        tag("optimizer", (f.flat for f in self.state.fragments))
        tag("average", self.state.averages())
        tag("parameters", module.buffers())
        tag("parameters", (p for p in module.parameters()))
        tag("parameters", (p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")))


# attributes of DeepSpeed's optimizers that hold gradients between the backward pass and the step, each of some stages
_GRADIENTS = (
    "averaged_gradients", "accumulated_grads_in_cpu", "fp32_groups_gradients",
    "grad_partitions_flat_buffer", "temp_grad_buffer_for_cpu_offload",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)  # fmt: skip


def _tensors(*values: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, dict):
            yield from _tensors(*x.values())
        elif isinstance(x, (list, tuple, set)):
            yield from _tensors(*x)
