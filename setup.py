"""Takes configs/ and slurm/ into the package when a wheel is built; all else is said in pyproject.toml.

`dit_ds.config.installed_files` finds them there. In a clone, and after an editable install, they stay where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "slurm")
INSIDE = Path("dit_ds", "installed")


def files() -> list[Path]:
    """Those of the folders, relative to this one."""
    found = sorted(f for folder in FOLDERS for f in Path(folder).rglob("*"))
    return [f for f in found if f.is_file() and "__pycache__" not in f.parts]


class BuildWithFolders(build_py):
    """Copies them into what is built."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib, INSIDE), ignore_errors=True)  # of a former build
        for source, target in zip(files(), self._targets(), strict=True):
            self.mkpath(str(Path(target).parent))
            self.copy_file(str(source), target)

    def _targets(self) -> list[str]:
        return [str(Path(self.build_lib, INSIDE, f)) for f in files()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What is built."""
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self._targets()]

    def get_source_files(self) -> list[str]:
        """What a source distribution needs, too."""
        return [*super().get_source_files(), *map(str, files())]


setup(cmdclass={"build_py": BuildWithFolders})
