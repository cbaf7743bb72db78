"""The runs of a submission: what each needs, and how far its folder says that it has come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import read_json
from dit_ds.paper import experiments


class Evaluation(NamedTuple):
    """A split, and the kind of prompt."""

    split: str
    prompt: str


@dataclass
class Run:
    """A run to train, to evaluate, or both.

    Attributes:
        folder: its `run_dir`.
        config: as it will train, with that folder.
        arguments: of `dit-ds train`.
        evaluations: what to evaluate after the training.
        trained: False for a model that is evaluated as it was released.
    """

    folder: Path
    config: RunConfig
    arguments: tuple[str, ...]
    evaluations: list[Evaluation] = field(default_factory=list)
    trained: bool = True

    def missing_sets(self) -> Iterator[tuple[str, str]]:
        """Root and name of the sets of shards that a run reads, and that are not there."""
        data = self.config.data
        names = dict.fromkeys(data.train_sets if self.trained else ())
        if self.evaluations or self.config.eval.every_epochs:
            names[data.val_set] = None
        for name in names:
            if not data.streamed and not Path(data.root, name, "manifest.json").exists():
                yield data.root, name

    def eval_arguments(self, e: Evaluation) -> tuple[str, ...]:
        """The arguments of `dit-ds eval`."""
        prompt = () if e.prompt == self.config.data.default_prompt else ("--prompt", e.prompt)
        if not self.trained:
            return (str(self.untrained_yaml()), "--split", e.split, *prompt)
        # training may have read its shards from a node's own disk; without evaluation it notes no set to compare with
        root = ("--data-root", self.config.data.root) if self.config.eval.every_epochs else ()
        return (str(self.folder), "--split", e.split, *prompt, *root)

    def require_same(self) -> None:
        """See that a run's folder, if it is there, is of the same configuration.

        Raises:
            UserError: names a key in which they differ.
        """
        path = self.folder / "config.yaml"
        if path.exists() and (changed := experiments.differences(self.config, load_config(path))):
            raise UserError(
                f"{self.folder} is a run with another {', '.join(changed[:3])}: choose another --runs, or remove that folder"
            )

    def finished(self) -> bool:
        """Whether a run's training has come to its end; nothing is to be trained of a model that is not."""
        steps = sorted(self.folder.glob("checkpoints/step_*/manifest.json"))
        if not steps or not self.trained:
            return not self.trained
        meta, most = steps[-1].with_name("meta.json"), self.config.train.max_steps
        over = most is not None and _count(meta, "progress", "step") >= most
        return over or _count(meta, "progress", "epoch") >= self.config.train.epochs

    def evaluated(self, e: Evaluation) -> bool:
        """Whether the checkpoint that `dit-ds eval` takes, the best or else the newest, was evaluated."""
        step = f"{0:08d}"
        if self.trained:
            best = self.folder / "best.json"
            newest = max(self.folder.glob("checkpoints/step_*/manifest.json")).parent.name.removeprefix("step_")
            step = f"{_count(best, 'step'):08d}" if best.exists() else newest
        return (self.folder / "evaluations" / f"{e.split}-{e.prompt}-step_{step}.json").exists()

    def untrained_yaml(self) -> Path:
        """The YAML to evaluate a model that is not trained by: the paper's own, or one in the run's folder."""
        path = Path(self.arguments[1])  # after --config
        return path if load_config(path) == self.config else self.folder / "config.yaml"


def _count(path: Path, *keys: str) -> int:
    """A number in a file of JSON objects.

    Raises:
        UserError: it is not there.
    """
    value = read_json(path, "state of the run")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int):
        raise UserError(f"{path} has no {'.'.join(keys)}: it is damaged, remove it")
    return value
