"""The demo: sample set -> shards -> training on two ranks under ZeRO-2 -> evaluation -> pictures, as a user would.

Each step is a `dit-ds` command and is printed before it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_ds.data.progress import write_line
from dit_ds.errors import RunFailed, UserError

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
_TWO_RANKS = ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "dit_ds.cli")


def demo(folder: Path, scheme: str) -> dict[str, Any]:
    """Train one scheme and return the figures.

    Args:
        folder: for the sample set, its shards and the run; what former demos trained there stays.
        scheme: `model.scheme`.
    Returns:
        The keys of `dit-ds eval`, `shuffled_miou` (each image given another image's expressions), `train_seconds`, `run`,
        `scheme`, `sheet` (the contact sheet's file), `seconds`.
    Raises:
        UserError: the text encoder is not installed.
        RunFailed: a step failed.
    """
    from dit_ds.config.load import load_config
    from dit_ds.models.text_encoder import resolve_name

    resolve_name(load_config("sample").text.name)  # refused before anything is drawn
    start = time.perf_counter()
    run_dir = _new_run(folder, scheme)
    refer, shards = folder / "refer", folder / "shards"
    _run(["dit-ds", "data", "sample", refer])
    _run(["dit-ds", "data", "shard", "--refer-root", refer, "--images", refer / "images/train2014", "--out", shards])
    trained = _run([*_TWO_RANKS, "train", "--config", "sample", "--data.root", shards, "--run_dir", run_dir,
                    "--model.scheme", scheme, "--json"])  # fmt: skip
    evaluate = [*_TWO_RANKS, "eval", run_dir, "--split", "val", "--json"]
    figures, shuffled = _last_json(_run(evaluate)), _last_json(_run([*evaluate, "--shuffle-text"]))
    _run(["dit-ds", "sheet", run_dir, "--out", run_dir / "sheet.png", "--rows", "12"])
    return figures | {
        "shuffled_miou": shuffled["miou"],
        "train_seconds": _last_json(trained)["train_seconds"],
        "run": str(run_dir),
        "scheme": scheme,
        "sheet": str(run_dir / "sheet.png"),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _new_run(folder: Path, scheme: str) -> Path:
    """The run's folder: called by the scheme, and numbered where a former run has that name."""
    run_dir, number = folder / scheme, 1
    while run_dir.exists():
        run_dir, number = folder / f"{scheme}_{number + 1}", number + 1
    if number > 1:
        write_line(f"{folder / scheme} is there already and stays: this run goes to {run_dir}")
    return run_dir


def _run(command: Iterable[object]) -> str:
    """Print and run a command; return its stdout.

    Raises:
        UserError, RunFailed: it ended with status 2, or another than 0.
    """
    words = [str(c) for c in command]
    line = "$ " + " ".join(words)
    write_line(line)
    launcher = {"dit-ds": ["dit_ds.cli"], "torchrun": ["torch.distributed.run"]}[words[0]]
    started = subprocess.Popen(
        [sys.executable, "-m", *launcher, *words[1:]], stdout=subprocess.PIPE, text=True, env=os.environ | _ENVIRONMENT
    )
    try:
        printed, _ = started.communicate()
    except KeyboardInterrupt:
        # the command got Ctrl-C, too, and a training saves then; killed, its launcher would leave the ranks behind
        started.communicate()
        raise
    if started.returncode:
        error = UserError if started.returncode == 2 else RunFailed
        raise error(
            f"the demo stopped, as '{line[2:]}' ended with status {started.returncode}: see what it printed above"
        )
    return printed


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line."""
    return json.loads(text.splitlines()[-1])


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people: the figures, where everything is, what to try next."""
    r = result
    return [
        f"mIoU {r['miou']:.3f}, oIoU {r['oiou']:.3f} on {r['n']} expressions; with other images' expressions mIoU "
        f"{r['shuffled_miou']:.3f}; {r['seconds']:.0f} s, of which training {r['train_seconds']:.0f}",
        f"pictures: {r['sheet']}",
        f"next: dit-ds app {r['run']}    # try words of your own in a browser",
    ]
