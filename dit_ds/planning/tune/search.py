"""The search: all candidates get a footprint and a step time, what does not fit goes, the fastest is chosen.

The footprints of the chosen one and of the Pareto front (no candidate is both smaller and faster) are then replaced by
exact profiles, until nothing changes any more or the front's limit is reached.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.engine.deepspeed_json import DeepSpeedJson, read_deepspeed_json
from dit_ds.errors import RunFailed, UserError
from dit_ds.files import GIB
from dit_ds.planning.gpus import MEMORY_GIB, known_gpu, peak_flops, require_peak
from dit_ds.planning.memory.plan import needed
from dit_ds.planning.tune.candidates import Candidate, candidates, configured_candidate
from dit_ds.planning.tune.memory_model import Footprint, ProfilerPool
from dit_ds.planning.tune.time_model import Assumptions, Predictor

_VERIFIED = 4  # of the front at most get exact profiles, seconds each; the chosen one always does


@dataclass(frozen=True)
class Cluster:
    """The GPUs to tune for.

    Attributes:
        nodes, gpus: nodes, and GPUs a node; a rank each.
        capacity: bytes of a GPU.
        host: bytes of a node's memory; None where it is not looked at.
    """

    nodes: int
    gpus: int
    capacity: float
    host: float | None = None

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus


@dataclass
class ScoredCandidate:
    """A candidate with what is known of it.

    Attributes:
        step: seconds and their parts, see `Predictor.step`.
        own: whether it is what the configuration says.
        why: it was not chosen, in words.
        trial: what a measured trial found; see `trials`.
    """

    candidate: Candidate
    footprint: Footprint
    step: dict[str, Any]
    fits: bool = False
    own: bool = False
    why: str = ""
    trial: dict[str, Any] | None = None

    @property
    def speed(self) -> float:
        """Samples a second, predicted."""
        return self.step["samples_per_second"]


@dataclass
class SearchResult:
    """The answer: every candidate, the fastest first."""

    place: Cluster
    rows: list[ScoredCandidate]
    chosen: ScoredCandidate
    front: list[ScoredCandidate]
    own: ScoredCandidate | None
    assumed: Assumptions
    notes: list[str] = field(default_factory=list)

    def memory(self, row: ScoredCandidate) -> float:
        """Bytes that a GPU must have for it."""
        return needed(row.footprint.peak, self.place.ranks)


def check(config: RunConfig, place: Cluster, assumed: Assumptions) -> dict[str, Any]:
    """Refuse what can't be; return the run's DeepSpeed JSON.

    Raises:
        UserError: another model, an unknown GPU, an impossible number or type, a batch that does not divide.
    """
    if (model := config.model.name) != "dit_sam":
        raise UserError(
            f"dit-ds tune knows dit_sam only: dit-ds memory plan predicts {model}'s memory, dit-ds scaling its step time"
        )
    if place.nodes < 1 or place.gpus < 1:
        raise UserError(f"--nodes {place.nodes} --gpus {place.gpus}: there is at least one node, with one GPU")
    assumed.check()
    ds = read_deepspeed_json(config)
    require_peak(assumed.machine.gpu, DeepSpeedJson(ds).dtype)
    if place.ranks > config.train.batch_size:
        raise UserError(
            f"{place.ranks} GPUs share train.batch_size {config.train.batch_size}: use at most so many, "
            f"or set train.batch_size {place.ranks} or a multiple"
        )
    return ds


def search(
    config: RunConfig, place: Cluster, assumed: Assumptions, jobs: ProfilerPool, among: list[Candidate] | None = None
) -> SearchResult:
    """Predict all candidates and choose.

    Raises:
        UserError: see `check`.
        RunFailed: nothing fits; it says what would.
    """
    ds = check(config, place, assumed)
    gpu = known_gpu(assumed.machine.gpu) or ""
    among = candidates(config, ds, place.ranks, gpu) if among is None else among
    footprints, counted = jobs.survey(among, config, ds, place.ranks)
    predictor = Predictor(config, ds, DeepSpeedJson(ds).dtype, counted, assumed)
    rows = [ScoredCandidate(c, footprints.of(c), predictor.step(c, place.ranks)) for c in among]

    def exact(some: list[ScoredCandidate]) -> None:
        profiles = jobs.profiles([r.candidate for r in some], config, ds, place.ranks)
        for row, profile in zip(some, profiles):
            row.footprint = profile.footprint()

    mine = configured_candidate(config, ds, among)
    for row in rows:
        row.own = row.candidate == mine
    return choose(rows, place, assumed, exact)


def choose(rows: list[ScoredCandidate], place: Cluster, assumed: Assumptions, exact: Any) -> SearchResult:
    """Prune, rank, verify.

    Args:
        exact: called with rows, to put exact footprints in.
    Raises:
        NothingFits: with the smallest.
    """
    verified = 0
    while True:
        _judge(rows, place)
        fitting = [r for r in rows if r.fits]
        chosen = min(fitting, key=_order, default=None)
        front = pareto(fitting)
        # what decides first: the chosen one, or else the smallest of those that don't fit; then the front, from the fast end
        first = chosen or min(rows, key=lambda r: r.footprint.peak)
        rest = [r for r in reversed(front) if r is not first and not r.footprint.exact][: max(0, _VERIFIED - verified)]
        unsure = [r for r in (first, *rest) if not r.footprint.exact]
        if not unsure:
            break
        exact(unsure)
        verified += len(unsure)
    if chosen is None:
        raise NothingFits(first, place)
    for row in rows:
        row.why = why(row, chosen, place)
    rows.sort(key=lambda r: (not r.fits, *_order(r)))
    mine = next((r for r in rows if r.own), None)
    return SearchResult(place, rows, chosen, front, mine, assumed)


class NothingFits(RunFailed):
    """No candidate does; `row` is the smallest."""

    def __init__(self, row: ScoredCandidate, place: Cluster):
        self.row = row
        super().__init__(f"no setting fits: {too_large(row, place)}")


def _order(row: ScoredCandidate) -> tuple:
    """The fastest first; of equals the smallest, then the one that was configured, then the simplest."""
    return (round(row.step["step_seconds"], 9), row.footprint.peak // 2**22, not row.own, row.candidate.stage)


def _judge(rows: list[ScoredCandidate], place: Cluster) -> None:
    for row in rows:
        row.fits = needed(row.footprint.peak, place.ranks) <= place.capacity and _host_fits(row, place)


def _host_fits(row: ScoredCandidate, place: Cluster) -> bool:
    return place.host is None or row.footprint.host * place.gpus <= place.host


def pareto(rows: list[ScoredCandidate]) -> list[ScoredCandidate]:
    """Those than which none is smaller and as fast, by memory."""
    front: list[ScoredCandidate] = []
    for row in sorted(rows, key=lambda r: (r.footprint.peak, *_order(r))):
        if not front or row.speed > front[-1].speed * (1 + 1e-9):
            front.append(row)
    return front


def too_large(row: ScoredCandidate, place: Cluster) -> str:
    """What a candidate needs, against what there is."""
    f = row.footprint
    if needed(f.peak, place.ranks) > place.capacity:
        return (
            f"needs {needed(f.peak, place.ranks) / GIB:.1f} of {place.capacity / GIB:.1f} GiB a GPU, "
            f"{f.activations / GIB:.1f} of them activations and {f.states / GIB:.1f} parameters and states"
        )
    return f"needs {f.host * place.gpus / GIB:.1f} of {place.host / GIB:.1f} GiB of a node's memory"


_IN_WORDS = {
    "compute": "the kernel computes more",
    "recompute": "computes activations again",
    "small_micro_batch": "smaller micro-batches",
    "attention_maps": "attention's maps go through memory",
    "gradients": "gradients to send",
    "weights": "weights to gather",
    "update": "a slower update",
    "offload": "transfers to the host",
}


def why(row: ScoredCandidate, chosen: ScoredCandidate, place: Cluster) -> str:
    """Why a candidate was not chosen, with numbers."""
    if row is chosen:
        return "chosen"
    if not row.fits:
        return f"does not fit: {too_large(row, place)}"
    step, best = row.step["step_seconds"], chosen.step["step_seconds"]
    more = (row.footprint.peak - chosen.footprint.peak) / GIB
    of_memory = f"{abs(more):.1f} GiB {'more' if more > 0 else 'less'}"
    if step / best - 1 < 1e-6:
        return f"as fast, with {of_memory} at the peak" if abs(more) >= 0.05 else "as fast and as large"
    parts = {k: row.step["parts"][k] - chosen.step["parts"][k] for k in _IN_WORDS}
    worst = sorted((k for k in parts if parts[k] > 0.05 * (step - best)), key=lambda k: -parts[k])[:3]
    reasons = ", ".join(f"{_IN_WORDS[k]} (+{parts[k] * 1e3:.2g} ms)" for k in worst)
    return f"{step / best - 1:.0%} slower ({(step - best) * 1e3:.2g} ms a step): {reasons}; {of_memory}"


def closest(config: RunConfig, place: Cluster, assumed: Assumptions, nothing: NothingFits, jobs: ProfilerPool) -> str:
    """What the smallest candidate would fit on, computed: other GPUs, more nodes, smaller images."""
    ds, c = read_deepspeed_json(config), nothing.row.candidate
    dtype = DeepSpeedJson(ds).dtype
    options = []
    need = needed(nothing.row.footprint.peak, place.ranks)
    if need > place.capacity:
        enough = sorted((gib, name) for name, gib in MEMORY_GIB.items() if gib * GIB >= need)
        enough = [(gib, n) for gib, n in enough if peak_flops(n, dtype)]
        options += [f"a GPU of {gib:.0f} GiB (as {name})" for gib, name in enough[:1]]
    asked = []
    batch = config.train.batch_size
    for nodes in (2 * place.nodes, 4 * place.nodes, 8 * place.nodes):
        other = dataclasses.replace(place, nodes=nodes)
        if batch % other.ranks == 0:
            smaller = dataclasses.replace(c, micro_batch=1, accumulation=batch // other.ranks)
            asked.append((f"{nodes} nodes of {place.gpus} GPUs", config, smaller, other))
    for size in (config.data.image_size * 3 // 4 // 16 * 16, config.data.image_size // 2 // 16 * 16):
        if size:
            data = config.data.model_copy(update={"image_size": size})
            asked.append((f"--data.image_size {size}", config.model_copy(update={"data": data}), c, place))
    futures = [jobs.profile(cand, conf, ds, there.ranks) for _, conf, cand, there in asked]
    kinds = set()
    for (what, _, cand, there), future in zip(asked, futures):
        kind = what.startswith("--")
        row = ScoredCandidate(cand, future.result().footprint(), {})
        _judge([row], there)
        if row.fits and kind not in kinds:
            kinds.add(kind)
            options.append(f"{what} ({needed(row.footprint.peak, there.ranks) / GIB:.1f} GiB)")
    what = "; it would fit with " + ", or ".join(options) if options else "; nothing tried would fit"
    return f"{nothing} (the smallest found: {c.name}){what}"
