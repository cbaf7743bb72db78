"""Plans and Table 8: the largest micro-batch is the largest, what can't fit is answered, the paper's rows come out."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import MINILM, ROOT

from dit_ds.cli.entry import main
from dit_ds.config.load import merge, validate
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.errors import UserError
from dit_ds.files import GIB
from dit_ds.paper import table8, table8_report
from dit_ds.planning.gpus import parse_memory
from dit_ds.planning.memory import plan, worker
from dit_ds.planning.memory.allocations import ALLOCATE, Request
from dit_ds.planning.memory.allocator_settings import AllocatorSettings
from dit_ds.planning.memory.estimate import predict
from dit_ds.planning.memory.request import MemoryRequest


def tiny(**train):
    return validate(
        {
            "data": {"image_size": 64},
            "model": {"size": "vit_t"},
            "text": {"name": MINILM, "layers": 1, "random_init": True},
            "train": {"batch_size": 8} | train,
            "deepspeed": {
                "config": str(ROOT / "configs/deepspeed/zero2.json"),
                "override": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"reduce_bucket_size": 1000000}},
            },
        }
    )


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("80", 80 * GIB), ("24 gb", 24e9), ("500MiB", 5e2 * 2**20)]
)
def test_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "80 apples", "-3GiB", "0", "1e3"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(UserError, match="no amount of memory"):
        parse_memory(text)


def test_room_is_what_is_needed_the_other_way_round():
    for ranks in (1, 8):
        assert plan.needed(plan.allowed(80 * GIB, ranks), ranks) == pytest.approx(80 * GIB)
    assert plan.allowed(0.5 * GIB, 1) == 0  # the context alone is larger


def search(peak, capacity, share):
    """`_largest`, and how many steps it took; a micro-batch below the share comes with waiting gradients.

    A step is one block of the peak's size in pages of 2 MiB.
    """
    taken, page = {}, 2 * 2**20

    def profile(b, micro_batches):
        assert micro_batches == (2 if b < share else 1)
        taken[b] = None
        return SimpleNamespace(peak=peak(b) * page)

    steps = SimpleNamespace(profile=profile, requests=lambda b: ([Request(ALLOCATE, 0, peak(b) * page)], {}))
    return worker._largest(steps, AllocatorSettings(), capacity * page, share), len(taken)


@pytest.mark.fast
@pytest.mark.parametrize("share", [1, 2, 4, 300])
@pytest.mark.parametrize("most", [1, 2, 3, 57, 299, 300, 1000])
def test_the_search_ends_at_the_largest(share, most):
    """Over two lines, the second steeper, as where the backward pass overtakes the step; gradients wait below the share."""

    def peak(b):
        return max(1000 + 3 * b, 10 * b + 800) + (7 if b < share else 0)

    room = max(peak(b) for b in range(1, most + 1))
    want = max(b for b in range(1, 1100) if peak(b) <= room)
    assert search(peak, room, share) == (want, pytest.approx(8, abs=7))
    assert search(peak, 900, share)[0] == 0


def test_the_search_ends_where_the_peak_does_not_grow():
    """The optimizer's step may be the peak whatever the micro-batch; at some number of samples nobody asks on."""
    assert search(lambda b: 1000, 1000, 8) == (4096, pytest.approx(6, abs=2))
    assert search(lambda b: max(1000, 10 * b), 3000, 8)[0] == 300


@pytest.mark.slow
def test_a_plan_adds_up_and_its_largest_micro_batch_fits():
    room = 500 * 2**20
    run = tiny(batch_size=2048)  # so that a step has two passes on either side of the bound
    result = plan.plan(run, 2, 1, plan.needed(room, 2))
    assert result["fits"] and result["predicted"]
    assert sum(result["categories"].values()) == pytest.approx(result["peak_gib"], abs=0.005)
    assert result["peak_gib"] == max(result["phases"].values())
    assert result["dominated_by"] == "optimizer" and "zero2_offload" in " ".join(result["advice"])
    largest = result["largest_micro_batch"]
    (answer,) = predict([MemoryRequest(run, 2, micro_batches=(largest, largest + 1), share=0.0)])
    least = [answer.figures[b].least_capacity for b in (largest, largest + 1)]
    # what is profiled first in a process is simulated for one step, the others for three: gaps differ, here by 2%
    assert least[0] <= 1.02 * room and least[1] > 0.98 * room
    figures = [result[f"{k}_gib"] for k in ("allocated", "least_capacity", "reserved")]
    assert figures == sorted(figures) and figures[0] >= result["peak_gib"]
    assert plan.lines(result)[0].startswith("predicted, not measured")
    assert (result["gpu"], result["torch"], result["fails"]) == ("H100", torch.__version__, None)


@pytest.mark.slow
def test_the_allocation_that_fails_is_named_as_pytorch_words_it():
    """The last of 4 ranks, on a T4 whose memory is too small; with the default allocator settings it needs more."""
    results = [
        plan.plan(tiny(), 4, 1, 1.25 * GIB, gpu="T4", settings=s, rank=3) for s in ("", "expandable_segments:True")
    ]
    for result in results:
        assert not result["fits"] and result["rank"] == 3
        message = result["fails"]["message"]
        assert message.startswith("CUDA out of memory. Tried to allocate ") and "total capacity of 1.25 GiB" in message
        assert result["fails"]["site"].split(",")[0] in ("load", "forward", "backward", "step")
        assert any(f"fails     {result['fails']['site']}: {message}" == line for line in plan.lines(result))
    assert results[0]["reserved_gib"] > results[1]["reserved_gib"]
    assert results[0]["reserved_by_settings"]["expandable_segments:True"] == results[1]["reserved_gib"]


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_what_would():
    """350 MiB have no room for all the states, but for half of them; one has none for anything."""
    config = tiny(batch_size=64)
    config.deepspeed.config = str(ROOT / "configs/deepspeed/zero0.json")
    asked = MemoryRequest(config, 2, capacity=350 * 2**20)
    found = plan.closest(asked)
    assert found["fits"] and "zero2.json" in found["changes"][-1], found
    assert found["needed_gib"] * GIB <= plan.needed(350 * 2**20, 2) + 1e-3 * GIB
    assert 32 % found["micro_batch"] == 0
    most = validate(merge(config.model_dump(), {
        "train": {"activation_checkpointing": "block"},
        "deepspeed": {"override": {"zero_optimization": SETTINGS["zero3_offload"]}},
    }))  # fmt: skip
    nothing = plan.closest(replace(asked, config=most, capacity=2**20))  # it is frugal already
    assert (nothing["fits"], nothing["changes"], nothing["micro_batch"]) == (False, [], 1)


def line(capsys, *arguments):
    assert main(["memory", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_requests_that_make_no_sense_are_refused_in_one_line(capsys, tmp_path, monkeypatch):
    config = ["plan", "--config", str(ROOT / "configs/base.yaml")]
    monkeypatch.chdir(ROOT)
    assert "choose one of V100" in line(capsys, *config, "--gpu", "Z9000")
    assert "no amount of memory" in line(capsys, *config, "--gpu-memory", "lots")
    assert "argument --gpus: '0' is not a whole number from 1" in line(capsys, *config, "--gpus", "0")
    assert "use 1, 2, 4, 8, 16, 32, 64 ranks" in line(capsys, *config, "--gpus", "6")
    assert "which the run owns" in line(capsys, *config, "--deepspeed.override.gradient_clipping", "1")
    assert "enables bf16 and fp16" in line(capsys, *config, "--deepspeed.override.fp16.enabled", "true")
    assert "stage is 4" in line(capsys, *config, "--deepspeed.override.zero_optimization.stage", "4")
    for part in ("optimizer", "param"):
        device = f"zero_optimization.offload_{part}.device"
        assert f"{device} is nvme" in line(capsys, *config, f"--deepspeed.override.{device}", "nvme")
    assert "did you mean expandable_segments" in line(capsys, *config, "--alloc-conf", "expandable_segment:True")
    assert "no rank 8 of 8" in line(capsys, *config, "--gpus", "8", "--rank", "8")
    assert "no picture is called .docx" in line(capsys, *config, "--timeline", "step.docx")
    assert "name their folder with --configs" in line(capsys, "table8", "--configs", str(tmp_path))


@pytest.fixture(scope="module")
def ldit():
    """L-DIT's rows under the readings that the paper's figures and our targets are about."""
    wanted = {("released", "inferred"), ("ours", "literal")}

    def rows(which, folder):
        return [r for r in everything(which, folder) if r.method == "L-DIT" and (r.form, r.reading) in wanted]

    everything, table8.rows = table8.rows, rows
    try:
        return table8.table8("paper", ROOT / "configs/paper")
    finally:
        table8.rows = everything


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_papers_figures_come_out_of_its_released_form(ldit, monkeypatch):
    """Within a tenth, at 8 samples on each of 4 GPUs; and ours takes less for 32 on one: 2.5, 3.8 and 4.8 GiB."""
    released = [r for r in ldit["rows"] if r["form"] == "released"]
    assert [r["paper_gb"] for r in released] == [11.9, 12.4, 17.1]
    for r in released:
        assert r["predicted_gib"] == pytest.approx(r["paper_gb"], rel=0.1)
        assert (r["batch_per_gpu"], r["gpus"], r["precision"], r["counts"]) == (8, 4, "fp32", "device")
    ours = [r for r in ldit["rows"] if r["form"] == "ours"]
    for r, most, reserved in zip(ours, (2.5, 3.8, 4.8), (2.8, 4.2, 5.3), strict=True):
        assert 0.3 < r["predicted_gib"] == r["allocated_gib"] <= most
        assert (
            r["allocated_gib"]
            <= r["least_capacity_gib"]
            <= r["reserved_gib"]
            <= min(reserved, 1.1 * r["allocated_gib"])
        )
        assert (r["batch_per_gpu"], r["gpus"], r["precision"], r["counts"]) == (32, 1, "bf16", "allocated")


@pytest.fixture(scope="module")
def small_table():
    """Table 8 of L-DIT's two forms with a tiny model in the paper's place."""
    small = {"data": {"image_size": 64}, "model": {"size": "vit_t"}, "text": {"name": MINILM, "layers": 1}}

    def rows(which, folder):
        two = [r for r in everything(which, folder) if r.method == "L-DIT" and r.reading == "literal"][:2]
        return [replace(r, config=validate(merge(r.config.model_dump(), small))) for r in two]

    everything, table8.rows = table8.rows, rows
    try:
        return table8.table8("paper", ROOT / "configs/paper")
    finally:
        table8.rows = everything


def test_the_table_is_written_for_readers_and_for_programs(small_table, tmp_path):
    table8_report.write(small_table, tmp_path)
    assert json.loads((tmp_path / "table8.json").read_text()) == small_table
    with open(tmp_path / "table8.csv") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["predicted_gib"]) for r in rows] == [r["predicted_gib"] for r in small_table["rows"]]
    text = (tmp_path / "table8.md").read_text()
    assert text.count("| L-DIT |") == len(rows) == 2 and "nothing here was measured" in text
    assert len(table8_report.lines(small_table)) == 2


def test_every_row_is_a_run_that_can_be():
    """All of them: configurations that resolve, with batches that divide."""
    from dit_ds.engine.deepspeed_json import deepspeed_config

    rows = table8.rows("all", ROOT / "configs/paper")
    assert {r.method for r in rows} == {"L-DIT", "E-DIT", "LAVT", "ReLA"} and len(rows) > 50
    for r in rows:
        config = r.config.model_copy(deep=True)
        ds = deepspeed_config(config, r.gpus)
        assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (r.batch_per_gpu, 1)
