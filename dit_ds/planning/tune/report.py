"""The result of a search as text."""

from __future__ import annotations

from typing import Any

from dit_ds.files import GIB
from dit_ds.planning.memory.plan import MARGIN
from dit_ds.planning.tune.candidates import BUCKETS
from dit_ds.planning.tune.search import ScoredCandidate, SearchResult

_COLUMNS = (
    f"{'candidate':<44} {'a GPU':>7} {'GiB':>6} {'allocated':>10} {'reserved':>9} {'samples/s':>10} {'measured':>9}"
)


def lines(result: SearchResult, written: dict[str, Any], explain: bool) -> list[str]:
    """The assumptions, the front with the chosen candidate, and where the files are.

    Args:
        written: what `output.write` returned.
        explain: say why the others were not chosen.
    """
    a, cluster = result.assumed.as_dict(), result.cluster
    fitting = sum(s.fits for s in result.candidates)
    measured = sum(s.measured is not None for s in result.candidates)
    out = [
        f"predicted, {f'{measured} of them' if measured else 'not'} measured: {len(result.candidates)} candidates for "
        f"{cluster.nodes} x {cluster.gpus} {a['gpu']} of {cluster.capacity / GIB:.1f} GiB, of which {fitting} fit; "
        f"{written['seconds']:.0f} s",
        f"assumed: {a['mfu']:.0%} of the GPU's peak, half of that at {a['half_tokens']} tokens a micro-batch; "
        f"{a['hbm_share']:.0%} of {a['hbm_gb_s']:g} GB/s of its memory; {a['link_gbit']:g} Gbit/s out of a node, "
        f"{a['intra_gb_s']:g} GB/s a GPU inside, {a['overlap']:.0%} of a pass hides communication, {a['latency_us']:g} us a "
        f"ring step; {a['pcie_gb_s']:g} GB/s to the host, {a['host_gb_s']:g} GB/s of its memory a node; attention kernels "
        "alike but for what they compute and move",
        "",
        _COLUMNS,
    ]
    shown = {id(s): s for s in (*result.front, result.chosen, *filter(None, [result.configured]))}
    shown |= {id(s): s for s in result.candidates if s.trial}
    out += [_line(result, s) for s in sorted(shown.values(), key=result.candidates.index)]
    out += [
        f"GiB: that a GPU must have: the allocator's least capacity, {MARGIN:.0%} of it as a margin, CUDA's context and NCCL; "
        "then allocated and reserved; ~: by rule, not by its own profile"
    ]
    if explain:
        out += ["", *explained(result)]
    files = [path for name, path in written["files"].items() if name != "sbatch"]
    return [*out, "", f"written: {', '.join(files)}", written["files"]["sbatch"]]


def _line(result: SearchResult, scored: ScoredCandidate) -> str:
    c = scored.candidate
    marks = ["chosen"] * (scored is result.chosen) + ["as configured"] * (scored is result.configured)
    marks += ["does not fit"] * (not scored.fits)
    measured = "failed" if scored.failure is not None else ""
    if scored.measured is not None:
        measured = f"{scored.measured:.1f}"
    f = scored.footprint
    memory = f"{'' if f.exact else '~'}{result.memory(scored) / GIB:.1f}"
    figures = f"{f.peak / GIB:>10.1f} {f.reserved / GIB:>9.1f}"
    samples = f"{c.micro_batch} x {c.accumulation}"
    return f"{c.name:<44} {samples:>7} {memory:>6} {figures} {scored.speed:>10.0f} {measured:>9}  {', '.join(marks)}".rstrip()


_DIMENSIONS = {
    "setting": "ZeRO stage and offload",
    "micro_batch": "micro-batch",
    "policy": "activation checkpointing",
    "kernel": "attention",
    "bucket": "bucket",
}


def explained(result: SearchResult) -> list[str]:
    """For every other value of every dimension: the chosen candidate with only that one changed, and why it lost."""
    by_choices = {tuple(s.candidate.choices().values()): s for s in result.candidates}
    chosen = result.chosen.candidate.choices()
    out = [f"why not otherwise than {result.chosen.candidate.name}: one thing changed at a time"]
    for dimension, title in _DIMENSIONS.items():
        values = sorted({s.candidate.choices()[dimension] for s in result.candidates} - {chosen[dimension]}, key=str)
        changed = [(v, by_choices.get(_changed(chosen, dimension, v))) for v in values]
        if any(s for _, s in changed):
            out.append(f"  {title} (chosen: {chosen[dimension]})")
        out += [f"    {value}: {s.reason}" for value, s in changed if s]
    unfit = [s for s in result.candidates if not s.fits]
    if unfit:
        out.append(f"  {len(unfit)} do not fit, from {min(map(result.memory, unfit)) / GIB:.1f} GiB up")
    failed = [s for s in result.candidates if s.failure is not None]
    return [
        *out,
        *(f"  {s.candidate.name}: {s.reason}" for s in failed),
        "  of every candidate: candidates.json, 'why'",
    ]


def _changed(chosen: dict[str, Any], dimension: str, value: Any) -> tuple:
    other = chosen | {dimension: value}
    if dimension == "setting":  # stage 0 has no buckets; from stage 0 to another, the usual size
        other["bucket"] = 0 if value == "zero0" else other["bucket"] or BUCKETS[0]
    return tuple(other.values())
