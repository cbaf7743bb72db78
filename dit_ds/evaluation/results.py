"""Evaluation results in a run's folder: written and read."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import parse_json, write_json

_log = logging.getLogger("dit_ds")

METRICS = ("p@0.5", "p@0.7", "p@0.9", "oiou", "miou")


def write_to_run(path: str | Path, config: RunConfig, result: dict[str, Any]) -> Path | None:
    """Write a result as `evaluations/SPLIT-PROMPT-step_XXXXXXXX.json` in the folder of the run.

    Of shards other than those that the run evaluates on, the name ends in `-HASH.json`, with the start of their
    manifest's SHA-256.

    It is the folder that the checkpoint lies in, if it lies in a run's; for weights that were not tuned, the folder that
    their configuration names, unless a run was trained there. Else nothing is written. A folder that can't be written
    is a warning: the result is on stdout.

    Args:
        path: as for `load_model`.
        result: with the keys `split`, `prompt`, `step`, `manifest_sha` and `configured_set`: whether these are the shards
            that the run evaluates on.
    Returns:
        The file; None where nothing is written.
    """
    from dit_ds.checkpointing import reader  # imports torch, which readers of results do not need

    if Path(path).suffix in (".yaml", ".yml"):
        run = Path(config.run_dir)
        if (run / "checkpoints").exists():  # the result would be read as one of the trained run
            return None
    elif Path(path).is_dir() and (found := reader.find(path).resolve()).parent.name == "checkpoints":
        run = found.parent.parent
    else:
        return None
    name = f"{result['split']}-{result['prompt']}-step_{result['step']:08d}"
    name += ".json" if result["configured_set"] else f"-{result['manifest_sha'][:8]}.json"
    file = run / "evaluations" / name
    try:
        write_json(file, result)
        if not (run / "config.yaml").exists():
            config.save(run / "config.yaml")
    except UserError as e:
        _log.warning(f"warning: the result is not kept: {e}")
        return None
    return file


def checked_evaluation(entry: Any, config: RunConfig) -> dict[str, Any] | None:
    """Check the JSON of an evaluation.

    Args:
        entry: of `evaluations/*.json` or metrics.jsonl.
        config: of the run.
    Returns:
        The entry with `prompt` and `threshold`, which those of training lack; None if it is not an evaluation's.
    """
    if not isinstance(entry, dict):
        return None
    entry = {"prompt": config.data.default_prompt, "threshold": config.eval.threshold} | entry
    kinds = {"split": str, "prompt": str, "n": int, "step": int, "threshold": float | int}
    right = all(isinstance(entry.get(k), kind) for k, kind in kinds.items()) and all(
        entry.get(k, ...) is None or (isinstance(entry.get(k), float | int) and math.isfinite(entry[k]))
        for k in METRICS  # null: it was not finite
    )
    return entry if right else None


def evaluations_in_training(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """The evaluations in a run's metrics.jsonl, oldest first, as `checked_evaluation` returns them."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = parse_json(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(entry, dict) and entry.get("kind") == "eval":
            found.append(checked_evaluation(entry, config))
    return [e for e in found if e is not None]
