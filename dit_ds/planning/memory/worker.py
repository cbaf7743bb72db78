"""One memory prediction, in the process in which this module was imported first: it sets the environment up."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a prediction takes no GPU's memory
os.environ["DS_ACCELERATOR"] = "cpu"


from dit_ds.data.progress import progress_bar
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config
from dit_ds.models.attention import count_flops
from dit_ds.models.text_encoder import offline_text
from dit_ds.planning.memory.allocation_log import Mark
from dit_ds.planning.memory.allocations import Request
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.fake_cluster import fake_cluster, fake_tensors
from dit_ds.planning.memory.figures import figures
from dit_ds.planning.memory.kernels.gpu_scratch import GpuScratch
from dit_ds.planning.memory.profiled_step import Steps
from dit_ds.planning.memory.request import MemoryEstimate, MemoryRequest, on_gpu
from dit_ds.planning.memory.simulate import simulate
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
    tracker = MemoryTracker(host=lambda x: x.device.type == "cpu", gpu=GpuScratch(request.gpu))
    bar = progress_bar(desc=request.bar, unit=" micro-batches", disable=not request.bar)
    with bar, offline_text(config), fake_cluster(request.ranks, request.rank) as world, fake_tensors(tracker):
        steps = StepSequences(Steps.load(config, world, tracker), tracker, bar.update)
        profiles = {b: steps.profile(b) for b in sizes}
        found = {b: figures(*steps.requests(b), request.settings, request.share, request.compare) for b in sizes}
        parameters = list(steps.steps.engine.module.parameters())
        counts = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        trained = sum(n for n, p in zip(counts, parameters) if p.requires_grad)
        failure = largest = None
        if request.capacity is not None:
            failure = _failure(*steps.requests(sizes[0]), request)
            more = found[sizes[0]].least_capacity / profiles[sizes[0]].peak
            more = more if more > 1.02 else 1.0  # little that is more does not grow with the micro-batch
            settings = AllocatorSettings.parse(request.settings)
            largest = _largest(steps, settings, request.capacity, share, more)
        cudnn = tracker.gpu.largest_convolution if tracker.gpu else 0
        flops = None
        if request.flops:
            with count_flops() as counter:
                steps.steps.take(1)
            flops = counter.get_total_flops() // min(2, steps.steps.engine.gradient_accumulation_steps())
    return MemoryEstimate(
        profiles=profiles,
        figures=found,
        cudnn=cudnn,
        parameters=sum(counts),
        trained=trained,
        failure=failure,
        largest=largest,
        flops=flops,
    )


def _failure(requests: list[Request], sites: dict[int, str], request: MemoryRequest) -> dict[str, str] | None:
    """The allocation that fails within the capacity, as PyTorch words it; None if all fit."""
    assert request.capacity is not None
    result, _ = simulate(requests, AllocatorSettings.parse(request.settings), request.capacity)
    if result.error is None or result.failed_at is None:
        return None
    total = max(int(request.memory), request.capacity)
    message = result.error.as_torch_words_it(total, total - request.capacity)
    return {"site": sites.get(requests[result.failed_at].key, ""), "message": message}


class StepSequences:
    """Steps at several micro-batches, and what a run with each asks of the allocator from its start on.

    Args:
        profiled: called after each micro-batch.
    """

    def __init__(self, steps: Steps, tracker: MemoryTracker, profiled: Callable[[], object] = lambda: None):
        self.steps, self.tracker, self._profiled = steps, tracker, profiled
        steps.warm_up()
        self._ready = tracker.requests.mark()
        self._taken: dict[int, tuple[Profile, Mark, Mark]] = {}

    def profile(self, micro_batch: int, micro_batches: int | None = None) -> Profile:
        """The tracker's profile of a step; see `Steps.take`."""
        if micro_batch not in self._taken:
            self._taken[micro_batch] = self._take(micro_batch, micro_batches)
        return self._taken[micro_batch][0]

    def _take(self, micro_batch: int, micro_batches: int | None = None) -> tuple[Profile, Mark, Mark]:
        gc.freeze()  # the log grows to millions of objects, which the collector would look through again and again
        start = self.tracker.requests.mark()
        profile = self.steps.take(micro_batch, micro_batches)
        self.tracker.synchronize()
        self._profiled()
        return profile, start, self.tracker.requests.mark()

    def take(self, micro_batch: int) -> tuple[Profile, list[Request], dict[int, str]]:
        """Take a step of a model that may have been changed: its profile, the requests and the sites."""
        profile, start, end = self._take(micro_batch)
        return profile, *self.tracker.requests.run(self._ready, start, end)

    def requests(self, micro_batch: int) -> tuple[list[Request], dict[int, str]]:
        """The requests of a run's start and first steps, at a micro-batch that was profiled, and the blocks' sites."""
        return self.tracker.requests.run(self._ready, *self._taken[micro_batch][1:])


def _largest(steps: StepSequences, settings: AllocatorSettings, capacity: int, share: int, more: float = 1.0) -> int:
    """The largest micro-batch, at most `_MOST`, that fits into `capacity` bytes of segments; 0 if there is none.

    Below a rank's share of the global batch a step accumulates the gradients of several micro-batches, from the share on
    it has one. On either side the peak is a piecewise linear function of the micro-batch, mostly linear: the next guess
    is on the line through two points, every third one is the middle of the bounds.

    Args:
        share: a rank's samples of the global batch.
        more: the least capacity is about so many times the peak.
    """
    known: dict[int, bool] = {}

    def peak(b: int) -> int:
        return steps.profile(b, 2 if b < share else 1).peak

    def fits(b: int) -> bool:
        if b not in known:
            known[b] = peak(b) <= capacity and simulate(steps.requests(b)[0], settings, capacity)[0].fits
        return known[b]

    if fits(share):
        low, high, other = share, 0, 0
    elif share > 1 and fits(1):
        low, high, other = 1, share, share
    else:
        return 0
    for i in range(_TRIES):
        if high == low + 1 or low >= _MOST:
            break
        rise = (peak(other) - peak(low)) / (other - low) if other else 0.0
        guess = low + int((capacity / more - peak(low)) / rise) if rise > 0 else 4 * low
        if high:
            guess = (low + high) // 2 if i % 3 == 0 else min(max(guess, low + 1), high - 1)
        else:
            guess = min(max(guess, low + 1), 4 * low)
        if fits(guess):
            low, other = guess, high or low
        else:
            high = other = guess
    return min(low, _MOST)
