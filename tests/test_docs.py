"""README and docs/: links, the generated reference, what they say of files, metrics and errors, and that their blocks run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, environment

from dit_ds.cli.entry import make_parser
from dit_ds.config.load import fields

pytestmark = pytest.mark.docs
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"^( *)<!-- runs -->\n\1```(sh|python)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def module(path: str) -> ModuleType:
    """A script of the tree, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The generated pages."""
    return module("docs/hooks.py").pages()


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_readmes_figures_are_those_of_the_result_files():
    headline = module("benchmarks/headline.py")
    assert headline.written(README.read_text()) == README.read_text(), "python benchmarks/headline.py --write"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page, pages):
    """Within the tree, as it is read there; anchors are mkdocs' to check."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    generated = {(DOCS / path).resolve() for path in pages}
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in t]
    found = {t: (page.parent / t).resolve() for t in targets}
    assert [t for t, path in found.items() if not path.exists() and path not in generated] == []


def test_every_report_is_linked():
    text = (DOCS / "benchmarks.md").read_text()
    assert [f.name for f in (ROOT / "benchmarks/results").glob("*.md") if f"results/{f.name})" not in text] == []


def test_links_out_of_docs_become_links_within_the_site():
    relink = module("docs/hooks.py").relink
    text = "[a](../benchmarks/results/loader.md) [b](../dit_ds/files.py) [c](../data_shards/README.md#x) [d](start.md)"
    assert relink(text, "page.md") == "[a](results/loader.md) b [c](reference/shards.md#x) [d](start.md)"
    assert relink("[a](../../data_shards/README.md) [b](../start.md)", "reference/page.md") == (
        "[a](../reference/shards.md) [b](../start.md)"
    )


def test_every_key_is_documented(pages):
    text = pages["reference/configuration.md"]
    for name, _, _, meaning in fields():
        assert meaning and text.count(f"| `{name}` |") == 1, name


def test_every_command_and_option_is_documented(pages):
    sections = dict(re.findall(r"^##+ (dit-ds .*?)\n(.*?)(?=^##|\Z)", pages["reference/commands.md"], re.M | re.S))
    known = set()
    for words, parser in module("docs/hooks.py").parsers(make_parser()):
        if len(words) > 1:
            known.add(name := " ".join(words))
            options = set(re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*)", parser.format_help(), re.MULTILINE)) - {"--help"}
            assert [o for o in options if f"`{o}" not in sections[name]] == [], name
    assert known == set(sections) and {"dit-ds train", "dit-ds memory plan", "dit-ds experiments sweep"} <= known


def test_the_site_builds_strictly(tmp_path):
    """No broken link or anchor, no page outside the navigation."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = environment() | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "train.lr_scale.projections" in (tmp_path / "site/reference/configuration.html").read_text()
    assert (tmp_path / "site/results/table8.png").exists()


def said_by_the_package() -> str:
    """Every text in the package, placeholders as {}, each text on a line."""
    texts = []
    for path in (ROOT / "dit_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(" ".join(node.value.split()))
    return "\n".join(texts)


def test_the_error_lines_of_troubleshooting_exist():
    """Their words between the placeholders: `..`, single capitals, the name in quotes."""
    lines = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    said, missing = said_by_the_package(), []
    spans = [span for line in lines for span in re.findall(r"`([^`]+)`", line)]
    for span in spans:
        parts = [p.strip(" :'") for p in re.split(r"\.\.|\b[A-Z]\b|'[A-Z]'", span)]
        missing += [p for p in parts if len(p) > 3 and p not in said]
    assert len(spans) > 30 and missing == []


# --- blocks that run -----------------------------------------------------------------------------------------------


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the marked blocks, in order."""
    return [(kind, textwrap.dedent(indent + text)) for indent, kind, text in _BLOCK.findall(page.read_text())]


def run(kind: str, text: str, folder: Path) -> None:
    """Run a block in a folder; fails where it does."""
    env = environment()
    env["PATH"] = f"{folder / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages assume it: configurations, a tiny set as REFER's files, tiny runs of the demo, photos."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("configs", "slurm"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    shim = folder / "bin/dit-ds"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m dit_ds.cli "$@"\n')
    shim.chmod(0o755)
    settings = "--config configs/sample.yaml --train.max_steps 4 --data.unit ref"
    run("sh", f"""
dit-ds data sample demo/refer --images 40
dit-ds data shard --refer-root demo/refer --images demo/refer/images/train2014 --out demo/shards
dit-ds train {settings} --run_dir demo/layer_wise
dit-ds train {settings} --run_dir demo/default --model.scheme default
""", folder)  # fmt: skip
    pictures = sorted((folder / "demo/refer/images/train2014").glob("*.jpg"))
    (folder / "photos").mkdir()
    for name, picture in zip(("photo.jpg", "photos/a.jpg", "photos/b.jpg"), pictures):
        shutil.copy(picture, folder / name)
    shutil.copytree(folder / "demo/refer", folder / "refer")
    (folder / "coco").mkdir()
    os.rename(folder / "refer/images/train2014", folder / "coco/train2014")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_marked_blocks_run(page, project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project", symlinks=True)
    for kind, text in blocks(page):
        run(kind, text, folder)


def test_every_mark_has_its_block():
    for page in PAGES:
        assert page.read_text().count("<!-- runs -->\n") == len(blocks(page)), page
    assert {"own-data.md", "start.md", "evaluate.md", "predict.md"} <= {p.name for p in PAGES if blocks(p)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_files_and_metrics_of_a_run_are_documented(project):
    run_dir = project / "demo/layer_wise"
    files = (DOCS / "reference/run-folder.md").read_text()
    names = {f.name + "/" * f.is_dir() for f in run_dir.iterdir()}
    assert (
        names >= {"config.yaml", "metrics.jsonl", "checkpoints/"}
        and {n for n in names if f"`{n}`" not in files} == set()
    )
    checkpoint = next((run_dir / "checkpoints").glob("step_*"))
    parts = {re.sub(r"rank_\d+", "rank_*", f.name) for f in checkpoint.iterdir()}
    assert {n for n in parts if f"`{n}`" not in files} == set()
    metrics = (DOCS / "reference/metrics.md").read_text()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "eval", "save"}
    keys = {key for line in lines for key in line}
    assert {k for k in keys if f"`{k}`" not in metrics} == set()
