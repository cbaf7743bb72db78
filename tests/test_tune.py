"""`dit-ds tune`: what is pruned, ranked and chosen; files that `train` takes; trials that go on; refusals in a line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, metrics_of

from dit_ds.cli.entry import main
from dit_ds.config.load import load_config
from dit_ds.engine.deepspeed_json import DeepSpeedJson, deepspeed_config, read_deepspeed_json
from dit_ds.engine.zero_presets import SETTINGS
from dit_ds.errors import RunFailed
from dit_ds.files import GIB
from dit_ds.planning import flops
from dit_ds.planning.communication import ModuleTrace
from dit_ds.planning.gpus import BANDWIDTH, MEMORY_GIB, PEAKS, memory_gib
from dit_ds.planning.memory.plan import needed
from dit_ds.planning.scaling import Machine
from dit_ds.planning.tune import candidates as space
from dit_ds.planning.tune import command, output, report, search, trials
from dit_ds.planning.tune import time_model as speed
from dit_ds.planning.tune.memory_model import Footprint, MemoryModel, ProfileSummary

BASE = ROOT / "configs/base.yaml"


def test_settings_are_the_shipped_files():
    for name, zero in SETTINGS.items():
        shipped = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
        assert shipped["zero_optimization"] == zero, name
    assert MEMORY_GIB.keys() == BANDWIDTH.keys() == PEAKS.keys()
    assert memory_gib("NVIDIA A100-SXM4-40GB") < 40 < memory_gib("NVIDIA A100-SXM4-80GB") < 80
    assert memory_gib("NVIDIA H100 80GB HBM3") == MEMORY_GIB["H100"]


def test_candidates_divide_the_batch_and_leave_out_what_a_gpu_lacks():
    config = load_config(BASE)
    ds = read_deepspeed_json(config)
    among = space.candidates(config, ds, 8, "H100")
    assert len(among) >= 100 and len({c.name for c in among}) == len(among)
    assert all(c.micro_batch * c.accumulation * 8 == 64 for c in among)
    assert space.configured_candidate(config, ds, among).name == "zero2-mb8-none"
    assert "sdpa_flash" not in {c.kernel for c in space.candidates(config, ds, 8, "V100")}
    assert {c.bucket for c in space.candidates(config, ds, 1)} == {0, space.BUCKETS[0]}
    config = load_config(BASE, ["--deepspeed.override.data_types.grad_accum_dtype", "fp32"])
    settings = {c.setting for c in space.candidates(config, read_deepspeed_json(config), 8)}
    assert settings == SETTINGS.keys() - {"zero0"}  # which the engine refuses


# --- memory and time by hand


def profiled(forward: float, backward: float, step: float, states: float, host: float = 0) -> ProfileSummary:
    phases = {"forward": forward, "backward": backward, "step": step}
    return ProfileSummary(
        phases, max(phases.values()), capacity=1.0, reserved=1.1, activations=forward - states, states=states, host=host,
        gradients=0,
    )  # fmt: skip


def memory_model(ranks: int = 8) -> MemoryModel:
    """10 GB of states at stage 2; 1 GB (none) or 0.2 GB (block) of activations a sample; 2 GB of parameters trained."""
    g = 1e9
    reference = {}
    for policy, each in {"none": 1, "block": 0.2}.items():
        for m in (1, 8):
            reference[policy, "auto", m] = profiled(*(g * x for x in (10 + each * m, 11 + each * m, 12, 10)))
        reference[policy, "eager", 8] = profiled(*(g * x for x in (10 + (each + 2) * 8, 11 + (each + 2) * 8, 12, 10)))
    points = {
        "zero0": {m: (30 + 0.2 * m, 30 + 8, 40, 30) for m in (1, 8)},
        "zero3": {m: (4 + 0.2 * m, 6 + 0.2 * m, 7, 4) for m in (1, 8)},
        "zero2_offload": {m: (5 + 0.2 * m, 6 + 0.2 * m, 6, 5, 9) for m in (1, 8)},
    }
    points = {s: {m: profiled(*(g * x for x in values)) for m, values in at.items()} for s, at in points.items()}
    return MemoryModel(reference, points, trained=10**9, element_bytes=2, ranks=ranks)


@pytest.mark.parametrize(
    ("candidate", "peak"),
    [
        (("zero2", 8, 1, "none", "auto"), 19),
        (("zero2", 4, 1, "none", "auto"), 15),  # along the line
        (("zero2", 4, 2, "none", "auto"), 15 + 2 / 8),  # a rank's part of the gradients waits
        (("zero1", 4, 2, "none", "auto"), 15 + 2),  # all of them wait
        (("zero2", 8, 1, "block", "auto"), 12.6),
        (("zero2", 4, 1, "none", "eager"), 15 + 8),
        (("zero2_offload", 8, 1, "none", "auto"), 14),
        (("zero3", 8, 1, "none", "auto"), 14),
        (("zero0", 8, 1, "block", "auto"), 40),  # the update
        (("zero0", 4, 2, "none", "auto"), 40),
    ],
)
def test_footprints_add_up(candidate, peak):
    setting, *rest = candidate
    bucket = space.BUCKETS[0] if setting != "zero0" else 0
    assert memory_model().predict(space.Candidate(setting, *rest, bucket)).peak == pytest.approx(peak * 1e9)


def test_larger_buckets_are_two_in_the_backward_pass_and_one_at_stage_3():
    more = (100_000_000 - space.BUCKETS[0]) * 2
    for setting, times in {"zero2": 2, "zero3": 1}.items():
        small, large = (
            memory_model().predict(space.Candidate(setting, 8, 1, "none", "auto", b)) for b in space.BUCKETS
        )
        assert large.peak - small.peak == pytest.approx(times * more)


def predictor(**assumed) -> speed.Predictor:
    config = load_config(BASE)
    passes = {
        p: flops.Passes(2 * 10**11, 4 * 10**11 + recomputed)
        for p, recomputed in {"none": 0, "block": 2 * 10**11}.items()
    }
    trace = ModuleTrace([10**8], [True], [])
    counts = speed.FlopCounts(6 * 10**11, passes, {"none": trace, "block": trace})
    ds = read_deepspeed_json(config)
    return speed.Predictor(config, ds, DeepSpeedJson(ds).dtype, counts, speed.Assumptions(Machine(), **assumed))


def test_what_costs_time():
    def parts(setting: str, micro_batch: int, policy: str, kernel: str = "auto") -> dict:
        c = space.Candidate(setting, micro_batch, 8 // micro_batch, policy, kernel, 25_000_000)
        return predictor().step(c, 8)["parts"]

    plain, recomputed = parts("zero2", 8, "none"), parts("zero2", 8, "block")
    assert plain["recompute"] == 0 < recomputed["recompute"] < plain["compute"] / 2
    assert parts("zero2", 1, "none")["small_micro_batch"] == pytest.approx(8 * plain["small_micro_batch"])
    assert parts("zero2", 8, "none", "eager")["attention_maps"] > 0 == plain["attention_maps"]
    offload = parts("zero2_offload", 8, "none")
    assert offload["update"] == pytest.approx(10**8 / 8 * 32 * 8 / 200e9)
    assert offload["offload"] == pytest.approx(2 * 10**8 / 8 * 2 / 25e9)
    assert plain["update"] == pytest.approx(10**8 / 8 * 36 / (3350e9 * 0.8))


# --- the choice


def footprint(peak, activations, states, host, exact=False):
    """One whose blocks leave no gaps."""
    return Footprint(peak, peak, 1.1 * peak, activations=activations, states=states, host=host, exact=exact)


def scored(name: str, gib: float, seconds: float, host: float = 0) -> search.ScoredCandidate:
    parts = dict.fromkeys(speed.PARTS, 0.0) | {"compute": seconds}
    c = space.Candidate(name, 8, 1, "none", "auto", 25_000_000)
    step = {"step_seconds": seconds, "samples_per_second": 64 / seconds, "parts": parts, "sent_bytes": 0}
    return search.ScoredCandidate(c, footprint(gib * GIB, gib * GIB / 2, gib * GIB / 4, host * GIB), step)


ASSUMED = speed.Assumptions(Machine())


def some_candidates() -> list[search.ScoredCandidate]:
    return [
        scored("zero0", 80, 1),
        scored("zero1", 40, 2),
        scored("zero2", 30, 2),
        scored("zero3", 20, 4),
        scored("zero2_offload", 35, 5),
    ]


def chosen(cluster: search.Cluster, exact=lambda some: None, among=None) -> search.SearchResult:
    def verify(some: list[search.ScoredCandidate]) -> None:
        exact(some)
        for r in some:
            r.footprint = footprint(r.footprint.peak, 0, 0, r.footprint.host, exact=True)

    return search.choose(among or some_candidates(), cluster, ASSUMED, verify)


def test_the_fastest_that_fits_is_chosen_and_of_equals_the_smallest():
    found = chosen(search.Cluster(1, 8, 60 * GIB))
    assert [r.candidate.setting for r in found.candidates] == ["zero2", "zero1", "zero3", "zero2_offload", "zero0"]
    assert [r.candidate.setting for r in found.front] == ["zero3", "zero2"]
    why = {r.candidate.setting: r.reason for r in found.candidates}
    assert why["zero2"] == "chosen" and why["zero1"].startswith("as fast, with 10.0 GiB more")
    assert why["zero0"].startswith(f"does not fit: needs {needed(80 * GIB, 8) / GIB:.1f} of 60.0 GiB")
    assert why["zero3"].startswith("100% slower (2e+03 ms a step)")


def test_what_its_own_profile_finds_too_large_is_not_chosen():
    def exact(some: list[search.ScoredCandidate]) -> None:
        for r in some:
            if r.candidate.setting == "zero2":
                r.footprint = footprint(70 * GIB, 0, 0, 0)

    assert chosen(search.Cluster(1, 8, 60 * GIB), exact).chosen.candidate.setting == "zero1"


def test_host_memory_counts_for_all_ranks_of_a_node():
    def settings(host: float) -> str:
        return (
            chosen(search.Cluster(1, 8, 60 * GIB, host * GIB), among=[scored("zero2_offload", 20, 1, 10)])
            .candidates[0]
            .reason
        )

    assert settings(81) == "chosen"
    with pytest.raises(RunFailed, match="needs 80.0 of 79.0 GiB of a node's memory"):
        settings(79)


def test_where_nothing_fits_the_smallest_is_named():
    with pytest.raises(search.NothingFits, match="no setting fits: needs 21.5 of 10.0 GiB a GPU") as error:
        chosen(search.Cluster(1, 8, 10 * GIB))
    assert error.value.smallest.candidate.setting == "zero3"


# --- files


@pytest.mark.parametrize("override", [{}, {"zero_optimization": {"zero_hpz_partition_size": 4}}])
def test_what_is_written_is_what_train_takes(tmp_path, override):
    base = tmp_path / "mine.yaml"
    base.write_text(f"base: {BASE}\ndeepspeed: {{override: {json.dumps(override)}}}\n")
    config = load_config(base, ["--train.lr", "0.5", "--deepspeed.precision", "fp32", "--seed", "3"])
    ds = read_deepspeed_json(config)
    found = chosen(search.Cluster(2, 4, 60 * GIB))
    found.configured = found.candidates[2]
    written = output.write(tmp_path / "tune", found, str(base), config, ds, started=0)["files"]
    assert (tmp_path / "tune/pareto.png").read_bytes()[:4] == b"\x89PNG"
    line = shlex.split((tmp_path / "tune/sbatch.txt").read_text())
    assert line[:4] == ["sbatch", "--nodes=2", "--gpus-per-node=4", "slurm/train.sbatch"]
    taken = load_config(line[line.index("--config") + 1])
    got = deepspeed_config(taken, 8)
    assert got["zero_optimization"] == SETTINGS["zero2"] and got["train_micro_batch_size_per_gpu"] == 8
    assert not got["bf16"]["enabled"] and (taken.train.lr, taken.seed) == (0.5, 3)
    assert ("base:" in Path(written["overrides.yaml"]).read_text()) == (not override)
    answer = json.loads((tmp_path / "tune/candidates.json").read_text())
    assert answer["chosen"]["setting"] == "zero2" and len(answer["candidates"]) == 5


# --- trials


def tried(config_file: Path, out: Path, launch: list, retry_failed: bool = False) -> search.SearchResult:
    """Three candidates of a tiny model on this CPU."""
    config = load_config(config_file)
    ds = read_deepspeed_json(config)
    some = [scored(name, 1, seconds) for name, seconds in (("zero2", 1), ("zero1", 2), ("zero3", 3))]
    for r in some:
        r.candidate = space.Candidate(r.candidate.setting, 4, 2, "none", "auto", 25_000_000)
    found = search.choose(some, search.Cluster(1, 1, 60 * GIB), ASSUMED, lambda rs: [_exact(r) for r in rs])
    how = trials.Trials(out, 3, 4, tuple(map(str, launch)), retry_failed)
    trials.measure(found, how, str(config_file), config, ds)
    return found


def _exact(r: search.ScoredCandidate) -> None:
    r.footprint = footprint(r.footprint.peak, 0, 0, 0, exact=True)


FAKE = """\
import json, os, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run_dir") + 1])
with open(run.parent / "started", "a") as f:
    f.write(run.name + chr(10))
if run.name.startswith("zero1"):
    print("Traceback (most recent call last):\\ntorch.OutOfMemoryError: CUDA out of memory. Tried", file=sys.stderr)
    sys.exit(1)
if run.name.startswith("zero3") and not (run.parent / "go").exists():
    (run / "metrics.jsonl").write_text("half a li")
    (run.parent / "waiting").touch()
    time.sleep(60)
rate = 5.0 if run.name.startswith("zero2") else 9.0
lines = [{"kind": "train", "samples_per_second": r, "peak_memory_gib": 1.5} for r in (1.0, rate, rate, 100.0)]
(run / "metrics.jsonl").write_text("".join(json.dumps(x) + chr(10) for x in lines))
(run / "checkpoints").mkdir()
"""


def test_killed_trials_are_made_again_and_finished_or_failed_ones_are_not(tmp_path, config_file):
    fake, out = tmp_path / "fake.py", tmp_path / "trials"
    fake.write_text(FAKE)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from test_tune import tried; "
        "tried(Path(sys.argv[2]), Path(sys.argv[3]), [sys.executable, sys.argv[4]])"
    )
    words = [sys.executable, "-c", code, str(ROOT / "tests"), str(config_file), str(out), str(fake)]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "waiting").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (out / "go").touch()
    found = tried(config_file, out, [sys.executable, fake])
    names = ["zero2-mb4-none", "zero1-mb4-none", "zero3-mb4-none", "zero3-mb4-none"]
    assert (out / "started").read_text().split() == names
    # the measured ones come first, the fastest of them is chosen, whatever was predicted
    assert [r.candidate.setting for r in found.candidates] == ["zero3", "zero2", "zero1"]
    assert found.chosen.trial["samples_per_second"] == 9.0
    assert found.candidates[2].reason == "failed in its trial: torch.OutOfMemoryError: CUDA out of memory. Tried"
    said = report.lines(found, {"seconds": 1, "files": {"sbatch": ""}}, explain=False)
    assert said[0].startswith("predicted, 2 of them measured: 3 candidates for 1 x 1 H100 of 60.0 GiB")
    assert not (out / "zero3-mb4-none/checkpoints").exists()
    tried(config_file, out, [sys.executable, fake], retry_failed=True)
    assert (out / "started").read_text().split() == [*names, "zero1-mb4-none"]


def test_a_stopped_trial_stops_the_search_with_75(tmp_path, config_file):
    fake = tmp_path / "fake.py"
    fake.write_text("import sys; sys.exit(75)")
    with pytest.raises(trials.Interrupted):
        tried(config_file, tmp_path / "trials", [sys.executable, fake])
    assert not list(tmp_path.glob("trials/*/trial.json"))


@pytest.mark.slow
def test_statuses_are_found_behind_torchrun(tmp_path, config_file):
    """Which ends with 1 whatever its ranks end with: what was refused is tried again, and 75 stops the search."""
    fake, launch = tmp_path / "fake.py", trials.launcher(None, 1, 2)[:-1]
    for status, error in ((2, RunFailed), (75, trials.Interrupted)):
        code = "import os, sys, time; time.sleep(60 * int(os.environ['RANK'])); "
        fake.write_text(code + f"print('dit-ds: error: no shards', file=sys.stderr); sys.exit({status})")
        with pytest.raises(error):
            tried(config_file, tmp_path / "trials", [*launch, fake])
        made = [json.loads(path.read_text()) for path in tmp_path.glob("trials/*/trial.json")]
        assert {(t["status"], t["error"]) for t in made} == {(2, "no shards")}


@pytest.mark.slow
def test_the_command_tries_a_tiny_model_on_a_cpu(tmp_path, config_file, capsys, monkeypatch):
    """Predicted, then trained, from end to end; few candidates, as each profile takes seconds."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):  # of this process's own group
        monkeypatch.delenv(name, raising=False)
    every = command.candidates

    def few(*args) -> list[space.Candidate]:
        return [
            c for c in every(*args) if c.setting in ("zero1", "zero2") and c.policy == "block" and c.kernel == "auto"
        ]

    monkeypatch.setattr(command, "candidates", few)
    monkeypatch.setattr(search, "_VERIFIED", 0)
    out = tmp_path / "tune"
    options = ["--gpus", "1", "--measure", "--trials", "1", "--steps", "4", "--out", str(out), "--json"]
    assert main(["tune", "--config", str(config_file), *options, "--train.batch_size", "2"]) == 0
    said = capsys.readouterr()
    assert "predict: 100%" in said.err and "try: 100%" in said.err
    answer = json.loads(said.out)
    (made,) = (c for c in answer["candidates"] if c["trial"])
    assert made == answer["chosen"] and made["trial"]["status"] == 0 and not answer["predicted"]
    assert made["exact_memory"] and 0 < made["peak_gib"] < 1
    assert [m["step"] for m in metrics_of(out / "trials" / made["name"])] == [1, 2, 3, 4]
    assert not (out / "trials" / made["name"] / "checkpoints").exists()
    taken = load_config(answer["files"]["overrides.yaml"])
    assert (taken.train.batch_size, taken.train.activation_checkpointing) == (2, "block")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "abacus"], "GPU 'abacus' is not known"),
        (["--gpu", "V100"], "no rate in bfloat16"),
        (["--gpu-memory", "lots"], "is no amount of memory"),
        (["--gpu-memory", "9" * 400], "is no amount of memory"),
        (["--gpus", "0"], "'0' is not a whole number from 1"),
        (["--gpus", "6"], "64 is not a multiple of micro-batch 1 x 6 ranks"),
        (["--nodes", "16"], "128 GPUs share train.batch_size 64"),
        (["--mfu", "2"], "argument --mfu: '2'"),
        (["--trials", "0"], "argument --trials: '0'"),
        (["--measure", "--nodes", "2"], "needs a launcher"),
        (["--deepspeed.override.optimizer.type", "Adam"], "which the run owns"),
        (["--model.size", "vit_x"], "vit_x"),
        (["--model.name", "lavt", "--model.size", "swin_b"], "memory plan predicts lavt's memory"),
    ],
)
def test_impossible_requests_are_refused_in_a_line(capsys, options, says):
    assert main(["tune", "--config", str(BASE), *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
