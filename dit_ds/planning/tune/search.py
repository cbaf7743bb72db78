"""The search: every candidate gets a footprint and a step time; of those that fit, the fastest is chosen.

The footprints of the chosen candidate and of the Pareto front (no candidate is both smaller and faster) are then replaced
by exact profiles, until nothing changes any more or the limit of profiles for the front is reached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.engine.deepspeed_json import DeepSpeedJson, read_deepspeed_json
from dit_ds.errors import RunFailed, UserError
from dit_ds.files import GIB
from dit_ds.planning.gpus import MEMORY_GIB, known_gpu, peak_flops, require_peak
from dit_ds.planning.memory.plan import needed
from dit_ds.planning.tune.candidates import Candidate, candidates, configured_candidate
from dit_ds.planning.tune.memory_model import Footprint, ProfilerPool, results
from dit_ds.planning.tune.time_model import Assumptions, Predictor

_VERIFIED = 4  # exact profiles for the front at most, seconds each; the chosen candidate always gets one


@dataclass(frozen=True)
class Cluster:
    """The GPUs to tune for.

    Attributes:
        nodes: of the job.
        gpus: of a node, one rank each.
        capacity: bytes of a GPU's memory.
        host: bytes of a node's memory; None for no limit.
    """

    nodes: int
    gpus: int
    capacity: float
    host: float | None = None

    @property
    def ranks(self) -> int:
        """One for each GPU of all nodes."""
        return self.nodes * self.gpus


@dataclass
class ScoredCandidate:
    """A candidate with its predicted memory and time.

    Attributes:
        step: seconds and their parts, see `Predictor.step`.
        fits: into the cluster's memory.
        configured: it equals the run's present settings.
        reason: why it was or was not chosen, for people.
        trial: result of its measured trial; None without one; see `trials`.
    """

    candidate: Candidate
    footprint: Footprint
    step: dict[str, Any]
    fits: bool = False
    configured: bool = False
    reason: str = ""
    trial: dict[str, Any] | None = None

    @property
    def speed(self) -> float:
        """Predicted samples a second."""
        return self.step["samples_per_second"]

    @property
    def measured(self) -> float | None:
        """Samples a second of a successful trial; None without one."""
        return self.trial["samples_per_second"] if self.trial and self.trial["status"] == 0 else None

    @property
    def failure(self) -> str | None:
        """The error of a failed trial; None without one."""
        return self.trial["error"] if self.trial and self.trial["status"] else None


@dataclass
class SearchResult:
    """The scored candidates and the choice among them.

    Attributes:
        candidates: those that fit first, the fastest first.
        chosen: the best of them.
        front: the Pareto front of memory and speed, the smallest first.
        configured: the run's present settings, if they are among the candidates.
    """

    cluster: Cluster
    candidates: list[ScoredCandidate]
    chosen: ScoredCandidate
    front: list[ScoredCandidate]
    configured: ScoredCandidate | None
    assumed: Assumptions
    notes: list[str] = field(default_factory=list)

    def memory(self, scored: ScoredCandidate) -> float:
        """Bytes that a GPU must have for a candidate."""
        return needed(scored.footprint.capacity, self.cluster.ranks)


def check(config: RunConfig, cluster: Cluster, assumed: Assumptions) -> dict[str, Any]:
    """Refuse impossible requests.

    Returns:
        The run's DeepSpeed JSON.
    Raises:
        UserError: another model, an unknown GPU, an impossible number or type, a batch that does not divide.
    """
    if (model := config.model.name) != "dit_sam":
        raise UserError(
            f"dit-ds tune knows dit_sam only: dit-ds memory plan predicts {model}'s memory, dit-ds scaling its step time"
        )
    ds = read_deepspeed_json(config)
    require_peak(assumed.machine.gpu, DeepSpeedJson(ds).dtype)
    if cluster.ranks > config.train.batch_size:
        raise UserError(
            f"{cluster.ranks} GPUs share train.batch_size {config.train.batch_size}: use at most so many, "
            f"or set train.batch_size {cluster.ranks} or a multiple"
        )
    return ds


def search(
    config: RunConfig, cluster: Cluster, assumed: Assumptions, pool: ProfilerPool, among: list[Candidate] | None = None
) -> SearchResult:
    """Predict all candidates and choose.

    Args:
        among: by default all candidates of the run.
    Raises:
        UserError: see `check`.
        NothingFits: no candidate does.
    """
    ds = check(config, cluster, assumed)
    gpu = known_gpu(assumed.machine.gpu) or ""
    among = candidates(config, ds, cluster.ranks, gpu) if among is None else among
    memory_model, counts = pool.survey(among, config, ds, cluster.ranks)
    predictor = Predictor(config, ds, DeepSpeedJson(ds).dtype, counts, assumed)
    configured = configured_candidate(config, ds, among)
    scored = [
        ScoredCandidate(c, memory_model.predict(c), predictor.step(c, cluster.ranks), configured=c == configured)
        for c in among
    ]

    def verify(some: list[ScoredCandidate]) -> None:
        profiles = pool.profiles([s.candidate for s in some], config, ds, cluster.ranks)
        for s, profile in zip(some, profiles):
            s.footprint = profile.footprint()

    return choose(scored, cluster, assumed, verify)


def choose(
    scored: list[ScoredCandidate],
    cluster: Cluster,
    assumed: Assumptions,
    verify: Callable[[list[ScoredCandidate]], None],
) -> SearchResult:
    """Drop what does not fit, rank the rest, and verify the footprints that decide.

    Args:
        verify: replaces the footprints of the candidates it is called with by exact ones.
    Raises:
        NothingFits: no candidate does.
    """
    verified = 0
    while True:
        _judge(scored, cluster)
        fitting = [s for s in scored if s.fits]
        chosen = min(fitting, key=_order, default=None)
        front = pareto(fitting)
        # first the candidate that decides, chosen or the smallest of those that do not fit; then the front's fast end
        first = chosen or min(scored, key=lambda s: s.footprint.capacity)
        rest = [s for s in reversed(front) if s is not first and not s.footprint.exact][: max(0, _VERIFIED - verified)]
        inexact = [s for s in (first, *rest) if not s.footprint.exact]
        if not inexact:
            break
        verify(inexact)
        verified += len(inexact)
    if chosen is None:
        raise NothingFits(first, cluster)
    for s in scored:
        s.reason = reason(s, chosen, cluster)
    scored.sort(key=lambda s: (not s.fits, *_order(s)))
    configured = next((s for s in scored if s.configured), None)
    return SearchResult(cluster, scored, chosen, front, configured=configured, assumed=assumed)


class NothingFits(RunFailed):
    """No candidate fits.

    Attributes:
        smallest: the candidate that needs the least memory.
    """

    def __init__(self, smallest: ScoredCandidate, cluster: Cluster):
        self.smallest = smallest
        super().__init__(f"no setting fits: {too_large(smallest, cluster)}")


def _order(scored: ScoredCandidate) -> tuple[float, float, bool, int]:
    """The fastest first; among equals the smallest, then the configured one, then the lowest ZeRO stage."""
    seconds = round(scored.step["step_seconds"], 9)
    return (seconds, scored.footprint.capacity // 2**22, not scored.configured, scored.candidate.stage)


def _judge(scored: list[ScoredCandidate], cluster: Cluster) -> None:
    for s in scored:
        on_host = cluster.host is None or s.footprint.host * cluster.gpus <= cluster.host
        s.fits = needed(s.footprint.capacity, cluster.ranks) <= cluster.capacity and on_host


def pareto(scored: list[ScoredCandidate]) -> list[ScoredCandidate]:
    """The candidates than which none is smaller and as fast, the smallest first."""
    front: list[ScoredCandidate] = []
    for s in sorted(scored, key=lambda s: (s.footprint.capacity, *_order(s))):
        if not front or s.speed > front[-1].speed * (1 + 1e-9):
            front.append(s)
    return front


def too_large(scored: ScoredCandidate, cluster: Cluster) -> str:
    """The memory that a candidate needs, against what the cluster has."""
    f, need = scored.footprint, needed(scored.footprint.capacity, cluster.ranks)
    if cluster.host is None or need > cluster.capacity:
        return (
            f"needs {need / GIB:.1f} of {cluster.capacity / GIB:.1f} GiB a GPU, "
            f"{f.activations / GIB:.1f} of them activations and {f.states / GIB:.1f} parameters and states"
        )
    return f"needs {f.host * cluster.gpus / GIB:.1f} of {cluster.host / GIB:.1f} GiB of a node's memory"


_PARTS = {
    "compute": "the kernel computes more",
    "recompute": "recomputes activations",
    "small_micro_batch": "smaller micro-batches",
    "attention_maps": "attention's maps go through memory",
    "gradients": "gradients to send",
    "weights": "weights to gather",
    "update": "a slower update",
    "offload": "transfers to the host",
}


def reason(scored: ScoredCandidate, chosen: ScoredCandidate, cluster: Cluster) -> str:
    """Why a candidate was not chosen, with numbers."""
    if scored is chosen:
        return "chosen"
    if not scored.fits:
        return f"does not fit: {too_large(scored, cluster)}"
    step, best = scored.step["step_seconds"], chosen.step["step_seconds"]
    more = (scored.footprint.capacity - chosen.footprint.capacity) / GIB
    memory = f"{abs(more):.1f} GiB {'more' if more > 0 else 'less'}"
    if step / best - 1 < 1e-6:
        return f"as fast, with {memory} at the peak" if abs(more) >= 0.05 else "as fast and as large"
    parts = {k: scored.step["parts"][k] - chosen.step["parts"][k] for k in _PARTS}
    worst = sorted((k for k in parts if parts[k] > 0.05 * (step - best)), key=lambda k: -parts[k])[:3]
    causes = ", ".join(f"{_PARTS[k]} (+{parts[k] * 1e3:.2g} ms)" for k in worst)
    return f"{step / best - 1:.0%} slower ({(step - best) * 1e3:.2g} ms a step): {causes}; {memory}"


def closest(config: RunConfig, cluster: Cluster, assumed: Assumptions, nothing: NothingFits, pool: ProfilerPool) -> str:
    """The message of `NothingFits` with what the smallest candidate would fit on: other GPUs, more nodes, smaller images."""
    ds, c = read_deepspeed_json(config), nothing.smallest.candidate
    options = []
    need = needed(nothing.smallest.footprint.capacity, cluster.ranks)
    if need > cluster.capacity:
        enough = sorted((gib, name) for name, gib in MEMORY_GIB.items() if gib * GIB >= need)
        enough = [(gib, name) for gib, name in enough if peak_flops(name, DeepSpeedJson(ds).dtype)]
        options += [f"a GPU of {gib:.0f} GiB (as {name})" for gib, name in enough[:1]]
    changes = [*_more_nodes(config, cluster, c), *_smaller_images(config, cluster, c)]
    futures = [pool.profile(x.candidate, x.config, ds, x.cluster.ranks) for x in changes]
    kinds = set()
    for change, summary in zip(changes, results(futures, "predict what would fit")):
        scored = ScoredCandidate(change.candidate, summary.footprint(), {})
        _judge([scored], change.cluster)
        if scored.fits and change.kind not in kinds:
            kinds.add(change.kind)
            options.append(f"{change.text} ({needed(scored.footprint.capacity, change.cluster.ranks) / GIB:.1f} GiB)")
    remedy = "; it would fit with " + ", or ".join(options) if options else "; nothing tried would fit"
    return f"{nothing} (the smallest found: {c.name}){remedy}"


@dataclass(frozen=True)
class _Change:
    """A change of the request with which a candidate might fit."""

    kind: str
    text: str
    config: RunConfig
    candidate: Candidate
    cluster: Cluster


def _more_nodes(config: RunConfig, cluster: Cluster, c: Candidate) -> list[_Change]:
    changes, batch = [], config.train.batch_size
    for nodes in (2 * cluster.nodes, 4 * cluster.nodes, 8 * cluster.nodes):
        larger = dataclasses.replace(cluster, nodes=nodes)
        if batch % larger.ranks == 0:
            smaller = dataclasses.replace(c, micro_batch=1, accumulation=batch // larger.ranks)
            changes.append(_Change("nodes", f"{nodes} nodes of {cluster.gpus} GPUs", config, smaller, larger))
    return changes


def _smaller_images(config: RunConfig, cluster: Cluster, c: Candidate) -> list[_Change]:
    changes = []
    for size in (config.data.image_size * 3 // 4 // 16 * 16, config.data.image_size // 2 // 16 * 16):
        if size:
            data = config.data.model_copy(update={"image_size": size})
            smaller = config.model_copy(update={"data": data})
            changes.append(_Change("images", f"--data.image_size {size}", smaller, c, cluster))
    return changes
