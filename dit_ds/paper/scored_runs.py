"""A run's evaluation results, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.evaluation.results import METRICS, checked_evaluation, evaluations_in_training
from dit_ds.files import read_json
from dit_ds.paper.experiments import settings_of
from dit_ds.paper.tables import EXPRESSIONS, Column


class NotEvaluated(UserError):
    """A run that has not been evaluated."""


class NoRun(UserError):
    """A folder that is no run's, or is not there."""


@dataclass
class ScoredRun:
    """A run's results with one kind of prompt.

    Attributes:
        run: its folder.
        prompt: text, point or box.
        settings: see `experiments.settings_of`.
        steps: the training step that was evaluated, by split.
        scores: in percent, with two digits as in the paper.
        expressions: how many were evaluated, by split.
        unlike_paper: why the figures can't be compared with the paper's: splits have another number of expressions.
        notes: other reservations about the figures, for people.
    """

    run: str
    config: RunConfig
    prompt: str
    settings: dict[str, Any]
    steps: dict[str, int]
    scores: dict[Column, float]
    expressions: dict[str, int] = field(default_factory=dict)
    unlike_paper: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(folder: str | Path, manifest: str | None = None) -> list[ScoredRun]:
    """The newest results of a run on each split, one entry for each kind of prompt.

    Results are `evaluations/*.json`, which `dit-ds eval` writes. If these lack the split that training evaluates, its
    result is the line of metrics.jsonl of the same step, else the last line.

    Args:
        manifest: read only results on the shards whose manifest's SHA-256 begins so; by default, on those that the run
            evaluates on.
    Raises:
        NotEvaluated: there is no result yet.
        NoRun: no run folder.
        UserError: a damaged file.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise NoRun(f"{folder} is no run: it has no config.yaml; name a folder that dit-ds train made")
    config = load_config(folder / "config.yaml")
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    others = 0  # results on other shards
    for path in sorted((folder / "evaluations").glob("*.json")):
        found = checked_evaluation(read_json(path, "evaluation"), config)
        if found is None:
            raise UserError(f"{path} is no evaluation: remove it, or run dit-ds eval again")
        if not _of_set(found, manifest):
            others += 1
            continue
        newest = by_prompt.setdefault(found["prompt"], {})
        if not found.get("shuffle_text") and found["step"] >= newest.get(found["split"], {"step": -1})["step"]:
            newest[found["split"]] = found
    in_training = [] if manifest else evaluations_in_training(folder, config)
    if in_training:
        newest = by_prompt.setdefault(in_training[-1]["prompt"], {})
        steps = {e["step"] for e in newest.values()}
        same_step = [e for e in in_training if e["step"] in steps]
        newest.setdefault(in_training[-1]["split"], (same_step or in_training)[-1])
    scored = [
        _scored(folder, config, prompt, splits) for prompt, splits in sorted(by_prompt.items(), reverse=True) if splits
    ]
    if not scored and manifest:
        raise NotEvaluated(
            f"{folder} has no evaluation on shards {manifest}: see manifest_sha in its evaluations/*.json"
        )
    if not scored:
        raise NotEvaluated(f"{folder} has no evaluation yet: run dit-ds eval {folder} --split {config.data.val_split}")
    if others:
        what = "1 evaluation" if others == 1 else f"{others} evaluations"
        scored[0].notes.append(f"{what} on other shards left out: --shards HASH reads them")
    return scored


def _of_set(result: dict[str, Any], manifest: str | None) -> bool:
    """Whether a result is of the asked shards; results of former versions do not say, and are the run's own."""
    if manifest is None:
        return result.get("configured_set", True) is True
    return str(result.get("manifest_sha", "")).startswith(manifest)


def _scored(folder: Path, config: RunConfig, prompt: str, splits: dict[str, dict[str, Any]]) -> ScoredRun:
    d = config.data
    dataset = d.val_set.split("/")[0]
    splits = dict(sorted(splits.items(), key=lambda item: (item[0] != d.val_split, item[0])))
    steps = {split: e["step"] for split, e in splits.items()}
    scores = {
        Column(dataset, split, metric): round(100 * e[metric], 2)
        for split, e in splits.items()
        for metric in METRICS
        if e[metric] is not None
    }
    settings = settings_of(config, prompt, trained=max(steps.values()) > 0)
    expressions = {split: e["n"] for split, e in splits.items()}
    scored = ScoredRun(
        str(folder), config, prompt, settings=settings, steps=steps, scores=scores, expressions=expressions
    )
    for split, e in splits.items():
        full = EXPRESSIONS.get(dataset, {}).get(split)
        if e["n"] != full:
            known = f"{full:,} of {dataset}" if full else f"none that the paper has ({dataset})"
            scored.unlike_paper.append(
                f"not comparable: {split} has {e['n']:,} expressions instead of {known}; neither ranked nor subtracted"
            )
        if e["threshold"] != config.eval.threshold:
            scored.notes.append(f"{split} at threshold {e['threshold']:g}, not the run's {config.eval.threshold:g}")
    if len(set(steps.values())) > 1:
        at = ", ".join(f"{split} of step {step}" for split, step in steps.items())
        scored.notes.append(f"evaluated at different steps: {at}")
    return scored
