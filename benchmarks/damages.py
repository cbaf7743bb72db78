"""Ways to damage a sharded set, each drawn from a seed. The set's files are hard links: what is damaged is replaced."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_ds.data.shards.manifest import COUNTS, write_manifest

Damage = Callable[[Path, random.Random, Path], str]  # a copy to damage and another set's folder; what was done


def _replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the copy's files are links to the undamaged ones
    path.write_bytes(data)


def _a_tar(copy: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(copy.glob("*.tar")))


def truncated(copy: Path, rng: random.Random, other: Path) -> str:
    path = _a_tar(copy, rng)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [m.offset for m in tar]
    at = rng.choice([rng.randrange(len(data)), rng.choice(headers), rng.choice(headers) + rng.randrange(512)])
    _replace(path, data[:at])
    return f"{path.name} cut at {at}"


def flipped(copy: Path, rng: random.Random, other: Path) -> str:
    path = _a_tar(copy, rng)
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 2, 4]))]
    for at in places:
        data[at] ^= rng.randrange(1, 256)
    _replace(path, bytes(data))
    return f"{path.name} flipped at {places}"


def flipped_header(copy: Path, rng: random.Random, other: Path) -> str:
    path = _a_tar(copy, rng)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = rng.choice([m.offset for m in tar]) + rng.randrange(512)
    data[at] ^= rng.randrange(1, 256)
    _replace(path, bytes(data))
    return f"{path.name} header flipped at {at}"


def _rewrite(path: Path, change: Callable[[list[list[Any]]], None]) -> None:
    """Write the tar anew from its `[name, bytes]`, after a change to them."""
    with tarfile.open(path) as tar:
        members = [[m.name, tar.extractfile(m).read()] for m in tar]
    change(members)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
            tar.addfile(info, io.BytesIO(data))
    _replace(path, out.getvalue())


def swapped_members(copy: Path, rng: random.Random, other: Path) -> str:
    path, column, kind = _a_tar(copy, rng), rng.randrange(2), rng.choice([".jpg", ".json"])

    def swap(members: list[list[Any]]) -> None:
        a, b = rng.sample([m for m in members if m[0].endswith(kind)], 2)
        a[column], b[column] = b[column], a[column]

    _rewrite(path, swap)
    return f"{path.name}: two {kind} members' {('names', 'bytes')[column]} swapped"


def swapped_samples(copy: Path, rng: random.Random, other: Path) -> str:
    path = _a_tar(copy, rng)

    def swap(members: list[list[Any]]) -> None:
        a, b = (2 * k for k in rng.sample(range(len(members) // 2), 2))
        members[a : a + 2], members[b : b + 2] = members[b : b + 2], members[a : a + 2]

    _rewrite(path, swap)
    return f"{path.name}: two samples swapped"


def deleted_member(copy: Path, rng: random.Random, other: Path) -> str:
    path = _a_tar(copy, rng)
    _rewrite(path, lambda members: members.pop(rng.randrange(len(members))))
    return f"{path.name}: a member removed"


def deleted_json_key(copy: Path, rng: random.Random, other: Path) -> str:
    path, said = _a_tar(copy, rng), []

    def remove(members: list[list[Any]]) -> None:
        member = rng.choice([m for m in members if m[0].endswith(".json")])
        meta = json.loads(member[1])
        within = rng.choice([meta, meta["refs"][0], meta["anns"], next(iter(meta["anns"].values()))])
        said.append(rng.choice(sorted(within)))
        del within[said[0]]
        member[1] = json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()

    _rewrite(path, remove)
    return f"{path.name}: JSON key {said[0]} removed"


def shards_swapped(copy: Path, rng: random.Random, other: Path) -> str:
    a, b = rng.sample(sorted(copy.glob("*.tar")), 2)
    spare = copy / "spare"
    a.rename(spare), b.rename(a), spare.rename(b)
    return f"{a.name} and {b.name} swapped"


def shard_lost(copy: Path, rng: random.Random, other: Path) -> str:
    path, how = _a_tar(copy, rng), rng.choice(["removed", "renamed", "emptied"])
    if how == "renamed":
        path.rename(path.with_name(f"x{path.name}"))
    elif how == "removed":
        path.unlink()
    else:
        _replace(path, b"")
    return f"{path.name} {how}"


def stale_shard(copy: Path, rng: random.Random, other: Path) -> str:
    path = _a_tar(copy, rng)
    data, whole = (other / path.name).read_bytes(), path.stat().st_size
    if rng.random() < 0.5:  # of the same size, so that sizes don't tell
        data = data[:whole].ljust(whole, b"\0")
    _replace(path, data)
    return f"{path.name} of another set, {len(data)} bytes for {whole}"


def broken_manifest(copy: Path, rng: random.Random, other: Path) -> str:
    path = copy / "manifest.json"
    data, how = path.read_bytes(), rng.choice(["flipped", "cut", "removed", "of another set"])
    at = rng.randrange(len(data))
    if how == "flipped":
        _replace(path, data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
    elif how == "cut":
        _replace(path, data[:at])
    elif how == "of another set":
        _replace(path, (other / "manifest.json").read_bytes())
    else:
        path.unlink()
    return f"manifest {how} at {at}"


def _edit(copy: Path, change: Callable[[dict[str, Any]], str]) -> str:
    """Change the manifest and seal it again, so that its own checksum does not tell."""
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    said = change(manifest)
    path.unlink()
    write_manifest(path, manifest)
    return f"manifest, sealed again: {said}"


def _an_entry(manifest: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    split = manifest["splits"][rng.choice(sorted(manifest["splits"]))]
    return split, rng.choice(split["shards"])


def wrong_number(copy: Path, rng: random.Random, other: Path) -> str:
    """An id, offset, size, CRC-32 or count."""

    def change(manifest: dict[str, Any]) -> str:
        split, entry = _an_entry(manifest, rng)
        row = rng.choice(entry["samples"])
        at: tuple[Any, Any] = rng.choice([(row, rng.randrange(7)), (row[7], rng.randrange(len(row[7]))),
                                          (entry, rng.choice(["bytes", *COUNTS])), (split, rng.choice(COUNTS))])  # fmt: skip
        at[0][at[1]] += rng.choice([-512, -1, 1, 2, 512, 10**6])
        return f"{entry['name']}: {'a sample' if isinstance(at[0], list) else 'counts'}[{at[1]}]"

    return _edit(copy, change)


def wrong_number_and_sums(copy: Path, rng: random.Random, other: Path) -> str:
    """A ref's number of sentences, or its refs, with every sum made to agree."""

    def change(manifest: dict[str, Any]) -> str:
        split, entry = _an_entry(manifest, rng)
        lengths = rng.choice(entry["samples"])[7]
        before = sum(lengths)
        if rng.random() < 0.5 and len(lengths) > 1:
            where, said = "refs", -1
            lengths.pop(rng.randrange(len(lengths)))
        else:
            where, said = "sentences", rng.choice([1, 2])
            lengths[rng.randrange(len(lengths))] += said
        for whose in (entry, split):
            whose["sentences"] += sum(lengths) - before
            whose["refs"] += said if where == "refs" else 0
        return f"{entry['name']}: {where} {said:+d}, sums agree"

    return _edit(copy, change)


def wrong_text(copy: Path, rng: random.Random, other: Path) -> str:
    """A SHA-256, a name, the set's dataset or split_by, or a field that is gone."""

    def change(manifest: dict[str, Any]) -> str:
        _, entry = _an_entry(manifest, rng)
        what = rng.choice(["sha256", "name", "dataset", "split_by", "gone"])
        if what == "gone":
            within = rng.choice([manifest, entry])
            what = rng.choice(["dataset", "split_by", "splits"] if within is manifest else sorted(entry))
            del within[what]
            return f"no {what}"
        whose = entry if what in entry else manifest
        whose[what] = {"sha256": "0" * 64, "name": f"x{entry['name']}"}.get(what, "refcocog")
        return f"another {what}"

    return _edit(copy, change)


def entries_moved(copy: Path, rng: random.Random, other: Path) -> str:
    """Samples or shards that are swapped or gone, within a split or between two, with every sum made to agree."""

    def change(manifest: dict[str, Any]) -> str:
        split, entry = _an_entry(manifest, rng)
        what = rng.choice(["two samples swapped", "two rows' members swapped", "a sample gone", "two shards swapped",
                           "a shard gone", "a split gone", "a sample twice", "two splits swapped"])  # fmt: skip
        rows, shards = entry["samples"], split["shards"]
        a, b = rng.sample(range(len(rows)), 2)
        if what == "two samples swapped":
            rows[a], rows[b] = rows[b], rows[a]
        elif what == "two rows' members swapped":
            rows[a][1:7], rows[b][1:7] = rows[b][1:7], rows[a][1:7]
        elif what == "a sample gone":
            rows.pop(a)
        elif what == "a sample twice":
            rows[a] = rows[b]
        elif what == "two shards swapped":
            shards = manifest["splits"]["train"]["shards"]
            c, d = rng.sample(range(len(shards)), 2)
            shards[c], shards[d] = shards[d], shards[c]
        elif what == "a shard gone":
            shards = manifest["splits"]["train"]["shards"]
            shards.pop(rng.randrange(len(shards)))
        elif what == "a split gone":
            del manifest["splits"][rng.choice(sorted(manifest["splits"]))]
        else:
            c, d = rng.sample(sorted(manifest["splits"]), 2)
            manifest["splits"][c], manifest["splits"][d] = manifest["splits"][d], manifest["splits"][c]
        for s in manifest["splits"].values():
            for e in s["shards"]:
                lengths = [n for row in e["samples"] for n in row[7]]
                e |= {"images": len(e["samples"]), "refs": len(lengths), "sentences": sum(lengths)}
            s |= {k: sum(e[k] for e in s["shards"]) for k in COUNTS}
        return f"{entry['name']}: {what}, sums agree"

    return _edit(copy, change)


DAMAGES: dict[str, Damage] = {
    "tar cut short": truncated,
    "bytes flipped in a tar": flipped,
    "byte flipped in a tar's header": flipped_header,
    "members' names or bytes swapped": swapped_members,
    "samples swapped in a tar": swapped_samples,
    "member removed": deleted_member,
    "JSON key removed": deleted_json_key,
    "shard files swapped": shards_swapped,
    "shard removed, renamed, emptied": shard_lost,
    "stale shard of another set": stale_shard,
    "manifest flipped, cut, removed, another set's": broken_manifest,
    "manifest sealed again: a number": wrong_number,
    "manifest sealed again: a number, sums agree": wrong_number_and_sums,
    "manifest sealed again: a hash, name or field": wrong_text,
    "manifest sealed again: entries moved or gone": entries_moved,
}
