"""The command line."""

from dit_ds.cli.entry import main

__all__ = ["main"]
