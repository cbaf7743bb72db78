"""Damage a sharded set in seeded ways: does `data verify` find each, and what does reading it for training do? And forge
run folders, checkpoints and exported files: what do the commands that read them do (see forgeries.py)?

python benchmarks/mutations.py --json                             # 1,000 damages and 280 forgeries
python benchmarks/mutations.py --n 50 --forgeries 7 --out /tmp/m  # a minute: that it works

Training may stop in one line, name the samples that are bad, or read what was never touched; a sample that differs from
the undamaged set's, is lost or comes twice without a word is silently wrong, and there must be none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import forgeries  # noqa: E402
import numpy as np  # noqa: E402
from damages import DAMAGES  # noqa: E402

from dit_ds.data.loading.dataset import ExpressionDataset  # noqa: E402
from dit_ds.data.loading.index import BadSample, SplitIndex  # noqa: E402
from dit_ds.data.sample_set.write import write_sample_set  # noqa: E402
from dit_ds.data.shards.verify import verify_shards  # noqa: E402
from dit_ds.data.shards.write import shard_refer  # noqa: E402
from dit_ds.errors import UserError  # noqa: E402

# from the best to the worst; a damage counts as the worst that it does to any split
OUTCOMES = ("identical", "bad samples named", "stopped", "traceback", "silently wrong")
READERS = {"map": False, "stream": True}


def make_set(folder: Path, images: int, seed: int) -> Path:
    """A sharded sample set whose refs have one to four sentences; its folder."""
    write_sample_set(folder / "refer", images, seed, processes=1)
    refs_file = folder / "refer/refcoco/refs(unc).p"
    refs = pickle.loads(refs_file.read_bytes())
    for ref in refs:
        del ref["sentences"][1 + ref["ref_id"] % 4 :]
    refs_file.write_bytes(pickle.dumps(refs, protocol=2))
    shard_refer(
        folder / "refer", folder / "refer/images/train2014", "refcoco", "unc", folder, shards={"train": 4}, processes=1
    )
    return folder / "refcoco/unc"


def _tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros(64, np.int64)
    ids[: len(text.encode()[:64])] = list(text.encode()[:64])
    return ids, ids > 0


def _digest(sample: dict[str, Any]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for key, value in sorted(sample.items()):
        h.update(key.encode())
        h.update(value.tobytes() if isinstance(value, (np.ndarray, np.generic)) else repr(value).encode())
    return h.hexdigest()


def read_epoch(folder: Path, split: str, unit: str, streamed: bool = False) -> list[str | UserError]:
    """Every sample of an epoch in order, as a digest of all that is in it, or the error in its place."""
    dataset = ExpressionDataset(SplitIndex.load(folder, split), unit, 64, _tokenize, streamed=streamed)
    samples = [dataset[(0, k, 1.0)] for k in range(len(dataset))]
    return [s if isinstance(s, UserError) else _digest(s) for s in samples]


def outcome_of_reading(folder: Path, unit: str, streamed: bool, whole: dict[tuple[str, str], list[str]]) -> str:
    """The worst of OUTCOMES over the splits; `whole` has the undamaged set's digests by split and unit."""
    worst = 0
    for split, due in [(s, d) for (s, u), d in whole.items() if u == unit]:
        try:
            found = read_epoch(folder, split, unit, streamed)
        except UserError:
            worst = max(worst, OUTCOMES.index("stopped"))
            continue
        except Exception as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            worst = max(worst, OUTCOMES.index("traceback"))
            continue
        if any(isinstance(f, UserError) and not isinstance(f, BadSample) for f in found):
            worst = max(worst, OUTCOMES.index("stopped"))
        elif len(found) != len(due) or any(isinstance(f, str) and f != d for f, d in zip(found, due)):
            return "silently wrong"
        elif any(isinstance(f, BadSample) for f in found):
            worst = max(worst, OUTCOMES.index("bad samples named"))
    return OUTCOMES[worst]


def found_by_verify(folder: Path) -> bool | None:
    """Whether `data verify` reports an error; None: it ended with a traceback."""
    try:
        return not verify_shards(folder, processes=1)["ok"]
    except UserError:
        return True
    except Exception as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return None


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def run(n: int, seed: int, folder: Path, images: int = 48) -> dict[str, Any]:
    """Damage a set of so many images `n` times, each kind in turn; counts by kind."""
    good, other = make_set(folder / "good", images, seed), make_set(folder / "other", images, seed + 1)
    splits = json.loads((good / "manifest.json").read_text())["splits"]
    whole = {(s, u): read_epoch(good, s, u) for s in splits for u in ("ref", "sentence")}
    assert verify_shards(good, 1)["ok"] and all(isinstance(x, str) for d in whole.values() for x in d)
    before, by_kind, missed = _contents(good), {}, []
    start = time.perf_counter()
    for i in range(n):
        kind = list(DAMAGES)[i % len(DAMAGES)]
        rng = random.Random(f"{seed} {i}")
        description, copy = "", folder / "copy"
        while not description or _contents(copy) == before:  # a random damage may change nothing
            for p in copy.glob("*"):
                p.unlink()
            copy.mkdir(exist_ok=True)
            for p in good.iterdir():
                os.link(p, copy / p.name)
            description = DAMAGES[kind](copy, rng, other)
        found, unit = found_by_verify(copy), ("ref", "sentence")[i // len(DAMAGES) % 2]
        outcomes = {r: outcome_of_reading(copy, unit, streamed, whole) for r, streamed in READERS.items()}
        none = dict.fromkeys(OUTCOMES, 0)
        row = by_kind.setdefault(kind, {"damages": 0, "found_by_verify": 0} | {r: dict(none) for r in READERS})
        row["damages"] += 1
        row["found_by_verify"] += bool(found)
        for reader, outcome in outcomes.items():
            row[reader][outcome] += 1
        if not found or {"traceback", "silently wrong"} & set(outcomes.values()):
            missed.append({"damage": i, "kind": kind, "what": description, "found_by_verify": found} | outcomes)
    assert _contents(good) == before
    total: dict[str, Any] = {k: sum(r[k] for r in by_kind.values()) for k in ("damages", "found_by_verify")}
    for reader in READERS:
        total[reader] = {o: sum(r[reader][o] for r in by_kind.values()) for o in OUTCOMES}
    return {"seed": seed, "total": total, "by_kind": by_kind, "missed": missed,
            "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def forge(n: int, seed: int, folder: Path, commands: tuple[str, ...] = tuple(forgeries.COMMANDS)) -> dict[str, Any]:
    """Forged runs of a small sharded set, see `forgeries.run`."""
    make_set(folder / "set", 24, seed)
    return forgeries.run(n, seed, folder, folder / "set", commands)


def markdown(result: dict[str, Any], command: str) -> str:
    """The report."""
    rows = [{"kind": k} | r for k, r in result["by_kind"].items()] + [{"kind": "all"} | result["total"]]
    columns = {"damage": lambda r: r["kind"]}
    columns |= {k.replace("_", " "): lambda r, k=k: r[k] for k in ("damages", "found_by_verify")}
    columns |= {o: lambda r, o=o: " / ".join(str(r[reader][o]) for reader in READERS) for o in OUTCOMES}
    return f"""# Damaged sets

{result["machine"]}, {result["date"]}. `{command}`, {result["seconds"]:.0f} s

A sharded sample set of {result["images"]} images, damaged in seeded ways, each time a fresh copy. `data verify` looks for
the damage; and every sample of every split is read as for training, by offset / as a stream, and compared, bit for bit,
with the undamaged set's. "Identical": the damage lies where that reader never looks (tar headers, padding, the order of
members) or where only a report comes from.
"Sealed again": the manifest's checksum was recomputed, so only cross-checks can find the damage.

{common.table(rows, columns)}
{_forged(result["forged"])}"""


def _forged(result: dict[str, Any]) -> str:
    """The report's part on forged runs."""
    rows = [{"kind": k} | r for k, r in result["by_kind"].items()] + [{"kind": "all"} | result["total"]]
    columns = {"forgery": lambda r: r["kind"]}
    columns |= {k: lambda r, k=k: r[k] for k in ("forgeries", *forgeries.OUTCOMES)}
    return f"""
# Forged runs

A run's folder, its checkpoint and its exported file, forged in seeded ways, each time a fresh copy, and given to
{", ".join(f"`{c}`" for c in result["commands"])}. "Sealed again": the checkpoint's manifest has the forged files' sizes and
hashes. "Used": as data. "Escaped": a process was started, or a file outside the run's folder was touched.

{common.table(rows, columns)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="damages (default 1000)")
    parser.add_argument("--forgeries", type=int, default=280, help="of runs, see forgeries.py (default 280)")
    parser.add_argument("--seed", type=int, default=0, help="another seed damages otherwise (default 0)")
    parser.add_argument("--images", type=int, default=48, help="of the set that is damaged (default 48)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for mutations.json and .md")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutations_", dir=os.environ.get("TMPDIR")) as scratch:
        forged = forge(args.forgeries, args.seed, Path(scratch) / "forged")
        result = run(args.n, args.seed, Path(scratch), args.images) | {"forged": forged}
    result = common.conditions("cpu") | {"images": args.images} | result
    command = f"python benchmarks/mutations.py --n {args.n} --forgeries {args.forgeries} --seed {args.seed} --json"
    common.write(args.out, "mutations", result, markdown(result, command))
    total = result["total"]
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in total.items()))
    if result["missed"] or forged["wrong"] or total["found_by_verify"] < total["damages"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
