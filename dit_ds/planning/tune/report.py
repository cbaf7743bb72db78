"""A search's answer for people."""

from __future__ import annotations

from typing import Any

from dit_ds.files import GIB
from dit_ds.planning.tune.candidates import BUCKETS
from dit_ds.planning.tune.search import ScoredCandidate, SearchResult

_COLUMNS = f"{'candidate':<44} {'a GPU':>7} {'GiB':>6} {'samples/s':>10} {'measured':>9}"


def lines(found: SearchResult, result: dict[str, Any], explain: bool) -> list[str]:
    """What was assumed, the front with the chosen one, and where the files are."""
    a, place = found.assumed.as_dict(), found.place
    fitting, measured = sum(r.fits for r in found.rows), sum(_measured(r) for r in found.rows)
    out = [
        f"predicted, {f'{measured} of them' if measured else 'not'} measured: {len(found.rows)} candidates for "
        f"{place.nodes} x {place.gpus} {a['gpu']} of {place.capacity / GIB:.1f} GiB, of which {fitting} fit; {result['seconds']:.0f} s",
        f"assumed: {a['mfu']:.0%} of the GPU's peak, half of that at {a['half_tokens']} tokens a micro-batch; "
        f"{a['hbm_share']:.0%} of {a['hbm_gb_s']:g} GB/s of its memory; {a['link_gbit']:g} Gbit/s out of a node, "
        f"{a['intra_gb_s']:g} GB/s a GPU inside, {a['overlap']:.0%} of a pass hides communication, {a['latency_us']:g} us a "
        f"ring step; {a['pcie_gb_s']:g} GB/s to the host, {a['host_gb_s']:g} GB/s of its memory a node; attention kernels "
        "alike but for what they compute and move",
        "",
        _COLUMNS,
    ]
    shown = {id(r): r for r in (*found.front, found.chosen, *filter(None, [found.own]))}
    shown |= {id(r): r for r in found.rows if r.trial}
    out += [_line(found, r) for r in sorted(shown.values(), key=found.rows.index)]
    out += ["GiB: of a GPU, with 5% for the allocator, context and NCCL; ~: by rule, not by its own profile"]
    if explain:
        out += ["", *explained(found)]
    out += [
        "",
        f"written: {', '.join(v for k, v in result['files'].items() if k != 'sbatch')}",
        result["files"]["sbatch"],
    ]
    return out


def _line(found: SearchResult, row: ScoredCandidate) -> str:
    c = row.candidate
    marks = [word for word, is_it in (("chosen", row is found.chosen), ("as configured", row is found.own)) if is_it]
    marks += ["does not fit"] * (not row.fits)
    measured = ""
    if row.trial:
        measured = f"{row.trial['samples_per_second']:.1f}" if _measured(row) else "failed"
    memory = f"{'' if row.footprint.exact else '~'}{found.memory(row) / GIB:.1f}"
    each = f"{c.micro_batch} x {c.accumulation}"
    return f"{c.name:<44} {each:>7} {memory:>6} {row.speed:>10.0f} {measured:>9}  {', '.join(marks)}".rstrip()


def _measured(row: ScoredCandidate) -> bool:
    return row.trial is not None and row.trial["status"] == 0


_DIMENSIONS = {
    "setting": "ZeRO stage and offload",
    "micro_batch": "micro-batch",
    "policy": "activation checkpointing",
    "kernel": "attention",
    "bucket": "bucket",
}


def explained(found: SearchResult) -> list[str]:
    """For every other value of every dimension: the chosen candidate with that one alone changed, and why it lost."""
    rows = {tuple(r.candidate.choices().values()): r for r in found.rows}
    chosen = found.chosen.candidate.choices()
    out = [f"why not otherwise than {found.chosen.candidate.name}: one thing changed at a time"]
    for dimension, title in _DIMENSIONS.items():
        values = sorted({r.candidate.choices()[dimension] for r in found.rows} - {chosen[dimension]}, key=str)
        changed = [(v, rows.get(_changed(chosen, dimension, v))) for v in values]
        if any(row for _, row in changed):
            out.append(f"  {title} (chosen: {chosen[dimension]})")
        out += [f"    {value}: {row.why}" for value, row in changed if row]
    unfit = [r for r in found.rows if not r.fits]
    if unfit:
        out.append(f"  {len(unfit)} do not fit, from {found.memory(min(unfit, key=found.memory)) / GIB:.1f} GiB up")
    failed = [r for r in found.rows if r.trial and r.trial["status"]]
    return out + [f"  {r.candidate.name}: {r.why}" for r in failed] + ["  of every candidate: candidates.json, 'why'"]


def _changed(chosen: dict[str, Any], dimension: str, value: Any) -> tuple:
    other = chosen | {dimension: value}
    if dimension == "setting":  # a stage without buckets has none, and one with has the usual
        other["bucket"] = 0 if value == "zero0" else other["bucket"] or BUCKETS[0]
    return tuple(other.values())
