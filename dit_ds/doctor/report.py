"""The findings of all ranks as one result: equal ones once, with the ranks that have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dit_ds.doctor.check import Check
from dit_ds.doctor.rendezvous import ranks_text


def compare(facts: dict[int, dict[str, Any]]) -> Iterator[Check]:
    """Failed checks for facts that must be the same on all ranks and are not, or must differ and do not."""
    for name in ("python", "torch", "deepspeed"):
        by_value = _by_value({r: f.get("versions", {}).get(name) for r, f in facts.items()})
        if len(by_value) > 1:
            yield Check("same versions", "fail", f"{name} {_where(by_value)}", "give every node the same environment")
    by_device = _by_value({r: f.get("device") for r, f in facts.items()})
    if len(by_device) > 1:
        remedy = "sbatch --gpus-per-node, on nodes whose drivers work"
        yield Check("same devices", "fail", f"device {_where(by_device)}", remedy)
    by_gpu = _by_value({r: f"{f['gpu']} on {f['host']}" for r, f in facts.items() if f.get("gpu")})
    for gpu, ranks in by_gpu.items():
        if len(ranks) > 1:
            yield Check("gpu", "fail", f"{ranks_text(ranks)} share GPU {gpu}", "start one process a GPU")


def _by_value(values: dict[int, Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    return groups


def _where(groups: dict[Any, list[int]]) -> str:
    return "; ".join(f"{value or 'none'} on {ranks_text(ranks)}" for value, ranks in groups.items())


def merge(by_rank: dict[int, list[Check]], world_size: int, of_all: list[Check] | None = None) -> dict[str, Any]:
    """The result; findings of several ranks that differ in numbers alone are one, with the range of each number.

    Args:
        of_all: findings about all ranks together.
    Returns:
        `ok`, `world_size` and `checks`: `name`, `status`, `found`, `remedy` and, unless all have it, `ranks`.
    """
    groups: dict[tuple, list[tuple[int, Check]]] = {}
    for rank, checks in sorted(by_rank.items()):
        for check in checks:
            pattern = tuple("#" if _number(t) is not None else t for t in check.found.split(" "))
            groups.setdefault((check.name, check.status, pattern, check.remedy), []).append((rank, check))
    order = list(dict.fromkeys(name for name, *_ in groups))
    merged = []
    for (name, status, _, remedy), members in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        entry: dict[str, Any] = {"name": name, "status": status, "found": _ranges([c.found for _, c in members])}
        ranks = sorted({r for r, _ in members})
        merged.append(entry | {"remedy": remedy} | ({} if len(ranks) == world_size else {"ranks": ranks}))
    merged += [dataclasses.asdict(c) for c in of_all or ()]
    return {"ok": all(m["status"] != "fail" for m in merged), "world_size": world_size, "checks": merged}


def _number(token: str) -> float | None:
    try:
        return float(token)
    except ValueError:
        return None


def _ranges(texts: list[str]) -> str:
    tokens = []
    for column in zip(*(t.split(" ") for t in texts)):
        low, high = (f(column, key=lambda t: _number(t) or 0.0) for f in (min, max))
        tokens.append(low if low == high else f"{low} to {high}")
    return " ".join(tokens)


def lines(result: dict[str, Any]) -> list[str]:
    """The result as lines for people: one for each check, and a verdict."""
    out = []
    for check in result["checks"]:
        where = f" [{ranks_text(check['ranks'])}]" if "ranks" in check else ""
        remedy = f" -> {check['remedy']}" if check["remedy"] else ""
        out.append(f"{check['status']:4}  {check['name']:15} {check['found']}{where}{remedy}")
    count = {s: sum(c["status"] == s for c in result["checks"]) for s in ("fail", "warn")}
    out.append(f"{'ok' if result['ok'] else 'NOT ok'}: {count['fail']} failed, {count['warn']} warnings")
    return out
