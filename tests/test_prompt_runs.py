"""Points and boxes through the command line: mixed training, evaluation by kind, what is not tuned, one picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from conftest import ROOT, dit_ds, metrics_of

from dit_ds.cli.entry import main

MIX = ["text", "point", "box"]


@pytest.fixture(scope="module")
def mixed(shards, tmp_path_factory):
    """A run on mixed prompts on two ranks under ZeRO-3, every parameter given away between its uses."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("mixed")
    values = tiny_config(shards, folder / "run")
    values["data"] |= {"prompts": MIX, "scales": [48, 64], "train_mask_rule": "soft", "points": 3}
    values["model"] |= {"align_corners": True}
    values["deepspeed"]["config"] = str(ROOT / "configs/deepspeed/zero3.json")
    values["deepspeed"]["override"]["zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    (folder / "mixed.yaml").write_text(yaml.safe_dump(values))
    dit_ds("train", "--config", folder / "mixed.yaml", "--train.max_steps", "4",
           "--deepspeed.override.train_micro_batch_size_per_gpu", "1", ranks=2)  # fmt: skip
    return folder


def test_mixed_prompts_train_the_same_on_one_rank(mixed, tmp_path):
    """Two ranks whose micro-batches hold other kinds, against one rank at stage 2 that takes four at once."""
    dit_ds("train", "--config", mixed / "mixed.yaml", "--run_dir", tmp_path / "one", "--train.max_steps", "4",
           "--deepspeed.config", ROOT / "configs/deepspeed/zero2.json")  # fmt: skip
    one, two = ([m["loss"] for m in metrics_of(d)] for d in (tmp_path / "one", mixed / "run"))
    np.testing.assert_allclose(one, two, rtol=2e-5)
    assert len(one) == 4 and np.isfinite(one).all()


def test_evaluation_by_kind_is_repeatable_and_kept(mixed, refusal):
    run = mixed / "run"

    def result(*arguments, **kwargs):
        return json.loads(dit_ds("eval", run, "--json", *arguments, **kwargs).stdout.splitlines()[-1])

    of = {kind: result("--prompt", kind) for kind in MIX}
    assert result("--prompt", "point", ranks=2) == of["point"]
    assert [of[k]["prompt"] for k in MIX] == MIX and of["point"]["miou"] != of["box"]["miou"]
    assert result("--threshold", "0.3", "--split", "testA")["prompt"] == "text"
    assert metrics_of(run, "eval")[-1]["miou"] == of["text"]["miou"]
    kept = sorted(p.name for p in (run / "evaluations").iterdir())
    assert kept == [f"{s}-step_00000004.json" for s in ("val-box", "val-point", "val-text")]  # at the run's threshold
    point = json.loads((run / "evaluations/val-point-step_00000004.json").read_text())
    assert of["point"].items() <= point.items()
    assert {"step": 4, "dataset": "refcoco", "split_by": "unc", "threshold": 0.35, "shuffle_text": False}.items() <= (
        point.items()
    )
    (run / "evaluations/val-text-step_00000004.json").unlink()
    result("--shuffle-text")
    assert not (run / "evaluations/val-text-step_00000004.json").exists()
    assert "--shuffle-text is about words" in refusal("eval", run, "--shuffle-text", "--prompt", "box")


def test_what_cannot_be_kept_is_a_warning(mixed, shards, tmp_path):
    import shutil

    shutil.copytree(mixed / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/evaluations", ignore_errors=True)
    (tmp_path / "run/evaluations").write_text("not a folder")
    done = dit_ds("eval", tmp_path / "run", "--prompt", "box", "--json")
    assert json.loads(done.stdout)["prompt"] == "box" and "warning: the result is not kept" in done.stderr


def test_an_untuned_checkpoint_evaluates_from_its_configuration(mixed, refusal, capsys, tmp_path):
    """Table 6's rows of SAM that is not tuned."""

    dit_ds("export", mixed / "run", "--out", tmp_path / "model.safetensors")
    values = yaml.safe_load((mixed / "mixed.yaml").read_text())
    values["data"]["prompts"] = ["point", "box"]
    path = tmp_path / "sam.yaml"
    path.write_text(yaml.safe_dump(values))
    assert "set model.checkpoint" in refusal("eval", path, "--prompt", "point")
    said = refusal(
        "predict",
        path,
        "--text",
        "a star",
        "--image",
        ROOT / "benchmarks/results/tune.png",
        "--out",
        tmp_path / "x.png",
    )
    assert "set model.checkpoint" in said
    values["model"] |= {"checkpoint": str(tmp_path / "model.safetensors"), "scheme": "default"}
    values["run_dir"] = str(tmp_path / "untuned")
    path.write_text(yaml.safe_dump(values))
    assert "the model learned no words" in refusal("eval", path, "--prompt", "text")
    result = json.loads(dit_ds("eval", path, "--prompt", "point", "--json").stdout)
    box = json.loads(dit_ds("eval", path, "--prompt", "box", "--json").stdout)
    assert (result["prompt"], box["prompt"]) == ("point", "box")
    assert result["n"] == box["n"] > 0 and result["miou"] != box["miou"]  # the prompt reaches the model
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "untuned"), "--table", "6", "--json"]) == 0
    assert "untuned" in capsys.readouterr().out  # the paper's tables find it where the configuration says
    assert "cannot read the configuration" in refusal("eval", tmp_path / "none.yaml")


def test_a_picture_with_a_point_or_a_box(mixed, refer_tree, refusal, capsys, tmp_path):
    image = sorted((refer_tree / "images/train2014").iterdir())[0]
    base = ["predict", mixed / "run", "--image", image, "--out", tmp_path / "p.png"]

    def said_of(*arguments):
        assert main([*map(str, base), *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    said = said_of("--point", "20,30", "--point", "24.5,31")
    assert said["points"] == [[20, 30], [24.5, 31]]
    more, less = (said_of("--point", "20,30", "--threshold", t)["covered"] for t in ("0.0001", "0.9999"))
    assert less < more
    both = said_of("--text", "the left star", "--box", "5,6,50,60")
    assert both["box"] == [5, 6, 50, 60] and both["text"] == "the left star"
    for arguments, line in [
        ([], "nothing says what to segment: give --text, --point or --box"),
        (["--point", "20000,3"], "outside the picture"),
        (["--point", "20"], "does not read X,Y"),
        (["--box", "9,9,3,20"], "has no inside"),
        (["--box", "1,2,3,nan"], "does not read X0,Y0,X1,Y1"),
        (["--box", "0,0,5,99999"], "not within the picture"),
    ]:
        assert line in refusal(*base, *arguments)
