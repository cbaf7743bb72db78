"""configs/paper: every row of the paper's tables loads, is what the row says, builds at tiny size and takes a step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MINILM, ROOT, environment

from dit_ds.cli.entry import main
from dit_ds.config.load import load_config
from dit_ds.config.schema import RunConfig
from dit_ds.data.loading.prompts import Prompts
from dit_ds.models.build import build_model
from dit_ds.paper.experiments import differences, experiments, settings_of, text_encoder
from dit_ds.paper.tables import TABLES
from dit_ds.planning.memory.profiled_step import fake_batch

FOLDER = ROOT / "configs/paper"
FILES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
BASES = {"table8", "released_code"}  # no rows themselves


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.yaml", list(overrides))


def test_every_file_is_a_row_and_every_row_of_ours_a_file():
    named = {name for t in TABLES.values() for r in t.rows for name in r.configs.values()}
    assert named | BASES == set(FILES)
    for number, t in TABLES.items():
        assert all(r.configs for r in t.rows) or number == 7


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("table1_default", {"scheme": "default", "image_encoder_frozen": False, "decoder_layers": 2}),
        ("table1_add_2_layers_frozen", {"scheme": "default", "image_encoder_frozen": True, "decoder_layers": 4}),
        ("table1_add_4_layers", {"image_encoder_frozen": False, "decoder_layers": 6}),
        ("table1_end_to_end_frozen", {"scheme": "end_to_end", "text_encoder_frozen": False, "mask_decoder_frozen": False}),
        ("table2_layer_wise_static", {"scheme": "layer_wise", "static_tokens": True}),
        ("table3_layer_wise_both_frozen", {"image_encoder_frozen": True, "text_encoder_frozen": True, "projections_frozen": False}),
        ("table4_cross_attention_ffn", {"scheme": "cross_attention_ffn", "image_encoder_frozen": False}),
        ("table5_clip", {"text_encoder": "clip", "image_encoder_frozen": True, "scheme": "layer_wise"}),
        ("table6_mix", {"trained_with": ["box", "point", "text"], "scheme": "layer_wise"}),
        ("table7_vit_h_refcocog", {"size": "vit_h", "dataset": "refcocog", "split_by": "umd"}),
        ("table7_vit_b_refcocoplus", {"size": "vit_b", "dataset": "refcoco+", "split_by": "unc"}),
        ("table7_rela_refcoco", {"method": "rela"}),
        ("table9_cascade", {"scheme": "cascade", "image_encoder_frozen": True}),
    ],
)  # fmt: skip
def test_a_row_is_what_the_paper_says(name, settings):
    config = load(name)
    assert settings.items() <= settings_of(config).items()
    if config.model.name == "dit_sam":  # section 4.2 holds for all
        t, d = config.train, config.data
        assert (t.batch_size, t.lr, t.epochs, t.milestones, t.lr_decay, t.warmup_epochs) == (
            64,
            1e-4,
            40,
            [30, 35],
            0.2,
            3,
        )
        assert (d.image_size, d.resize, config.eval.threshold, t.ema_decay) == (512, "pad", 0.35, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        "--model.scheme end_to_end --model.adapters always",
        "--model.freeze_image_encoder true --model.freeze_projections true",
        "--model.static_tokens 20 --model.static_form add",
    ],
)
def test_the_released_codes_preset_takes_what_it_says(overrides):
    """Its comments name these, and it departs from no row in settings."""
    assert overrides in (FOLDER / "released_code.yaml").read_text()
    config = load("released_code", *overrides.split())
    assert (config.text.layers, config.train.ema_decay, config.train.gradient_clipping) == (1, 0.9997, 0.15)
    assert settings_of(load("released_code")) == settings_of(load("table1_layer_wise"))


def test_rows_that_share_a_run_share_all_and_others_nothing():
    """No two rows write into one folder with different settings, and no settings are trained twice."""
    by_run: dict[str, RunConfig] = {}
    for name in FILES:
        if name in BASES:
            continue
        config = load(name)
        other = by_run.setdefault(config.run_dir, config)
        assert other == config, name
    configs = [c.model_dump_json(exclude={"run_dir"}) for c in by_run.values()]
    assert len(set(configs)) == len(configs)


def test_settings_tell_the_rows_of_a_table_apart():
    for number in set(TABLES) - {8}:
        found = [json.dumps(e.settings, sort_keys=True) for e in experiments(number, FOLDER)]
        assert len(set(found)) == len(found), number


def test_differences_leave_out_what_does_not_matter():
    base = load("table1_layer_wise")
    same = ["--run_dir", "x", "--seed", "3", "--train.compile", "true", "--text.name", "here/bert-base-uncased",
            "--model.checkpoint", "elsewhere/sam_vit_b_01ec64.pth", "--deepspeed.config", "zero3.json"]  # fmt: skip
    assert differences(base, load("table1_layer_wise", *same)) == []
    other = ["--train.ema_decay", "0.9", "--data.scales", "[320, 512]", "--model.checkpoint", "null"]
    assert differences(base, load("table1_layer_wise", *other)) == [
        "data.scales",
        "model.checkpoint",
        "train.ema_decay",
    ]


def test_a_clip_is_known_by_its_folder_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    assert text_encoder(str(tmp_path)) == "clip" == text_encoder("openai/clip-vit-base-patch32")
    assert text_encoder("bert-base-uncased") == "bert" == text_encoder(MINILM)
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    assert text_encoder(str(tmp_path)) == "roberta" == text_encoder("FacebookAI/roberta-base")  # no row of the paper's
    assert (
        text_encoder("google/t5-small") == "t5" and text_encoder("distilbert/distilbert-base-uncased") == "distilbert"
    )


# --- built and stepped at tiny size -------------------------------------------------------------------------------


def tiny(name: str) -> list[str]:
    """Overrides that keep what a row is about, and make it small."""
    size = "swin_t_tiny" if "lavt" in name or "rela" in name else "vit_t"
    out = ["--model.size", size, "--model.checkpoint", "null", "--data.image_size", "64", "--text.layers", "1",
           "--text.name", MINILM, "--text.random_init", "true"]  # fmt: skip
    config = load(name)
    if config.model.name == "dit_sam":  # as beside a SAM checkpoint
        out += ["--model.word_init", "zero"]
    return out + (["--data.scales", "[48, 64]"] if config.data.scales else [])


def kinds() -> dict[str, str]:
    """One file of those that are the same model once they are small."""
    first: dict[str, str] = {}
    for name in FILES:
        config = load(name, *tiny(name))
        parts = [
            config.model.model_dump_json(),
            config.text.model_dump_json(),
            load(name).text.name,
            config.data.prompts,
        ]
        first.setdefault(str(parts), name)
    return {name: name for name in first.values()}


@pytest.mark.parametrize("name", kinds())
def test_a_row_builds_and_takes_a_step(name, tmp_path):
    overrides = tiny(name)
    if text_encoder(load(name).text.name) == "clip":
        overrides += ["--text.name", tiny_clip(tmp_path)]
    config = load(name, *overrides)
    model = build_model(config).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    words = "text" in config.data.prompts  # not of Table 6's SAM
    assert any(n.startswith("text_encoder.") for n in trained) == (words and not config.text.freeze)
    if config.model.name == "dit_sam":
        assert any(n.startswith("image_encoder.blocks.") for n in trained) == (not config.model.freeze_image_encoder)
        assert any(n.startswith("mask_decoder.") for n in trained)
        words_enter = config.model.scheme != "default"
        assert any(n.startswith("image_encoder.instruction.") for n in trained) == words_enter
    inputs, mask, weight = fake_batch(2, 64, config.data.tokens, Prompts.of(config.data.prompts, config.data.points))
    inputs["image"] = torch.randint(0, 256, inputs["image"].shape, dtype=torch.uint8)
    if words:
        inputs["tokens"] = torch.randint(1, 90, inputs["tokens"].shape)
    mask[:, 16:40, 20:50] = 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model.loss(model(**inputs), mask, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses))) and losses[0] != losses[1]
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= trained


def tiny_clip(folder: Path) -> str:
    """A text tower's architecture, as transformers saves it; its weights are random."""
    import dit_ds.torchvision_stub  # noqa: F401  before transformers

    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.CLIPTextConfig(vocab_size=100, **size).save_pretrained(folder)
    return str(folder)


# --- dit-ds experiments -------------------------------------------------------------------------------------------


def test_the_list_names_rows_configurations_and_figures(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["experiments", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["experiments"]
    assert {r["table"] for r in rows} == set(range(1, 10)) and len(result["misprints"]) >= 5
    (row,) = [
        r
        for r in rows
        if r["table"] == 7 and r["settings"]["size"] == "vit_h" and r["settings"]["dataset"] == "refcoco+"
    ]
    assert row["paper"] == {"val": {"oiou": 68.0}, "testA": {"oiou": 71.77}, "testB": {"oiou": 60.04}}
    assert Path(row["config"]).exists() and row["run"] == "runs/table7_vit_h_refcocoplus"
    for arguments in ([], ["--table", "6"]):
        assert main(["experiments", *arguments]) == 0
        text = capsys.readouterr().out
        assert "configs/paper/table6_mix.yaml" in text and ("Table 1 " in text) == (not arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--table", "10"], "the paper has no table 10: its tables are 1 to 9"),
        (["--configs", "nowhere"], "name their folder with --configs, or leave it out"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(capsys, arguments, says):
    assert main(["experiments", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_no_torch_is_imported():
    code = "import sys; from dit_ds.cli import main; main(['experiments']); main(['compare', 'x']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60, cwd=ROOT
    )
    assert done.stdout.endswith("False\n")
