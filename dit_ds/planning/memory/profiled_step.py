"""Training steps whose memory is written down: the real model, loss, backward pass and DeepSpeed engine, on real
tensors or fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.prompts import TEXT_ONLY, Prompts
from dit_ds.distributed import World
from dit_ds.engine import engine as ds
from dit_ds.engine.zero_state import TrainingState
from dit_ds.models.build import build_model
from dit_ds.planning.memory.tracker import MemoryTracker, Profile


def fake_batch(
    batch: int, image_size: int, tokens: int, prompts: Prompts = TEXT_ONLY, soft: bool = False
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs, mask and weight of the shapes that the loader gives."""
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


class Steps:
    """A run's model in its engine, and steps whose memory the tracker writes down.

    Args:
        config: the run.
        world: this rank's place.
        tracker: active already; or what is told the same in its place, as `allocator.Meter`.
    """

    def __init__(self, config: RunConfig, world: World, tracker: MemoryTracker):
        self.config, self.world, self.tracker = config, world, tracker
        tracker.enter("load")
        model = build_model(config, text_weights=False)
        model.checkpoint_activations(config.train.activation_checkpointing)
        if config.train.compile and world.device.type == "cuda":  # tensors without data can't be compiled for
            model.compile_blocks()
        self.engine = ds.initialize(model, config, world)
        del model
        self.state = TrainingState(self.engine, config.train.ema_decay)
        self._tag_state()
        self.engine.train()

    def warm_up(self) -> None:
        """Have everything that the first step makes and the others find: Adam's states, ZeRO-3's order of modules."""
        if self.engine.zero_optimization_stage() == 3:
            self.take(1)
        else:
            self.state.make_moments()
            self._tag_state()

    def take(self, micro_batch: int, micro_batches: int | None = None) -> Profile:
        """One optimizer step; its phases are forward, backward and step.

        Args:
            micro_batches: so many. By default of a step of several the last two are taken: what is added up lies there
                from the second on.
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
        self._tag_state()
        self.state.update_average()
        tracker.unwatch()
        return tracker.profile()

    def _pass(self, micro_batch: int) -> None:
        d, device, tracker, engine = self.config.data, self.world.device, self.tracker, self.engine
        tracker.enter("forward")
        inputs, mask, weight = fake_batch(
            micro_batch, d.image_size, d.tokens, Prompts.of(d.prompts, d.points), d.train_mask_rule == "soft"
        )
        inputs, mask, weight = {k: x.to(device) for k, x in inputs.items()}, mask.to(device), weight.to(device)
        tracker.tag("inputs", (*inputs.values(), mask, weight))
        loss = engine.module.loss(engine(**inputs), mask, weight)
        tracker.enter("backward")
        engine.backward(loss)
        del loss, inputs, mask, weight
        self._tag_state()
        if not engine.is_gradient_accumulation_boundary():
            ds.step(engine)

    def _tag_state(self) -> None:
        """Tag the tensors that stay: parameters, gradients, optimizer states, moving average."""
        module, optimizer, tag = self.engine.module, self.engine.optimizer, self.tracker.tag
        # the flat master first: in fp32 at stage 0 it is the parameter itself
        tag("gradients", _tensors(*(getattr(optimizer, name, None) for name in _GRADIENTS)))
        tag("gradients", (p.grad for p in module.parameters() if p.grad is not None))
        base = self.engine.basic_optimizer
        tag("optimizer", (x for g in base.param_groups for x in g["params"]))
        tag("optimizer", _tensors(dict(base.state)))
        tag("optimizer", (f.flat for f in self.state.fragments))
        tag("average", self.state._average.values())
        tag("parameters", module.buffers())
        tag("parameters", (p for p in module.parameters()))
        tag("parameters", (p.ds_tensor for p in module.parameters() if hasattr(p, "ds_tensor")))


# where DeepSpeed's optimizers keep gradients between the backward pass and the step
_GRADIENTS = (
    "averaged_gradients", "accumulated_grads_in_cpu", "single_partition_of_fp32_groups_grads", "fp32_groups_gradients",
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
