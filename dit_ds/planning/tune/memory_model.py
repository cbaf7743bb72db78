"""Memory of every candidate: a few profiles of fake steps, combined by rule.

An exact profile (`memory.estimate`) takes seconds, so not every candidate gets one. Profiled at ZeRO-2 are: each policy of
activation checkpointing, at the smallest and the largest micro-batch, and with each kernel at the largest. Every other
stage is profiled at both micro-batches with one policy. The rest follows, phase by phase (forward, backward, step):

    micro-batch     linear between the two profiled ones
    stage           adds to every phase the difference that it makes at the profiled points: states do not depend on
                    activations
    kernel          adds the difference that it makes at the largest micro-batch, in proportion to the micro-batch
    allocator       needs as much more than what is allocated as at the reference
    accumulation    the gradients that are kept until the next micro-batch: all at stages 0 and 1, a rank's partition at
                    stage 2; at stage 3 and with offload they have a buffer of their own anyway
    bucket          two of `reduce_bucket_size` in the backward pass at stages 1 and 2 (overlap_comm), a permanent one at
                    stage 3

`benchmarks/tune.py` compares the rule with exact profiles.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dit_ds.config.schema import RunConfig
from dit_ds.data.progress import progress_bar
from dit_ds.engine.deepspeed_json import DeepSpeedJson
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.files import write_json
from dit_ds.planning.communication import ModuleTrace
from dit_ds.planning.flops import Passes, hardware_flops, step_flops
from dit_ds.planning.memory.estimate import worker_pool
from dit_ds.planning.memory.figures import Figures, figures
from dit_ds.planning.memory.request import MemoryRequest
from dit_ds.planning.tune.candidates import BUCKETS, Candidate
from dit_ds.planning.tune.time_model import FlopCounts
from dit_ds.processes import usable_cores

if TYPE_CHECKING:
    from dit_ds.planning.memory.tracker import Profile

_REFERENCE = "zero2"  # the setting at which policies and kernels are profiled
_SHARE = 0.01  # how far above the least capacity a candidate's may be
_POLICY = "block"  # with which the other settings are profiled
Phases = dict[str, float]  # peak bytes by phase
Point = tuple[str, str, int]  # policy, kernel, micro-batch
Result = TypeVar("Result")


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank, in bytes.

    Attributes:
        peak: allocated on the GPU at most.
        capacity: that the allocator needs for it at least.
        reserved: by the allocator, where it has no limit.
        activations: kept for the backward pass at the end of a forward pass.
        states: allocated between steps: parameters, optimizer states and other permanent tensors.
        host: in host memory at most.
        exact: from a profile of this candidate, not by the rule.
    """

    peak: float
    capacity: float
    reserved: float
    activations: float
    states: float
    host: float
    exact: bool = False


@dataclass(frozen=True)
class ProfileSummary:
    """The part of a profile and its figures that the rule uses; bytes, as in `Footprint`.

    Attributes:
        capacity, reserved: as shares of the peak.
    """

    phases: Phases
    peak: float
    capacity: float
    reserved: float
    activations: float
    states: float
    host: float
    gradients: float

    @staticmethod
    def of(profile: Profile, figures: Figures) -> ProfileSummary:
        """The summary of a step's profile and its figures."""
        return ProfileSummary(
            phases={name: float(profile.phases[name]) for name in ("forward", "backward", "step")},
            peak=profile.peak,
            capacity=figures.least_capacity / profile.peak,
            reserved=figures.reserved / profile.peak,
            activations=sum(profile.kept.values()),
            states=sum(profile.after.values()),
            host=profile.host,
            gradients=profile.after["gradients"],
        )

    def footprint(self) -> Footprint:
        """The footprint of the profiled candidate."""
        return Footprint(
            peak=self.peak,
            capacity=self.peak * self.capacity,
            reserved=self.peak * self.reserved,
            activations=self.activations,
            states=self.states,
            host=self.host,
            exact=True,
        )


class MemoryModel:
    """The rule that predicts any candidate's footprint from the profiles.

    Args:
        reference: profiles of ZeRO-2, by point.
        points: profiles of the other settings by micro-batch, with policy `block` and the first kernel.
        trained: number of trained parameters.
        element_bytes: of the model's type.
        ranks: of the run.
    """

    def __init__(
        self,
        reference: dict[Point, ProfileSummary],
        points: dict[str, dict[int, ProfileSummary]],
        trained: int,
        element_bytes: int,
        ranks: int,
    ):
        self.reference, self.points = reference, points
        self.all_gradients, self.element_bytes, self.ranks = trained * element_bytes, element_bytes, ranks
        self.largest = max(micro_batch for *_, micro_batch in reference)
        self.kernel = next(kernel for _, kernel, _ in reference)

    def predict(self, c: Candidate) -> Footprint:
        """A candidate's footprint by the rule."""
        base = self._reference(c.policy, c.micro_batch)
        phases, states, host = dict(base.phases), base.states, base.host
        activations = base.activations
        if c.kernel != self.kernel:
            other, same = (self.reference[c.policy, k, self.largest] for k in (c.kernel, self.kernel))
            share = c.micro_batch / self.largest
            phases = {p: n + share * (other.phases[p] - same.phases[p]) for p, n in phases.items()}
            activations += share * (other.activations - same.activations)
        if c.setting not in ("zero1", _REFERENCE):  # those two differ in accumulated gradients only
            stage = self._interpolate(self.points[c.setting], c.micro_batch)
            stage_2 = self._reference(_POLICY, c.micro_batch)
            more = {p: stage.phases[p] - stage_2.phases[p] for p in phases}
            phases = self._stage_0(phases, stage, more) if c.stage == 0 else {p: n + more[p] for p, n in phases.items()}
            states, host = stage.states, stage.host
        host = host + (self.all_gradients / self.ranks if c.offload and c.stage == 2 and c.accumulation > 1 else 0)
        phases = self._accumulated(c, phases)
        larger_bucket = (c.bucket - BUCKETS[0]) * self.element_bytes if c.bucket else 0
        if c.stage == 3:
            phases = {p: n + larger_bucket for p, n in phases.items()}
        else:
            phases["backward"] += 2 * larger_bucket
        peak = max(phases.values())
        return Footprint(
            peak=peak,
            capacity=peak * base.capacity,
            reserved=peak * base.reserved,
            activations=activations,
            states=states,
            host=host,
        )

    def _reference(self, policy: str, micro_batch: int) -> ProfileSummary:
        """At ZeRO-2 with the first kernel."""
        return self._interpolate({m: self.reference[policy, self.kernel, m] for m in (1, self.largest)}, micro_batch)

    def _interpolate(self, known: dict[int, ProfileSummary], micro_batch: int) -> ProfileSummary:
        """Linear between the smallest and the largest micro-batch."""
        low, high = known[1], known[self.largest]
        share = (micro_batch - 1) / (self.largest - 1) if self.largest > 1 else 0.0

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        phases = {p: between(low.phases[p], high.phases[p]) for p in low.phases}
        activations = between(low.activations, high.activations)
        shares = {"capacity": between(low.capacity, high.capacity), "reserved": between(low.reserved, high.reserved)}
        return replace(low, phases=phases, activations=activations, host=between(low.host, high.host), **shares)

    def _stage_0(self, phases: Phases, stage: ProfileSummary, more: Phases) -> Phases:
        """Stage 0 has no buckets; its gradients grow while activations are freed, so the peak is at either end."""
        forward = phases["forward"] + more["forward"]
        all_gradients = stage.states + self.all_gradients * (1 + 4 / self.element_bytes)  # with their fp32 copy
        beyond = phases["backward"] - phases["forward"] - 2 * BUCKETS[0] * self.element_bytes
        backward = max(forward + max(0.0, beyond), min(all_gradients, stage.phases["step"]))
        return {"forward": forward, "backward": backward, "step": stage.phases["step"]}

    def _accumulated(self, c: Candidate, phases: Phases) -> Phases:
        """With the gradients that are kept from one micro-batch to the next."""
        if c.accumulation == 1 or c.offload or c.stage == 3:
            return phases
        kept = self.all_gradients / (self.ranks if c.stage == 2 else 1)
        if c.stage == 0:
            forward = phases["forward"] + kept
            return phases | {"forward": forward, "backward": max(forward, phases["backward"])}
        return phases | {p: phases[p] + kept for p in ("forward", "backward")}


class ProfilerPool:
    """A pool of processes, each of which makes one profile or count.

    Args:
        processes: at once; by default one a core.
        gpu: whose operators' scratch counts, as in `gpus.PEAKS`.
    """

    def __init__(self, processes: int | None = None, gpu: str = MemoryRequest.gpu):
        self.gpu = gpu
        self.folder = tempfile.TemporaryDirectory()  # for candidates' DeepSpeed JSON files
        self.pool = worker_pool(processes or usable_cores(), __name__, initializer=_quiet)

    def __enter__(self) -> ProfilerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.folder.cleanup()

    def profile(self, c: Candidate, config: RunConfig, ds: dict[str, Any], ranks: int) -> Future[ProfileSummary]:
        """Start an exact profile of a candidate's step."""
        return self.pool.submit(_profile, self.as_run(c, config, ds), ranks, self.gpu)

    def profiles(
        self, among: list[Candidate], config: RunConfig, ds: dict[str, Any], ranks: int
    ) -> list[ProfileSummary]:
        """Exact profiles of these candidates."""
        futures = [self.profile(c, config, ds, ranks) for c in among]
        return results(futures, "predict exactly")

    def as_run(self, c: Candidate, config: RunConfig, ds: dict[str, Any]) -> RunConfig:
        """The run's configuration with a candidate's settings."""
        path = Path(self.folder.name) / f"{c.name}.json"
        write_json(path, c.deepspeed(ds))
        return c.applied(config, str(path))

    def survey(
        self, among: list[Candidate], config: RunConfig, ds: dict[str, Any], ranks: int
    ) -> tuple[MemoryModel, FlopCounts]:
        """The profiles and counts from which all candidates' memory and time follow.

        Raises:
            UserError: a run that can't be built.
        """
        policies = list(dict.fromkeys(c.policy for c in among))
        largest = max(c.micro_batch for c in among)
        ends = tuple(dict.fromkeys((1, largest)))
        kernels = list(dict.fromkeys(c.kernel for c in among))
        settings = sorted({c.setting for c in among} - {"zero1", _REFERENCE}, reverse=True)

        def profiled_run(setting: str) -> RunConfig:
            c = Candidate(
                setting=setting,
                micro_batch=largest,
                accumulation=1,
                policy=_POLICY,
                kernel=kernels[0],
                bucket=BUCKETS[0] if SETTINGS[setting]["stage"] else 0,
            )
            return self.as_run(c, config, ds)

        points = [(p, kernels[0], m) for p in dict.fromkeys((*policies, _POLICY)) for m in ends]
        points += dict.fromkeys((c.policy, c.kernel, largest) for c in among if c.kernel != kernels[0])
        # the longest task first, so that the processes end at about the same time
        reference = self.pool.submit(_policies_and_kernels, profiled_run(_REFERENCE), ranks, self.gpu, points)
        stages = {s: self.pool.submit(_micro_batches, profiled_run(s), ranks, self.gpu, ends) for s in settings}
        # every_K recomputes all layers, as block does
        counted_as = {p: _POLICY if p.startswith("every_") else p for p in (*policies, "none")}
        counts = {p: self.pool.submit(_count, _with_policy(config, p)) for p in dict.fromkeys(counted_as.values())}
        model_flops = self.pool.submit(step_flops, config)
        started: list[Future[Any]] = [reference, *stages.values(), *counts.values(), model_flops]
        results(started, "predict")
        counted = {p: counts[same].result() for p, same in counted_as.items()}
        flops = FlopCounts(
            model_flops=model_flops.result(),
            passes={p: passes for p, (passes, _) in counted.items()},
            traces={p: trace for p, (_, trace) in counted.items()},
        )
        summaries = {s: f.result() for s, f in stages.items()}
        element_bytes = DeepSpeedJson(ds).dtype.itemsize
        return MemoryModel(reference.result(), summaries, flops.trained, element_bytes, ranks), flops


def results(futures: Sequence[Future[Result]], label: str) -> list[Result]:
    """The futures' results, in their order, once all have them, under a progress bar.

    Raises:
        Exception: of the first that fails.
    """
    for future in progress_bar(as_completed(futures), label, total=len(futures), unit="profile", disable=not futures):
        future.result()
    return [f.result() for f in futures]


def _with_policy(config: RunConfig, policy: str) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": policy})})


# --- what the pool's processes run ------------------------------------------------------------------------------------


def _quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _micro_batches(
    config: RunConfig, ranks: int, gpu: str, micro_batches: tuple[int, ...] = ()
) -> dict[int, ProfileSummary]:
    from dit_ds.planning.memory.worker import estimate

    found = estimate(MemoryRequest(config, ranks, gpu=gpu, micro_batches=micro_batches, share=_SHARE))
    return {m: ProfileSummary.of(p, found.figures[m]) for m, p in found.profiles.items()}


def _profile(config: RunConfig, ranks: int, gpu: str) -> ProfileSummary:
    (summary,) = _micro_batches(config, ranks, gpu).values()
    return summary


def _count(config: RunConfig) -> tuple[Passes, ModuleTrace]:
    trace = ModuleTrace()
    return hardware_flops(config, trace.record), trace


def _policies_and_kernels(
    config: RunConfig, ranks: int, gpu: str, points: Sequence[Point]
) -> dict[Point, ProfileSummary]:
    """Steps of one engine below stage 3, with one policy and kernel after another."""
    from dit_ds.models.image_encoder import JointAttention
    from dit_ds.models.text_encoder import offline_text
    from dit_ds.planning.memory.fake_cluster import fake_cluster, fake_tensors
    from dit_ds.planning.memory.kernels.gpu_scratch import GpuScratch
    from dit_ds.planning.memory.profiled_step import Steps
    from dit_ds.planning.memory.request import on_gpu
    from dit_ds.planning.memory.tracker import MemoryTracker
    from dit_ds.planning.memory.worker import StepSequences

    tracker = MemoryTracker(host=lambda x: x.device.type == "cpu", gpu=GpuScratch(gpu))
    config = on_gpu(config)
    summaries: dict[Point, ProfileSummary] = {}
    with offline_text(config), fake_cluster(ranks) as world, fake_tensors(tracker):
        steps = Steps.load(config, world, tracker)
        sequences = StepSequences(steps, tracker)
        model = steps.engine.module
        for policy, kernel, micro_batch in points:
            model.image_encoder.checkpoint_activations(policy)
            for module in model.modules():
                if isinstance(module, JointAttention):
                    module.backend = "sdpa_efficient" if kernel in ("auto", "sdpa", "xformers") else kernel
            profile, requests, sites = sequences.take(micro_batch)
            found = figures(requests, sites, MemoryRequest.settings, _SHARE)
            summaries[policy, kernel, micro_batch] = ProfileSummary.of(profile, found)
    return summaries
