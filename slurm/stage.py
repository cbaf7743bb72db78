"""Copy the shards that a training run reads to this node's local disk, but for those that are there already."""

from __future__ import annotations

import argparse
import shutil
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from dit_ds.config.load import load_config
from dit_ds.errors import UserError
from dit_ds.files import replace_on_success


def stage(source: Path, target: Path) -> tuple[int, int]:
    """Copy the files of `source` to `target`; return how many were copied, and how many there are.

    Each file appears complete or not at all, the manifest last, so that an interrupted copy is not taken for a set.
    """
    files = sorted(source.iterdir(), key=lambda f: f.name == "manifest.json")
    copied = 0
    for file in files:
        there = target / file.name
        if there.exists() and _size_and_time(there) == _size_and_time(file):
            continue
        target.mkdir(parents=True, exist_ok=True)
        with replace_on_success(there) as temporary:
            shutil.copy2(file, temporary)
        copied += 1
    return copied, len(files)


def _size_and_time(file: Path) -> tuple[int, int]:
    """Bytes, and seconds of the last change."""
    stat = file.stat()
    return stat.st_size, int(stat.st_mtime)


def main() -> int:
    """`stage.py FOLDER` and the arguments of `dit-ds train`, which say what to copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", required=True)
    for flag in ("--resume", "--json"):
        parser.add_argument(flag, action="store_true")
    args, overrides = parser.parse_known_args()
    try:
        config = load_config(args.config, overrides)
        data = config.data
        if data.streamed:
            raise UserError(f"data.root {data.root} is read as a stream, which can't be copied: unset STAGE_DIR")
        sets = dict.fromkeys(data.train_sets)
        if config.eval.every_epochs or Path(data.root, data.val_set, "manifest.json").exists():
            sets[data.val_set] = None  # without evaluation it need not be there
        for name in sets:
            if not Path(data.root, name, "manifest.json").exists():
                raise UserError(f"{Path(data.root, name)} holds no shards: write them with 'dit-ds data shard'")
        counts = [stage(Path(data.root, name), args.folder / name) for name in sets]
        copied, files = map(sum, zip(*counts))
    except UserError as e:
        print(f"stage: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"stage: error: {socket.gethostname()}: {e}: free some space there, or empty STAGE_DIR", file=sys.stderr)
        return 1
    print(f"{socket.gethostname()}: {copied} of {files} files of {', '.join(sets)} copied to {args.folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
