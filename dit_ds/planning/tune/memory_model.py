"""What each candidate takes of a GPU: a few profiles of fake steps, combined by rule.

Exact profiles (`memory.predict`) take seconds each, so not every candidate gets one. Profiled are, at ZeRO-2, each way of
activation checkpointing at the smallest and the largest micro-batch and with each kernel at the largest; and with one way
of checkpointing every other stage at both. The rest follows, phase by phase (forward, backward, step):

    micro-batch     along the line between the two
    stage           adds in every phase what it adds to the profiled points: states don't depend on activations
    kernel          adds what it adds at the largest micro-batch, in proportion to the micro-batch
    accumulation    the gradients that wait for the next micro-batch: all at stages 0 and 1, a rank's part at stage 2; at
                    stage 3 and with offload they have their place anyway
    buckets         two of `reduce_bucket_size` in the backward pass at stages 1 and 2 (overlap_comm), one for good at 3

`benchmarks/tune.py` compares the rule with exact profiles.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.engine.deepspeed_json import DeepSpeedJson
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.files import write_json
from dit_ds.planning.flops import hardware_flops, step_flops
from dit_ds.planning.memory.request import MemoryRequest
from dit_ds.planning.tune.candidates import BUCKETS, Candidate
from dit_ds.planning.tune.time_model import FlopCounts

_REFERENCE = "zero2"
_POINT = "block"  # checkpointing of the other stages' profiled points
Phases = dict[str, float]  # bytes at most, by phase
Point = tuple[str, str, int]  # checkpointing, kernel, micro-batch


@dataclass(frozen=True)
class Footprint:
    """A rank's bytes.

    Attributes:
        peak: at most at once on the GPU.
        activations: that wait for the backward pass when a forward pass is over.
        states: what is there between steps: parameters, optimizer states and what else stays.
        host: at most at once in host memory.
        exact: a profile of this very candidate, not the rule.
    """

    peak: float
    activations: float
    states: float
    host: float
    exact: bool = False


@dataclass(frozen=True)
class Profiled:
    """What is kept of a profile. Bytes."""

    phases: Phases
    peak: float
    activations: float
    states: float
    host: float
    gradients: float

    @staticmethod
    def of(profile: Any) -> Profiled:
        """From `tracker.Profile`."""
        after = profile.after
        phases = {name: float(profile.phases[name]) for name in ("forward", "backward", "step")}
        return Profiled(
            phases, profile.peak, sum(profile.kept.values()), sum(after.values()), profile.host, after["gradients"]
        )

    def footprint(self) -> Footprint:
        """Of the very candidate."""
        return Footprint(self.peak, self.activations, self.states, self.host, exact=True)


class MemoryModel:
    """The rule, from the profiles.

    Args:
        reference: ZeRO-2's, by point.
        points: the other settings' by micro-batch, with `block` and the first kernel.
        trained: parameters.
        of_type: bytes of an element.
        ranks: GPUs.
    """

    def __init__(
        self,
        reference: dict[Point, Profiled],
        points: dict[str, dict[int, Profiled]],
        trained: int,
        of_type: int,
        ranks: int,
    ):
        self.reference, self.points = reference, points
        self.all_gradients, self.of_type, self.ranks = trained * of_type, of_type, ranks
        self.most = max(micro_batch for *_, micro_batch in reference)
        self.kernel = next(kernel for _, kernel, _ in reference)

    def of(self, c: Candidate) -> Footprint:
        """A candidate's, by the rule."""
        at = self._at(c.policy, c.micro_batch)
        phases, states, host = dict(at.phases), at.states, at.host
        activations = at.activations
        if c.kernel != self.kernel:
            other, same = (self.reference[c.policy, k, self.most] for k in (c.kernel, self.kernel))
            share = c.micro_batch / self.most
            phases = {p: n + share * (other.phases[p] - same.phases[p]) for p, n in phases.items()}
            activations += share * (other.activations - same.activations)
        if c.setting not in ("zero1", _REFERENCE):  # those two are one but for accumulated gradients
            stage, base = self._line(self.points[c.setting], c.micro_batch), self._at(_POINT, c.micro_batch)
            more = {p: stage.phases[p] - base.phases[p] for p in phases}
            phases = self._stage_0(phases, stage, more) if c.stage == 0 else {p: n + more[p] for p, n in phases.items()}
            states, host = stage.states, stage.host
        host = host + (self.all_gradients / self.ranks if c.offload and c.stage == 2 and c.accumulation > 1 else 0)
        phases = self._accumulated(c, phases)
        more_of_buckets = (c.bucket - BUCKETS[0]) * self.of_type if c.bucket else 0
        if c.stage == 3:
            phases = {p: n + more_of_buckets for p, n in phases.items()}
        else:
            phases["backward"] += 2 * more_of_buckets
        return Footprint(max(phases.values()), activations, states, host)

    def _at(self, policy: str, micro_batch: int) -> Profiled:
        """ZeRO-2's with the reference kernel."""
        return self._line({m: self.reference[policy, self.kernel, m] for m in (1, self.most)}, micro_batch)

    def _line(self, known: dict[int, Profiled], micro_batch: int) -> Profiled:
        """Between the smallest and the largest micro-batch."""
        low, high = known[1], known[self.most]
        share = (micro_batch - 1) / (self.most - 1) if self.most > 1 else 0.0

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        phases = {p: between(low.phases[p], high.phases[p]) for p in low.phases}
        kept = between(low.activations, high.activations)
        return replace(low, phases=phases, activations=kept, host=between(low.host, high.host))

    def _stage_0(self, phases: Phases, stage: Profiled, more: Phases) -> Phases:
        """No buckets, but the gradients, which fill up as activations go: what is most is at either end."""
        forward = phases["forward"] + more["forward"]
        full = stage.states + self.all_gradients * (1 + 4 / self.of_type)  # and, at the end, their copy in fp32
        beyond = phases["backward"] - phases["forward"] - 2 * BUCKETS[0] * self.of_type
        backward = max(forward + max(0.0, beyond), min(full, stage.phases["step"]))
        return {"forward": forward, "backward": backward, "step": stage.phases["step"]}

    def _accumulated(self, c: Candidate, phases: Phases) -> Phases:
        if c.accumulation == 1 or c.offload or c.stage == 3:
            return phases
        waiting = self.all_gradients / (self.ranks if c.stage == 2 else 1)
        if c.stage == 0:
            begin = phases["forward"] + waiting
            return phases | {"forward": begin, "backward": max(begin, phases["backward"])}
        return phases | {p: phases[p] + waiting for p in ("forward", "backward")}


# --- the processes in which it is counted -----------------------------------------------------------------------------


class ProfilerPool:
    """A pool of processes, in each of which one thing is profiled or counted."""

    def __init__(self, processes: int | None = None):
        # a server that has imported everything is forked for each job: the imports take longer than many an answer
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dit_ds.planning.memory.worker", "dit_ds.planning.tune.memory_model"])
        self.folder = tempfile.TemporaryDirectory()  # for candidates' DeepSpeed JSON files
        self.pool = ProcessPoolExecutor(
            processes or len(os.sched_getaffinity(0)), context, initializer=_quiet, max_tasks_per_child=1
        )

    def __enter__(self) -> ProfilerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.folder.cleanup()

    def profile(self, c: Candidate, config: RunConfig, ds: dict[str, Any], ranks: int) -> Future[Profiled]:
        """An exact profile of a candidate's step."""
        return self.pool.submit(_one_profile, self.as_run(c, config, ds), ranks)

    def profiles(self, among: list[Candidate], config: RunConfig, ds: dict[str, Any], ranks: int) -> list[Profiled]:
        """Exact ones of these candidates."""
        futures = [self.profile(c, config, ds, ranks) for c in among]
        return [f.result() for f in futures]

    def as_run(self, c: Candidate, config: RunConfig, ds: dict[str, Any]) -> RunConfig:
        """The run as it would be with a candidate's settings."""
        path = Path(self.folder.name) / f"{c.name}.json"
        write_json(path, c.deepspeed(ds))
        return c.applied(config, str(path))

    def survey(self, among: list[Candidate], config: RunConfig, ds: dict[str, Any], ranks: int) -> tuple:
        """What all candidates follow from: (`MemoryModel`, `FlopCounts`).

        Raises:
            UserError: a run that can't be built.
        """
        policies = list(dict.fromkeys(c.policy for c in among))
        most = max(c.micro_batch for c in among)
        ends = tuple(dict.fromkeys((1, most)))
        kernels = list(dict.fromkeys(c.kernel for c in among))
        settings = list(dict.fromkeys(c.setting for c in among))

        def base(setting: str) -> Candidate:
            bucket = BUCKETS[0] if SETTINGS[setting]["stage"] else 0
            return Candidate(setting, most, 1, _POINT, kernels[0], bucket)

        points = [(p, kernels[0], m) for p in dict.fromkeys((*policies, _POINT)) for m in ends]
        points += dict.fromkeys((c.policy, c.kernel, most) for c in among if c.kernel != kernels[0])
        # the longest first, so that none is left over at the end
        reference = self.pool.submit(_sweep, self.as_run(base(_REFERENCE), config, ds), ranks, points)
        others = [s for s in sorted(settings, reverse=True) if s not in ("zero1", _REFERENCE)]
        stages = {s: self.pool.submit(_profile, self.as_run(base(s), config, ds), ranks, ends) for s in others}
        # every_K computes all layers again, as block does
        alike = {p: _POINT if p.startswith("every_") else p for p in (*policies, "none")}
        counts = {p: self.pool.submit(_count, _with_policy(config, p)) for p in dict.fromkeys(alike.values())}
        model_flops = self.pool.submit(step_flops, config)
        counted = {p: counts[like].result() for p, like in alike.items()}
        work = FlopCounts(
            model_flops.result(), {p: c[0] for p, c in counted.items()}, {p: c[1] for p, c in counted.items()}
        )
        of_type = DeepSpeedJson(ds).dtype.itemsize
        profiled = {s: f.result() for s, f in stages.items()}
        return MemoryModel(reference.result(), profiled, work.trained, of_type, ranks), work


def _with_policy(config: RunConfig, policy: str) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": policy})})


def _quiet() -> None:
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _profile(config: RunConfig, ranks: int, micro_batches: tuple[int, ...] = ()) -> dict[int, Profiled]:
    from dit_ds.planning.memory.worker import answer

    return {m: Profiled.of(p) for m, p in answer(MemoryRequest(config, ranks, micro_batches)).profiles.items()}


def _one_profile(config: RunConfig, ranks: int) -> Profiled:
    (profiled,) = _profile(config, ranks).values()
    return profiled


def _count(config: RunConfig) -> tuple:
    from dit_ds.planning.communication import ModuleTrace

    shape = ModuleTrace()
    passes = hardware_flops(config, shape.watch)
    return passes, shape


def _sweep(config: RunConfig, ranks: int, points: Iterable[Point]) -> dict[Point, Profiled]:
    """Steps of one engine, below stage 3, with one way of checkpointing and kernel after another."""
    from dit_ds.models.image_encoder import WordAttention
    from dit_ds.models.text_encoder import offline_text
    from dit_ds.planning.memory.fake_cluster import fake_cluster, fake_tensors
    from dit_ds.planning.memory.profiled_step import Steps
    from dit_ds.planning.memory.request import on_gpu
    from dit_ds.planning.memory.tracker import MemoryTracker

    tracker, config, found = MemoryTracker(host=lambda x: x.device.type == "cpu"), on_gpu(config), {}
    with offline_text(config), fake_cluster(ranks) as world, fake_tensors(tracker):
        steps = Steps(config, world, tracker)
        steps.warm_up()
        model = steps.engine.module
        for policy, kernel, micro_batch in points:
            model.image_encoder.checkpoint_activations(policy)
            for module in model.modules():
                if isinstance(module, WordAttention):
                    module.backend = "sdpa_efficient" if kernel in ("auto", "sdpa", "xformers") else kernel
            found[policy, kernel, micro_batch] = Profiled.of(steps.take(micro_batch))
    return found
