"""The files that say what the project is: its licence, those of the packages it uses, citation, changelog, metadata."""

from __future__ import annotations

import hashlib
import re
import tomllib
from importlib import metadata

import pytest
import yaml
from conftest import ROOT

import dit_ds

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "dev"}
USED = [re.match(r"[\w.-]+", line)[0] for line in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]]
# where a package's metadata names no SPDX expression: what they say instead
WORDS = {
    "Apache-2.0": "apache",
    "MIT": "mit",
    "BSD-3-Clause": "bsd",
    "BSD-2-Clause": "bsd",
    "PSF-2.0": "python software",
}


def test_the_licence_is_apaches_own_text():
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert PROJECT["license"] == "Apache-2.0" and set(PROJECT["license-files"]) == {"LICENSE", "NOTICE"}


def notice() -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+): ([A-Z0-9].*)$", (ROOT / "NOTICE").read_text(), re.MULTILINE)
    return dict(lines)


def test_the_notice_names_every_package_that_is_used():
    assert list(notice()) == USED


@pytest.mark.parametrize("name", USED)
def test_a_package_is_under_the_licence_that_the_notice_names(name):
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip("not installed")
    said, expression = notice()[name], found.metadata["License-Expression"]
    if expression:
        assert said == expression
        return
    files = [f for f in found.files or [] if "dist-info" in str(f) and "LICENSE" in f.name.upper()]
    texts = [
        found.metadata["License"] or "",
        *(c for c in found.metadata.get_all("Classifier") or [] if "License" in c),
    ]
    texts += [f.read_text() for f in files[:1]] if not any(texts) else []
    for part in said.split(" AND "):
        assert WORDS.get(part, part.lower()) in " ".join(texts).lower(), texts


def test_citation_changelog_and_metadata_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == dit_ds.__version__ and citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["title"] == "Deep Instruction Tuning for Segment Anything Model"
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.index("## Unreleased") < changes.index(f"## {dit_ds.__version__}")


def test_templates_for_issues_are_forms():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert form["name"] and form["description"]
            assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"]), path
