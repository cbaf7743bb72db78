"""MkDocs hooks: reference pages generated from the code, the benchmarks' reports, and links out of docs/.

`pages()` is the generator: path in the site: Markdown. The pages are not committed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
# files of the tree that are pages of the site, too
_INCLUDED = {"reference/shards.md": "data_shards/README.md", "reference/deepspeed.md": "configs/deepspeed/README.md"}
_HEADLINE = "<!-- headline -->"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """The generated pages: path in the site, Markdown."""
    made = {"reference/configuration.md": configuration(), "reference/commands.md": commands()}
    made |= {path: (ROOT / source).read_text() for path, source in _INCLUDED.items()}
    return made | {f"results/{f.name}": _report(f) for f in sorted(RESULTS.glob("*.md"))}


def _report(path: Path) -> str:
    """A benchmark's report, with a title of its own where it has none."""
    text = path.read_text()
    return text if text.startswith("# ") else f"# {path.stem}\n\n{text}"


# --- configuration ------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of the configuration, by section."""
    from dit_ds.config.load import fields

    lines = ["# Configuration keys", "", "```sh", "dit-ds train --help", "```", "",
             "Set a key in the YAML file of a run, or on the command line as `--section.key value`. "
             "[How values are read](../training.md#values). This page is generated from `dit_ds/config/`."]  # fmt: skip
    section = None
    for name, default, kind, meaning in fields():
        of, _, _ = name.rpartition(".")
        if of != section:
            section = of
            lines += ["", f"## {section}" if section else "## The run", "", "| key | type | default | meaning |",
                      "|---|---|---|---|"]  # fmt: skip
        lines.append(f"| `{name}` | {_code(kind)} | {_code(default)} | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as a cell of a table; code within it stays."""
    parts = " ".join(text.split()).split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([|*\[<])", r"\\\1", parts[i])
    return "`".join(parts)


def _code(value: Any) -> str:
    """A value or a type as a cell of a table."""
    text = re.sub(r"Literal\[(.*?)\]", lambda of: of[1].replace("'", "").replace(", ", " | "), str(value))
    return f"`{text}`" if text else ""


# --- commands -----------------------------------------------------------------------------------------------------


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ("dit-ds",)
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """(words of the command, its parser) of every command, groups included. argparse has no public way to list them."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, (*words, name))


def commands() -> str:
    """Every command with its arguments and options."""
    from dit_ds.cli.entry import make_parser

    lines = ["# Commands", "", "```sh", "dit-ds COMMAND --help", "```", "",
             "Each command that reports takes `--json`: one JSON object on stdout, logs on stderr. "
             "[Exit statuses](../troubleshooting.md#exit-statuses). This page is generated from `dit_ds/cli/`."]  # fmt: skip
    helps: dict[tuple[str, ...], str] = {}
    for words, parser in parsers(make_parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                helps |= {(*words, a.dest): a.help or "" for a in action._choices_actions}
        if len(words) > 1:
            lines += _command(words, parser, helps.get(words, ""))
    return "\n".join(lines) + "\n"


def _command(words: tuple[str, ...], parser: argparse.ArgumentParser, help: str) -> list[str]:
    what = _cell(parser.description or help).rstrip(".")
    lines = ["", "#" * len(words) + f" {' '.join(words)}", "", f"{what[:1].upper()}{what[1:]}."]
    rows = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction | argparse._HelpAction)
            and a.help != argparse.SUPPRESS and "--help" not in a.option_strings]  # fmt: skip
    if rows:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [f"| {_argument(a)} | {_cell((a.help or '').replace('%%', '%'))} |" for a in rows]
    if parser.get_default("takes_overrides"):
        lines += ["", "Keys of the configuration can be overridden: `--section.key value`."]
    return lines


def _argument(action: argparse.Action) -> str:
    """An argument as it is written, with its values."""
    values = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    name = ", ".join(action.option_strings)
    return f"`{name}`" if action.nargs == 0 else f"`{name} {values}`"


# --- mkdocs -------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the benchmarks' pictures."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for picture in sorted([*RESULTS.glob("*.png"), *RESULTS.glob("*.jpg")]):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The table of headline figures, and links out of docs/, which are right in the tree, as links within the site."""
    if _HEADLINE in markdown:
        markdown = markdown.replace(_HEADLINE, headline())
    return relink(markdown, page.file.src_uri)


def headline() -> str:
    """The README's table of figures, from `benchmarks/headline.py`."""
    spec = importlib.util.spec_from_file_location("headline", ROOT / "benchmarks/headline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.table("../")


def relink(markdown: str, source: str) -> str:
    """Links from docs/ into the tree: to what is a page or picture of the site, to that; of others the text stays.

    Args:
        source: the page's path, as `start.md` or `reference/metrics.md`.
    """
    inside = {f"../{file}": path for path, file in _INCLUDED.items()}
    up = "../" * source.count("/")

    def link(found: re.Match[str]) -> str:
        picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        target = target.removeprefix(up)
        if target in inside:
            return f"{picture}[{text}]({up}{inside[target]}{anchor})"
        if target.startswith("../benchmarks/results/") and target.endswith((".md", ".png", ".jpg")):
            return f"{picture}[{text}]({up}{target.removeprefix('../benchmarks/')}{anchor})"
        return text if target.startswith("../") else found[0]

    return _LINK.sub(link, markdown)
