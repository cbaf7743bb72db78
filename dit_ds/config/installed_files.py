"""The files that come with the package: configurations, DeepSpeed JSONs and job scripts.

A wheel has them in `dit_ds/installed/`, where setup.py puts `configs/` and `slurm/` when it is built. In a clone, and after
an editable install, they are the clone's own.
"""

from __future__ import annotations

import os
from pathlib import Path

from dit_ds.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
_NAMED = {".yaml": ("", "paper"), ".json": ("deepspeed",)}  # where in configs/ a name alone is looked for


def installed_folder(name: str) -> Path:
    """`configs` or `slurm`, as an absolute path.

    Raises:
        UserError: it was not installed.
    """
    found = _source(name)
    if not found.is_dir():
        raise UserError(f"this dit-ds was installed without its {name}/: install it again, from a wheel or a clone")
    return found


def _source(name: str) -> Path:
    in_wheel = _PACKAGE / "installed"
    return (in_wheel if in_wheel.is_dir() else _PACKAGE.parent) / name


def find_file(name: str | Path, suffix: str, folder: str | Path = "") -> Path:
    """The file that `name` means.

    It is the path, where there is a file. Else a name without slash and suffix is one of the package's (`base`,
    `table1_default`, `zero2`), and so is a path that begins with `configs/` (`configs/base.yaml`).

    Args:
        suffix: `.yaml` for configurations, `.json` for DeepSpeed's.
        folder: that a path is relative to; by default the working directory.
    Returns:
        The path, which need not exist where nothing was found.
    """
    path = Path(folder, name)
    if os.path.isfile(path):
        return path
    parts = Path(name).parts
    if len(parts) == 1 and (named := [f for f in _candidates(suffix) if f.stem == str(name)]):
        return named[0]
    if parts[:1] == ("configs",) and os.path.isfile(found := _source("configs").joinpath(*parts[1:])):
        return found
    return path


def installed_names(suffix: str) -> list[str]:
    """The names that `find_file` knows, of configurations (`.yaml`) or DeepSpeed JSONs (`.json`)."""
    return [f.stem for f in _candidates(suffix)]


def _candidates(suffix: str) -> list[Path]:
    return [f for where in _NAMED[suffix] for f in sorted(_source("configs").joinpath(where).glob(f"*{suffix}"))]


def paper_folder() -> Path:
    """The configurations of the paper's tables: below the working directory where they are there, else absolute."""
    folder = installed_folder("configs") / "paper"
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def short_name(path: Path) -> str:
    """What `find_file` finds a file by wherever the package lies: its name if it is one of the package's, given by an
    absolute path; else the path."""
    ours = path.is_absolute() and path.suffix in _NAMED and path in _candidates(path.suffix)
    return path.stem if ours else str(path)


def scripts_folder() -> Path:
    """The folder of the job scripts to submit: `slurm` in the working directory, else the one whose cluster.env was read.

    The package's own are not taken by themselves, as their cluster.env is to be filled in. See `require_scripts`.
    """
    elsewhere = Path(os.environ.get("DIT_DS_SLURM") or "slurm")
    return elsewhere if not _has_scripts(Path("slurm")) and _has_scripts(elsewhere) else Path("slurm")


def require_scripts() -> None:
    """See that `scripts_folder` is there.

    Raises:
        UserError: it is not.
    """
    if not _has_scripts(scripts_folder()):
        raise UserError("no slurm/ here: submit from dit-ds's folder, or from one that 'dit-ds init FOLDER' made")


def _has_scripts(folder: Path) -> bool:
    return (folder / "common.sh").is_file()
