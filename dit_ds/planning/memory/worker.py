"""One memory prediction, in the process in which this module was imported first: it sets the environment up."""

from __future__ import annotations

import logging
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a prediction takes no GPU's memory
os.environ["DS_ACCELERATOR"] = "cpu"


from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.models.attention import count_flops
from dit_ds.models.text_encoder import offline_text
from dit_ds.planning.memory.fake_cluster import fake_cluster, fake_tensors
from dit_ds.planning.memory.profiled_step import Steps
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest, on_gpu
from dit_ds.planning.memory.tracker import MemoryTracker, Profile

_MOST, _TRIES = 4096, 40  # limits of the search: the micro-batch, and the number of guesses, which it never needs


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """Build the run on fake tensors and profile its steps. Once in a process.

    Raises:
        UserError: a run that can't be built.
    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    config = on_gpu(request.config)
    ds_config = deepspeed_config(config, request.ranks)
    sizes = request.micro_batches or (DeepSpeedJson(ds_config).micro_batch,)
    share = config.train.batch_size // request.ranks
    tracker = MemoryTracker(host=lambda x: x.device.type == "cpu")
    with offline_text(config), fake_cluster(request.ranks) as world, fake_tensors(tracker):
        steps = Steps.load(config, world, tracker)
        steps.warm_up()
        profiles = {b: steps.take(b) for b in sizes}
        parameters = list(steps.engine.module.parameters())
        counts = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        trained = sum(n for n, p in zip(counts, parameters) if p.requires_grad)
        largest = None if request.capacity is None else _largest(steps, profiles, request.capacity, share)
        flops = None
        if request.flops:
            with count_flops() as counter:
                steps.take(1)
            flops = counter.get_total_flops() // min(2, steps.engine.gradient_accumulation_steps())
    return MemoryEstimate(profiles, sum(counts), trained, largest, flops)


def _largest(steps: Steps, profiles: dict[int, Profile], capacity: int, share: int) -> int:
    """The largest micro-batch whose peak is at most `capacity` bytes, at most `_MOST`; 0 if there is none.

    Below a rank's share of the global batch a step accumulates the gradients of several micro-batches, from the share on
    it has one. On either side the peak is a piecewise linear function of the micro-batch, mostly linear: the next guess
    is on the line through two points, every third one is the middle of the bounds.
    """

    def peak(b: int) -> int:
        if b not in profiles:
            profiles[b] = steps.take(b, 2 if b < share else 1)
        return profiles[b].peak

    if peak(share) <= capacity:
        low, high, other = share, 0, 0
    elif share > 1 and peak(1) <= capacity:
        low, high, other = 1, share, share
    else:
        return 0
    for i in range(_TRIES):
        if high == low + 1 or low >= _MOST:
            break
        rise = (peak(other) - peak(low)) / (other - low) if other else 0.0
        guess = low + int((capacity - peak(low)) / rise) if rise > 0 else 4 * low
        if high:
            guess = (low + high) // 2 if i % 3 == 2 else min(max(guess, low + 1), high - 1)
        else:
            guess = min(max(guess, low + 1), 4 * low)
        if peak(guess) <= capacity:
            low, other = guess, high or low
        else:
            high = other = guess
    return min(low, _MOST)
