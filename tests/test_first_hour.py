"""What commands say at their end, and what a missing model costs: where things went, and what comes next."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from conftest import dit_ds, tiny_config
from huggingface_hub import constants

from dit_ds.cli.entry import main
from dit_ds.models import hub


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A short run's folder, and what it said."""
    folder = tmp_path_factory.mktemp("said")
    config = tiny_config(shards, folder / "run")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    done = dit_ds("train", "--config", folder / "c.yaml", "--train.max_steps", "2")
    return folder / "run", done.stdout


def test_the_end_of_a_training_names_its_checkpoint_and_the_next_commands(trained):
    run, said = trained
    assert f"checkpoint: {run}/checkpoints/step_00000002\n" in said
    commands = re.findall(r"dit-ds (\w+) (\S+)", said)
    assert commands == [("eval", str(run)), ("predict", str(run)), ("sheet", str(run))]
    assert "--split val\n" in said and "--text 'WORDS'" in said


def test_eval_says_what_it_evaluates_where_the_result_went_and_what_comes_next(trained, shards, tmp_path):
    run, _ = trained
    done = dit_ds("eval", run, "--json")
    assert f"evaluating {run}, step 2, on val of refcoco/unc in {shards}: " in done.stderr
    assert "text prompts, threshold 0.35" in done.stderr
    (file,) = re.findall(r"^written to (.*)$", done.stderr, re.MULTILINE)
    assert json.loads(Path(file).read_text()).items() >= json.loads(done.stdout).items()
    other = dit_ds("eval", run, "--threshold", "0.4")
    assert "not kept in the run's folder" in other.stderr and "written to" not in other.stderr
    assert other.stdout.splitlines()[-1] == f"next: dit-ds sheet {run} --split val --out sheet.png"
    shutil.copytree(shards, tmp_path / "moved")
    moved = dit_ds("eval", run, "--data-root", tmp_path / "moved").stdout.splitlines()[-1]
    assert moved == f"next: dit-ds sheet {run} --split val --data-root {tmp_path}/moved --out sheet.png"
    dit_ds(*moved.replace("--out sheet.png", f"--out {tmp_path}/sheet.png").split()[2:])  # it is a command that runs
    assert (tmp_path / "sheet.png").stat().st_size


def test_making_and_sharding_a_set_are_told_in_sentences(tmp_path, capsys):
    assert main(["data", "sample", "--out", str(tmp_path / "s"), "--images", "20", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "20 images, " in out and f"next: dit-ds data shard --refer-root {tmp_path}/s " in out
    words = re.search(r"next: dit-ds (.*)", out)[1].replace("--out data_shards", f"--out {tmp_path}/d").split()
    assert main([*words, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^train: \d+ images, \d+ refs, \d+ sentences in \d+ shards", out, re.MULTILINE)
    assert "{" not in out and out.endswith(f"written to {tmp_path}/d/refcoco/unc; next: dit-ds data verify {tmp_path}/d/refcoco/unc\n")  # fmt: skip


# --- the hub


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    return []


def loader(calls: list, here: bool):
    def load(name, local_files_only, **options):
        calls.append((local_files_only, options))
        if local_files_only and not here:
            raise OSError("not in the cache")
        return name

    return load


def test_what_is_in_the_cache_is_not_asked_for(calls):
    assert hub.local_first(loader(calls, here=True), "bert", layers=3) == "bert"
    assert calls == [(True, {"layers": 3})]


def test_what_is_not_there_is_fetched_where_the_hub_answers(calls, monkeypatch, tmp_path):
    assert hub.local_first(loader(calls, here=False), "bert") == "bert" and [c[0] for c in calls] == [True, False]
    for name, answers, fetch in (("bert", False, True), ("bert", True, False), (str(tmp_path), True, True)):
        monkeypatch.setattr(hub, "hub_answers", lambda answers=answers: answers)
        calls.clear()
        with pytest.raises(OSError, match="not in the cache"):
            hub.local_first(loader(calls, here=False), name, fetch=fetch)
        assert len(calls) == 1


class NotFound(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ask = hub.hub_answers.__wrapped__
    assert ask()  # any answer is one
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not ask()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.shutdown()
    server.server_close()
    assert not ask()
