"""`dit-ds compare`: where a run's row goes, its marks and distances, what is not comparable, formats, refusals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import ROOT, dit_ds, metrics_of

from dit_ds.cli.entry import main
from dit_ds.config.load import load_config
from dit_ds.errors import UserError
from dit_ds.paper.compare import by_keys, compare
from dit_ds.paper.tables import EXPRESSIONS

FULL = {"val": 10834, "testA": 5657, "testB": 5095}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def evaluation(split: str, n: int, oiou: float, step: int = 26000, **more) -> dict:
    figures = {f"p@0.{k}": round(oiou + 0.6 - 0.1 * k, 4) for k in range(5, 10)}
    return {"split": split, "prompt": "text", "n": n, "oiou": oiou, "miou": oiou + 0.03, **figures, "step": step} | more


def make_run(folder: Path, config: str, *overrides: str, oiou: float = 0.7, splits: dict = FULL, prompts=("text",),
             step: int = 26000) -> str:  # fmt: skip
    """A run's folder as train and eval leave it."""
    resolved = load_config(f"configs/paper/{config}.yaml", ["--run_dir", str(folder), *overrides])
    resolved.save(folder / "config.yaml")
    for prompt in prompts:
        for split, n in splits.items():
            add(folder, evaluation(split, n, oiou, step, prompt=prompt))
    return str(folder)


def add(folder: Path, entry: dict) -> None:
    (folder / "evaluations").mkdir(exist_ok=True)
    name = f"{entry['split']}-{entry['prompt']}-step_{entry['step']:08d}.json"
    (folder / "evaluations" / name).write_text(json.dumps(entry))


def table_of(runs: list[str], number: int | None = None) -> dict:
    return compare(runs, number)["tables"][0]


def at(table: dict, row: dict, split: str, metric: str, what: str = "values", dataset: str = "refcoco"):
    column = {"dataset": dataset, "split": split, "metric": metric}
    return row[what][table["columns"].index(column)]


def mine(table: dict) -> list[dict]:
    return [r for r in table["rows"] if r["kind"] != "paper"]


def test_a_run_stands_behind_the_row_of_its_settings(tmp_path):
    run = make_run(tmp_path / "a", "table1_layer_wise", oiou=0.7251)
    table = table_of([run], 1)
    labels = [r["label"][0] for r in table["rows"]]
    assert labels[labels.index(f"> {run}") - 1] == "Layer-wise DIT" and len(labels) == 11
    (row,) = mine(table)
    assert at(table, row, "val", "oiou") == 72.51 and at(table, row, "val", "oiou", "deltas") == 0.53  # 71.98
    assert at(table, row, "testA", "oiou", "deltas") == -2.0  # 74.51
    assert at(table, row, "val", "oiou", "marks") == "best"
    paper = table["rows"][labels.index("Layer-wise DIT")]
    assert at(table, paper, "val", "oiou", "marks") == "second" and at(table, paper, "testA", "oiou", "marks") == "best"
    assert at(table, table["rows"][0], "val", "oiou", "marks") is None and row["notes"] == []


def test_without_a_number_all_tables_with_its_settings(tmp_path):
    tuned = make_run(tmp_path / "a", "table1_layer_wise")
    frozen = make_run(tmp_path / "b", "table1_layer_wise_frozen")
    assert [t["table"] for t in compare([tuned])["tables"]] == [1, 2, 3, 4, 6, 7]
    assert [t["table"] for t in compare([frozen])["tables"]] == [1, 3, 5, 9]
    clip = make_run(tmp_path / "c", "table5_clip")
    assert [t["table"] for t in compare([clip])["tables"]] == [5]


def test_what_no_table_has_is_in_one_of_its_own_or_at_the_end(tmp_path):
    run = make_run(tmp_path / "a", "table1_layer_wise", "--model.size", "vit_l")
    (table,) = compare([run])["tables"]
    assert table["table"] is None and [r["kind"] for r in table["rows"]] == ["run"]
    assert "nearest is Table 1's Layer-wise DIT with size vit_b for vit_l" in table["notes"][0]
    table = table_of([run], 3)
    assert table["rows"][-1]["runs"] == [run] and at(table, table["rows"][-1], "val", "oiou", "deltas") is None


def test_settings_count_and_other_differences_are_footnotes(tmp_path):
    run = make_run(
        tmp_path / "a", "table1_layer_wise", "--train.ema_decay", "0.9997", "--seed", "4", "--data.root", "else"
    )
    table = table_of([run], 1)
    assert table["notes"] == [f"{run} differs from configs/paper/table1_layer_wise.yaml in train.ema_decay"]
    assert mine(table)[0]["notes"] == [1]
    tokens = make_run(tmp_path / "b", "table2_layer_wise_static", "--model.static_tokens", "10")
    table = table_of([tokens], 2)  # the paper doesn't say how many
    assert table["rows"][-1]["runs"] == [tokens] and at(table, table["rows"][-1], "val", "oiou", "deltas") == 2.69
    assert "model.static_tokens" in table["notes"][0]


def test_what_is_no_evaluation_or_not_evaluated_yet_does_not_end_the_others(tmp_path, caplog):
    """Lines of metrics.jsonl that say nothing are passed over; a run without figures is left out with a warning."""
    run = make_run(tmp_path / "a", "table1_layer_wise", splits={"val": 10834})
    (tmp_path / "a/metrics.jsonl").write_text(
        '{"kind": "eval", "split": "val"}\n{"kind": "eval", "split": "testA", "n": NaN}\n'
    )
    bare = make_run(tmp_path / "b", "table1_default", splits={})
    (row,) = mine(table_of([run, bare], 1))
    assert "left out" in caplog.text and bare in caplog.text
    for wrong in ({"prompt": 3}, {"threshold": "high"}, {"miou": float("inf")}):
        path = next((tmp_path / "a/evaluations").iterdir())
        path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
        with pytest.raises(UserError, match="is no evaluation"):
            table_of([run], 1)


def test_other_data_is_neither_ranked_nor_subtracted(tmp_path):
    run = make_run(tmp_path / "a", "table1_layer_wise", oiou=0.95, splits={"val": 200})
    table = table_of([run], 1)
    (row,) = mine(table)
    assert at(table, row, "val", "oiou") == 95.0 and not row["comparable"]
    assert at(table, row, "val", "oiou", "deltas") is None and at(table, row, "val", "oiou", "marks") is None
    assert "val has 200 expressions instead of 10,834" in table["notes"][0]


def test_seeds_have_a_row_each_and_a_mean(tmp_path):
    runs = [make_run(tmp_path / s, "table1_layer_wise", "--seed", s, oiou=o) for s, o in (("1", 0.71), ("2", 0.73))]
    table = table_of(runs, 4)
    first, second, mean = mine(table)
    assert (first["kind"], second["kind"], mean["kind"]) == ("run", "run", "mean") and mean["runs"] == runs
    assert at(table, mean, "val", "oiou") == 72.0 and at(table, mean, "val", "oiou", "spread") == 1.41
    assert at(table, mean, "val", "oiou", "deltas") == 0.02 and at(table, mean, "val", "oiou", "marks") is None
    other = make_run(tmp_path / "ema", "table1_layer_wise", "--train.ema_decay", "0.99")
    assert [r["kind"] for r in mine(table_of([runs[0], other], 4))] == ["run", "run"]


def test_runs_on_several_datasets_share_table_7s_row(tmp_path):
    plus = {k: EXPRESSIONS["refcoco+"][k] for k in ("val", "testA", "testB")}
    g = {k: EXPRESSIONS["refcocog"][k] for k in ("val", "test")}
    runs = [
        make_run(tmp_path / "a", "table7_vit_h_refcoco", oiou=0.77),
        make_run(tmp_path / "b", "table7_vit_h_refcocoplus", oiou=0.69, splits=plus),
        make_run(tmp_path / "c", "table7_vit_h_refcocog", oiou=0.68, splits=g),
    ]
    table = table_of(runs, 7)
    (row,) = mine(table)
    assert row["steps"][2] == {"val": 26000, "test": 26000}
    assert row["runs"] == runs and None not in row["values"] and table["notes"] == []
    assert at(table, row, "test", "oiou", "deltas", "refcocog") == 0.08  # 67.92
    assert at(table, row, "val", "oiou", "marks", "refcoco+") == "second"  # 69.33 is PolyFormer's


def test_prompts_have_their_rows_in_table_6(tmp_path):
    mix = make_run(tmp_path / "mix", "table6_mix", prompts=("text", "point", "box"))
    sam = make_run(tmp_path / "sam", "table6_sam", prompts=("point", "box"), step=0)
    (table,) = compare([mix, sam])["tables"]
    names = [r["label"] for r in table["rows"]]
    before = {tuple(row): names[i - 1][1:] for i, row in enumerate(names) if row[0].startswith(">")}
    assert before == {
        (f"> {sam} (point)", "", ""): ["not tuned", "Point"],
        (f"> {sam} (box)", "", ""): ["not tuned", "Box"],
        (f"> {mix} (point)", "", ""): ["Mix", "Point"],
        (f"> {mix} (box)", "", ""): ["Mix", "Box"],
        (f"> {mix}", "", ""): ["Mix", "Text"],
    }


def test_the_newest_evaluation_counts_and_training_stands_in_for_val(tmp_path):
    run = Path(make_run(tmp_path / "a", "table1_layer_wise", oiou=0.5, step=10, splits={"testA": 5657}))
    add(run, evaluation("testA", 5657, 0.6, 20))
    add(run, evaluation("testA", 5657, 0.9, 30, shuffle_text=True))
    in_training = [
        {"kind": "eval", "epoch": 1} | evaluation("val", 10834, o, s) for s, o in ((10, 0.55), (20, 0.65), (30, 0.7))
    ]
    for line in in_training:
        line.pop("prompt")
    text = "\n".join(json.dumps(x) for x in [{"kind": "train", "step": 1}, *in_training]) + '\n{"kind": "ev'
    (tmp_path / "a/metrics.jsonl").write_text(text)
    table = table_of([str(run)], 1)
    (row,) = mine(table)
    assert at(table, row, "testA", "oiou") == 60.0
    assert at(table, row, "val", "oiou") == 65.0 and table["notes"] == []  # of the step that testA is of
    add(run, evaluation("val", 10834, 0.66, 40))
    table = table_of([str(run)], 1)
    assert at(table, mine(table)[0], "val", "oiou") == 66.0
    assert "evaluated at different steps: val of step 40, testA of step 20" in table["notes"][0]


def test_another_threshold_is_said(tmp_path):
    run = Path(make_run(tmp_path / "a", "table1_layer_wise", splits={}))
    add(run, evaluation("val", 10834, 0.6, threshold=0.5))
    assert "val at threshold 0.5, not the run's 0.35" in table_of([str(run)], 1)["notes"][0]


def test_formats(tmp_path, capsys):
    run = make_run(tmp_path / "a_b", "table1_layer_wise", oiou=0.7251)

    def say(*arguments: str) -> str:
        assert main(["compare", run, "--table", "2", *arguments]) == 0
        return capsys.readouterr().out

    text = say()
    assert "72.51* (+0.53)" in text and "71.98°" in text and text.startswith("Table 2: ")
    markdown = say("--format", "markdown")
    assert "| **72.51** (+0.53) |" in markdown and "| <u>71.98</u> |" in markdown and "a\\_b" in markdown
    rows = [line.count(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    assert rows == [13] * 6  # the head, the paper's four rows and ours, of 14 columns each
    found = list(csv.DictReader(io.StringIO(say("--format", "csv"))))
    (line,) = [x for x in found if x["runs"] == run and x["split"] == "val" and x["metric"] == "oiou"]
    assert (line["value"], line["delta"], line["mark"], line["table"]) == ("72.51", "0.53", "best", "2")
    assert json.loads(say("--json")) == json.loads(say("--format", "json")) == compare([run], 2)
    out = tmp_path / "tables.md"
    assert json.loads(say("--out", str(out), "--json")) == {"written": str(out)}
    assert out.read_text() == markdown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/run"], "no/such/run is no run: it has no config.yaml"),
        (["RUN"], "has no evaluation yet: run dit-ds eval"),
        (["RUN", "--table", "12"], "the paper has no table 12"),
        (["RUN", "--table", "8"], "see dit-ds memory table8"),
        (["RUN", "--configs", "nowhere"], "name their folder with --configs, or leave it out"),
        (["DAMAGED"], "damaged/evaluations/val-text-step_00000001.json is not valid JSON"),
        (["OTHER"], "is no evaluation: remove it, or run dit-ds eval again"),
        (["OLD"], "old/config.yaml: unknown key 'train.epoch': did you mean 'train.epochs'"),
        (["DONE", "--out", "FOLDER"], "is a folder: name a file"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, arguments, says):
    make_run(tmp_path / "run", "table1_layer_wise", splits={})
    make_run(tmp_path / "done", "table1_layer_wise")
    for name, content in (("damaged", '{"split": '), ("other", "[1]")):
        make_run(tmp_path / name, "table1_layer_wise", splits={})
        (tmp_path / name / "evaluations").mkdir()
        (tmp_path / name / "evaluations/val-text-step_00000001.json").write_text(content)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("train: {epoch: 1}\n")
    folders = {x.upper(): str(tmp_path / x) for x in ("run", "done", "damaged", "other", "old")} | {
        "FOLDER": str(tmp_path)
    }
    assert main(["compare", *(folders.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_table_of_runs_by_the_keys_in_which_they_differ(tmp_path, capsys):
    """Also of data that no table of the paper is about, and of runs that failed."""
    small = {"val": 48}
    runs = [
        make_run(tmp_path / "a", "table1_default", oiou=0.5, splits=small),
        make_run(tmp_path / "b", "table1_default", "--train.lr", "3e-4", "--data.root", "x", oiou=0.6, splits=small),
        make_run(tmp_path / "c", "table1_default", "--data.scales", "[48, 64]", splits={}),
        str(tmp_path / "gone"),
    ]
    assert main(["compare", *runs[:2], "--keys", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["labels"] == ["Run", "train.lr"] and table["notes"] == []
    assert [r["label"][1] for r in table["rows"]] == ["0.0001", "0.0003"]
    assert [at(table, r, "val", "oiou", "marks") for r in table["rows"]] == ["second", "best"]
    assert main(["compare", *runs, "--keys"]) == 2
    assert "gone is no run" in capsys.readouterr().err
    assert main(["compare", *runs, "--keys", "--skip-missing", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert [r["label"][1:] for r in table["rows"]] == [
        ["[]", "0.0001"],
        ["[]", "0.0003"],
        ["[48, 64]", "0.0001"],
        ["-", "-"],
    ]
    assert len(table["notes"]) == 2 and [r["notes"] for r in table["rows"]] == [[], [], [1], [2]]
    add(tmp_path / "c", evaluation("val", 24, 0.9))
    assert not any(any(r["marks"]) for r in by_keys(runs[:3])["tables"][0]["rows"])  # not the same expressions


def test_a_table_tells_which_runs_are_missing(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", "table1_default"), str(tmp_path / "gone")]
    assert main(["compare", *runs, "--table", "1", "--skip-missing", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert len(mine(table)) == 1 and "gone is no run" in table["notes"][-1]


def test_a_run_of_ours_is_read(config_file, tmp_path):
    """As `dit-ds train` leaves it: one evaluation, in metrics.jsonl."""
    dit_ds("train", "--config", config_file, "--train.max_steps", "1")
    run = tmp_path / "run"
    (line,) = metrics_of(run, "eval")
    (table,) = compare([str(run)])["tables"]
    (row,) = table["rows"]
    assert at(table, row, "val", "miou") == round(100 * line["miou"], 2) and not row["comparable"]
    assert f"val has {line['n']} expressions instead of 10,834" in table["notes"][0]
