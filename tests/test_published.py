"""The paper's figures as data: nothing lost in transcription, rows that repeat agree, and what the paper gets wrong."""

from __future__ import annotations

from collections import defaultdict

import pytest
from conftest import ROOT

from dit_ds.config.load import load_config
from dit_ds.paper.compare import Line, mark
from dit_ds.paper.tables import EXPRESSIONS, MISPRINTS, TABLE_8, TABLES, Column, Row

# of all figures of a table, added up from the paper's text: a digit that slips is seen here
SUMS = {1: 8841.81, 2: 3552.27, 3: 5524.75, 4: 2905.80, 5: 822.50, 6: 2431.32, 7: 10106.13, 8: 77.4, 9: 821.28}
FIGURES = {1: 150, 2: 48, 3: 90, 4: 45, 5: 12, 6: 28, 7: 158, 8: 5, 9: 12}


def row(number: int, name: str) -> Row:
    (found,) = [r for r in TABLES[number].rows if r.name == name]
    return found


def figure(number: int, name: str, split: str = "val", metric: str = "oiou", dataset: str = "refcoco") -> float:
    return row(number, name).values[Column(dataset, split, metric)]


def test_every_figure_is_there():
    found = {n: [v for r in t.rows for v in r.values.values()] for n, t in TABLES.items()}
    assert {n: len(v) for n, v in found.items()} == FIGURES
    assert {n: round(sum(v), 2) for n, v in found.items()} == SUMS


def test_figures_are_of_their_metrics():
    for t in TABLES.values():
        for r in t.rows:
            for c, v in r.values.items():
                assert not c.is_score or 0 < v < 100
                if c.metric == "p@0.5":  # a mask that is better than 0.7 is better than 0.5
                    precisions = [r.values.get(c._replace(metric=f"p@0.{k}"), 0) for k in (5, 7, 9)]
                    assert precisions == sorted(precisions, reverse=True)
                    assert v > r.values[c._replace(metric="oiou")]


def test_rows_of_the_same_run_agree():
    """Table 1's L-DIT is also in Tables 2, 3, 4, 6 and 7, and so on: the same configuration, the same figures."""
    by_run = defaultdict(list)
    for number, t in TABLES.items():
        for r in t.rows:
            for dataset, config in r.configs.items():
                run = load_config(ROOT / f"configs/paper/{config}.yaml").run_dir
                values = {c: v for c, v in r.values.items() if c.dataset == dataset and c.is_score}
                by_run[run, r.prompt].append((number, values))
    tables = {run: [n for n, _ in found] for (run, _), found in by_run.items()}
    assert tables["runs/table1_layer_wise"] == [1, 2, 3, 4, 6, 7]
    assert tables["runs/table1_layer_wise_frozen"] == [1, 3, 5, 9]
    assert tables["runs/table1_end_to_end"] == [1, 2, 3]
    assert tables["runs/table1_default"] == [1, 6]
    for found in by_run.values():
        of_first = found[0][1]
        for _, values in found[1:]:
            shared = of_first.keys() & values.keys()
            assert not values or not of_first or {c: values[c] for c in shared} == {c: of_first[c] for c in shared}


@pytest.mark.parametrize(
    ("number", "name", "second"),
    [
        (1, "End-to-end DIT", "val p@0.5, val oiou, testA p@0.5, testA oiou, testA miou, testB p@0.7, testB p@0.9, testB oiou"),
        (2, "End-to-end, dynamic", "testB p@0.7"),
        (2, "End-to-end, dynamic+static", "val oiou, testA p@0.5, testB oiou"),
    ],
)  # fmt: skip
def test_marks_are_the_papers(number, name, second):
    """What the paper underlines."""
    marks = marked(number)
    for column in second.split(", "):
        split, metric = column.split()
        assert marks[name][Column("refcoco", split, metric)] == "second"


def marked(number: int) -> dict[str, dict[Column, str]]:
    t = TABLES[number]
    lines = [Line("paper", [r.name], r.values) for r in t.rows]
    mark(lines, t.columns)
    return {line.label[0]: line.marks for line in lines}


def test_table_7s_second_best_is_l_dit_h_on_refcoco_plus():
    marks = marked(7)
    c = Column("refcoco+", "val", "oiou")
    assert marks["Layer-wise DIT_H, ViT-H, BERT, none"][c] == "second"
    assert marks["PolyFormer (CVPR23), Swin-L, BERT, 5.70M"][c] == "best"


def test_table_8_is_as_its_users_know_it():
    assert [(r.method, r.visual_frozen, r.text_frozen, r.batch, r.gpu_gb) for r in TABLE_8] == [
        ("L-DIT", True, True, 32, 11.9),
        ("L-DIT", True, False, 32, 12.4),
        ("L-DIT", False, False, 32, 17.1),
        ("LAVT", False, False, 8, 24.0),
        ("ReLA", False, False, 32, 12.0),
    ]


def test_misprints_are_there():
    """Each claim that `MISPRINTS` doubts, recomputed from the tables."""
    text = " ".join(m.but for m in MISPRINTS)
    assert sum(EXPRESSIONS["refcoco"].values()) == 142210 and "5,095" in text
    assert sum(EXPRESSIONS["refcoco+"].values()) == 141564
    assert sum(EXPRESSIONS["refcocog"].values()) == 95010 and "95,010" in text

    def gain(number: int, better: str, worse: str, metric: str = "oiou") -> str:
        return f"{figure(number, better, metric=metric) - figure(number, worse, metric=metric):+.2f}"

    # "+11.8% on RefCOCO val" is said of E-DIT and is L-DIT's
    said = next(m.but for m in MISPRINTS if m.where == "section 1")
    for better, metric in (("End-to-end DIT*", "oiou"), ("End-to-end DIT*", "miou"), ("Layer-wise DIT*", "oiou")):
        assert gain(1, better, "Default*", metric) in said
    # "+4.88% oIoU on val" is no difference between two rows
    said = next(m.but for m in MISPRINTS if m.where == "section 4.3.4")
    for better, worse in (
        ("tuned, tuned, Layer-wise", "frozen, tuned, Layer-wise"),
        ("tuned, tuned, Layer-wise", "frozen, frozen, Layer-wise"),
        ("tuned, tuned, End-to-end", "frozen, tuned, End-to-end"),
    ):
        assert gain(3, better, worse) in said and gain(3, better, worse) != "+4.88"
    # 1.94, 1.56 and 2.91 above the best that were trained from scratch
    said = next(m.but for m in MISPRINTS if m.where == "section 4.3.7")
    others = [r for r in TABLES[7].rows if r.label[3] == "none" and not r.name.startswith("Layer-wise")]
    ours = row(7, "Layer-wise DIT_H, ViT-H, BERT, none")
    for split, claimed in (("val", 1.94), ("testA", 1.56), ("testB", 2.91)):
        c = Column("refcoco", split, "oiou")
        distances = sorted(round(ours.values[c] - r.values[c], 2) for r in others if c in r.values)
        assert f"{distances[0]:.2f}" in said
        assert (claimed in distances) == (split == "val")
    twice = figure(6, "Default SAM, not tuned, Point", "testB"), figure(6, "Default SAM, not tuned, Box", "testA")
    assert twice == (75.38, 75.38)
    # points against CARIS and PolyFormer
    point = row(6, "Default SAM, not tuned, Point").values
    for name, splits in {"CARIS (MM23), Swin-B, BERT, none": ("val", "testA", "testB"),
                         "PolyFormer (CVPR23), Swin-L, BERT, 5.70M": ("testB",)}.items():  # fmt: skip
        for split in ("val", "testA", "testB"):
            c = Column("refcoco", split, "oiou")
            assert (point[c] > row(7, name).values[c]) == (split in splits)


def test_claims_that_hold():
    """What the abstract and the introduction say and the tables show."""
    up = figure(1, "Layer-wise DIT", "testA") - figure(1, "Default", "testA")
    assert round(up, 1) == 11.6  # "up to 11.6% improvement on RefCOCO testA"
    assert round(figure(1, "Default*", metric="miou"), 1) == 58.0  # "58.0% mIoU when fine-tuned on RefCOCO"
    assert figure(3, "frozen, frozen, Layer-wise") == 67.16 > figure(1, "Default")


def test_every_row_says_where_it_stands():
    lines = [row.line for number in sorted(TABLES) for row in TABLES[number].rows]
    assert lines == sorted(set(lines))  # one after the other, as printed
