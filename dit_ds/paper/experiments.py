"""The rows of the paper's tables as runs: the configuration of each, and when two runs are the same experiment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_ds.config.installed_files import paper_folder, short_name
from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.errors import UserError
from dit_ds.files import parse_json
from dit_ds.paper.tables import MISPRINTS, TABLES, Row, Table

# keys in which two runs may differ and still be the same experiment: paths, how it is computed, and the seed
_IGNORED_KEYS = {
    "run_dir", "seed", "checkpoint", "log", "deepspeed", "data.root", "data.workers", "model.attention",
    "text.tokenizer", "text.cache", "train.activation_checkpointing", "train.compile", "train.on_nonfinite",
    "eval.every_epochs", "eval.batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A row of a table on one dataset.

    Attributes:
        path: of its configuration file.
        config: the configuration.
        settings: see `settings_of`.
    """

    table: Table
    row: Row
    dataset: str
    path: Path
    config: RunConfig
    settings: dict[str, Any]

    def paper(self) -> dict[str, dict[str, float]]:
        """The paper's figures, by split and metric."""
        out: dict[str, dict[str, float]] = {}
        for column, value in self.row.values.items():
            if column.dataset == self.dataset:
                out.setdefault(column.split, {})[column.metric] = value
        return out


def table(number: int) -> Table:
    """The paper's table of that number.

    Raises:
        UserError: there is none.
    """
    if number not in TABLES:
        raise UserError(f"the paper has no table {number}: its tables are {min(TABLES)} to {max(TABLES)}")
    return TABLES[number]


def experiments(number: int | None = None, folder: str | Path | None = None) -> list[Experiment]:
    """The rows that have a configuration.

    Args:
        number: of a table; by default those of all tables.
        folder: of the configurations; by default the package's.
    Raises:
        UserError: no such table, or the configurations are not in this folder.
    """
    found, folder = [], paper_folder() if folder is None else folder
    for t in [table(number)] if number is not None else TABLES.values():
        for row in t.rows:
            for dataset, name in row.configs.items():
                path = Path(folder) / f"{name}.yaml"
                if not path.exists():
                    raise UserError(f"no {path} here: name their folder with --configs, or leave it out")
                config = load_config(path)
                settings = settings_of(config, row.prompt, row.trained)
                found.append(Experiment(t, row, dataset, path=path, config=config, settings=settings))
    return found


def settings_of(config: RunConfig, prompt: str = "text", trained: bool = True) -> dict[str, Any]:
    """The settings in which the rows of the paper's tables differ. Runs with the same settings are the same experiment.

    Args:
        prompt: kind of prompt in the evaluation: text, point or box.
        trained: False for a model as it was released; the settings of training are then left out.
    """
    m, d = config.model, config.data
    settings = {
        "method": m.name,
        "dataset": d.dataset,
        "split_by": d.split_by,
        "size": m.size,
        "prompt": prompt,
        "trained": trained,
    }
    if m.name == "dit_sam":
        settings |= {"scheme": m.scheme, "decoder_layers": m.decoder_layers}
        settings["static_tokens"] = m.static_tokens > 0  # the paper doesn't say how many
    if not trained:
        return settings
    if m.lora is not None:  # in no row of the paper
        settings["lora"] = sorted(m.lora.targets)
    return settings | {
        "image_encoder_frozen": m.freeze_image_encoder,
        "mask_decoder_frozen": m.freeze_mask_decoder,
        "projections_frozen": m.freeze_projections,
        "text_encoder": text_encoder(config.text.name),
        "text_encoder_frozen": config.text.freeze,
        "trained_with": sorted(d.prompts),
    }


# no BERT, though some have it in their names
_OTHER_ENCODERS = re.compile(
    r"roberta|deberta|distilbert|mobilebert|albert|electra|mpnet|xlnet|gpt|llama|bart|\bm?t5\b|\bopt\b"
)


def text_encoder(name: str) -> str:
    """clip, bert or another kind: by the `model_type` in the folder `text.name`, else by the name."""
    try:
        kind = parse_json((Path(name) / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = Path(name).name
    kind = kind.lower()
    other = _OTHER_ENCODERS.search(kind)
    return "clip" if "clip" in kind else other[0] if other else "bert"


def differences(config: RunConfig, other: RunConfig) -> list[str]:
    """The keys in which two configurations differ, without those that do not change the experiment (`_IGNORED_KEYS`).

    Args:
        config, other: of runs with the same `settings_of`.
    """
    mine, others = flat_config(config), flat_config(other)
    for values in (mine, others):
        values["model.checkpoint"] = bool(values["model.checkpoint"])
        values["text.name"] = text_encoder(values["text.name"])
    return [
        key
        for key, value in mine.items()
        if value != others[key] and key not in _IGNORED_KEYS and key.partition(".")[0] not in _IGNORED_KEYS
    ]


def flat_config(config: RunConfig) -> dict[str, Any]:
    """A configuration's values by dotted key."""
    return _flat(config.model_dump(mode="json"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and prefix == "" else {prefix + key: value}
    return out


def listing(number: int | None = None, folder: str | Path | None = None) -> dict[str, Any]:
    """`dit-ds experiments`: `experiments`, and `misprints`, where the paper disagrees with itself."""
    rows = [
        {
            "config": short_name(e.path),
            "table": e.table.number,
            "row": e.row.name,
            "line": e.row.line,
            "run": e.config.run_dir,
            "settings": e.settings,
            "paper": e.paper(),
        }
        for e in experiments(number, folder)
    ]
    return {"experiments": rows, "misprints": [m._asdict() for m in MISPRINTS]}


def lines(result: dict[str, Any]) -> list[str]:
    """The result of `listing` as text: by table, each row's configuration, name, run folder and the paper's oIoU."""
    out: list[str] = []
    for number in dict.fromkeys(e["table"] for e in result["experiments"]):
        of_table = [e for e in result["experiments"] if e["table"] == number]
        t = TABLES[number]
        out += ["", f"Table {number} (section {t.section}): {t.title}" + (f" ({t.note})" if t.note else "")]
        width = max(len(e["config"]) for e in of_table)
        names = max(len(_what(e)) for e in of_table)
        runs = max(len(e["run"]) for e in of_table)
        for e in of_table:
            out.append(f"  {e['config']:{width}}  {_what(e):{names}}  {e['run']:{runs}}  {_figures(e['paper'])}")
    return out[1:]


def _what(experiment: dict[str, Any]) -> str:
    dataset = experiment["settings"]["dataset"]
    return experiment["row"] + ("" if dataset == "refcoco" else f" on {dataset}")


def _figures(paper: dict[str, dict[str, float]]) -> str:
    """The oIoU of each split; for Table 8 the GPU's memory."""
    if "gpu" in paper:
        return f"{paper['gpu']['gb']:g} GB"
    return "oIoU " + ", ".join(f"{split} {values['oiou']:.2f}" for split, values in paper.items() if "oiou" in values)
