"""The house's own rules: short files and functions, few positional arguments, attributes made where objects are, docstrings,
and none of the names that were given up."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "dit_ds"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERY = [ROOT / f for f in subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
).stdout.split()] or SOURCES  # fmt: skip
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__enter__", "setUp")
_TRITON = PACKAGE / "models/triton_kernels.py"  # Triton's language: constants come as arguments, one by one
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# module: names that it had before, and has no more
FORMER_MODULES = (
    "fragments", "statistics", "control", "watch", "record", "runs", "sets", "combinations", "lending", "saver",
    "config_sections", "cli_output", "cli_data", "cli_figures", "cli_paper", "cli_planning", "coco_set",
    "scene_language", "verify_shard.jpeg_size", "ledger", "alarm", "footprint",
)  # fmt: skip
FORMER_NAMES = (
    "RunningStatistics", "in_fp32", "StallWatch", "RunRecord", "dataset_of", "TrainBatches", "EvalBatches", "Lent",
    "Drawn", "Ledger", "Alarm", "last_words", "Footprints", "Binarize", "_Shares", "_quiet_worker", "bytes_of",
    "with_gpus", "mean_over_ranks",
)  # fmt: skip


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(tree(path)) if isinstance(n, _FUNCTIONS))


def test_the_package_holds_few_modules_beside_its_packages():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_no_file_is_long():
    assert {str(f): n for f in EVERY if f.exists() and (n := len(f.read_text().splitlines())) > 400} == {}


def test_no_function_is_long():
    found = {where(f, n): n.end_lineno - n.lineno + 1 for f in SOURCES for n in functions(f)}
    assert {k: v for k, v in found.items() if v > 60} == {}


def our_names() -> set[str]:
    """Functions, methods and classes that are defined in the package, but for names that builtins or libraries share."""
    defined = {n.name for f in SOURCES for n in ast.walk(tree(f)) if isinstance(n, (*_FUNCTIONS, ast.ClassDef))}
    return defined - set(dir(builtins)) - {"forward", "apply", "backward", "view"}  # PyTorch's


def test_no_call_of_ours_has_many_positional_arguments():
    ours, wrong = our_names(), []
    for f in (f for f in SOURCES if f != _TRITON):
        for call in (n for n in ast.walk(tree(f)) if isinstance(n, ast.Call)):
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", None)
            if name in ours and len(call.args) > 5 and not ast.unparse(call.func).startswith("torch."):
                wrong.append(f"{where(f, call)} {name} has {len(call.args)}")
    assert wrong == [], wrong


def _bases(name: str, classes: dict[str, list[ast.ClassDef]]) -> Iterator[ast.ClassDef]:
    for c in classes.get(name, []):
        yield c
        for base in c.bases:
            yield from _bases(base.id if isinstance(base, ast.Name) else getattr(base, "attr", ""), classes)


def _self_attributes(function: ast.FunctionDef) -> Iterator[ast.Attribute]:
    """Attributes of the first argument that are assigned to."""
    if not function.args.args:
        return
    this = function.args.args[0].arg
    for n in ast.walk(function):
        targets = (
            n.targets
            if isinstance(n, ast.Assign)
            else [n.target]
            if isinstance(n, (ast.AnnAssign, ast.AugAssign))
            else []
        )
        for target in targets:
            for t in ast.walk(target):
                if isinstance(t, ast.Attribute) and isinstance(t.ctx, ast.Store):
                    if isinstance(t.value, ast.Name) and t.value.id == this:
                        yield t


def test_no_attribute_is_born_later_than_its_object():
    classes: dict[str, list[ast.ClassDef]] = {}
    for f in SOURCES:
        for n in ast.walk(tree(f)):
            if isinstance(n, ast.ClassDef):
                classes.setdefault(n.name, []).append(n)
    wrong = []
    for f in SOURCES:
        for c in (n for n in ast.walk(tree(f)) if isinstance(n, ast.ClassDef)):
            made = set()
            for base in _bases(c.name, classes):
                made |= {
                    n.target.id for n in base.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                made |= {
                    t.id for n in base.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
                }
                for m in base.body:
                    if isinstance(m, _FUNCTIONS) and m.name in _CONSTRUCTORS[:3]:
                        made |= {a.attr for a in _self_attributes(m)}
                    if isinstance(m, _FUNCTIONS) and any("setter" in ast.unparse(d) for d in m.decorator_list):
                        made.add(m.name)
            for m in c.body:
                static = isinstance(m, _FUNCTIONS) and any(
                    ast.unparse(d) in ("staticmethod", "classmethod") for d in m.decorator_list
                )
                if isinstance(m, _FUNCTIONS) and not static and m.name not in (*_CONSTRUCTORS[:3], "_apply"):
                    wrong += [f"{where(f, a)} {c.name}.{a.attr}" for a in _self_attributes(m) if a.attr not in made]
    assert wrong == [], wrong


def _public(path: Path) -> Iterator[tuple[str, ast.AST]]:
    yield "the module", tree(path)
    for n in tree(path).body:
        if isinstance(n, (*_FUNCTIONS, ast.ClassDef)) and not n.name.startswith("_"):
            yield n.name, n
            for m in n.body if isinstance(n, ast.ClassDef) else ():
                if isinstance(m, _FUNCTIONS) and not m.name.startswith("_"):
                    yield f"{n.name}.{m.name}", m


def _overrides(name: str) -> bool:
    """`forward` and the like, which the base class explains."""
    return name.rpartition(".")[2] in ("forward", "backward", "run")


def test_what_is_public_has_a_docstring():
    inherited: set[str] = set()
    for f in SOURCES:
        for n in ast.walk(tree(f)):
            if isinstance(n, ast.ClassDef):
                for m in n.body:
                    if isinstance(m, _FUNCTIONS) and ast.get_docstring(m):
                        inherited.add(m.name)
    wrong = []
    for f in SOURCES:
        for name, n in _public(f):
            method = name.rpartition(".")[2] if "." in name else ""
            if not ast.get_docstring(n) and method not in inherited and not _overrides(name):
                wrong.append(f"{f.relative_to(ROOT)} {name}")
    assert wrong == [], wrong


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_names_are_gone(name):
    found = [str(f.relative_to(ROOT)) for f in EVERY if f.exists() and f != Path(__file__)
             and re.search(rf"\b{name}\b", f.read_text())]  # fmt: skip
    assert found == []


def test_former_modules_are_gone():
    names = {".".join(f.relative_to(PACKAGE).with_suffix("").parts) for f in SOURCES}
    assert not names & set(FORMER_MODULES)
    imported = "|".join(re.escape(m) for m in FORMER_MODULES)
    pattern = re.compile(rf"\bdit_ds[./]({imported})\b")
    assert [str(f) for f in EVERY if f.exists() and f != Path(__file__) and pattern.search(f.read_text())] == []


def test_former_configuration_keys_are_gone():
    from dit_ds.config.load import RENAMED_KEYS

    pattern = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, RENAMED_KEYS))})(?![\w(])")
    kinds = (".py", ".yaml", ".md", ".sh", ".sbatch", ".env")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    says = ("dit_ds/config/load.py", "tests/test_validation.py", "tests/test_house.py")
    found = [f for f in files if f.endswith(kinds) and f not in says and (ROOT / f).exists()
             and pattern.search((ROOT / f).read_text())]  # fmt: skip
    assert found == []
