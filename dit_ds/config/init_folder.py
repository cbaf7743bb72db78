"""`dit-ds init`: a folder with copies of the package's configurations and job scripts, to change."""

from __future__ import annotations

import shutil
from pathlib import Path

from dit_ds import __version__
from dit_ds.config.installed_files import installed_folder
from dit_ds.errors import UserError
from dit_ds.files import full_disk_is_user_error

FOLDERS = ("configs", "slurm")
README = f"""\
# A folder to train in, with dit-ds {__version__}

Run the commands in this folder: what a configuration or an option names is relative to it, but for what lies beside the
configuration that names it (as `deepspeed/zero2.json` beside `base.yaml`).

| file | is |
|---|---|
| `configs/base.yaml` | the paper's setting with ViT-B, on RefCOCO; yours can begin with `base: base.yaml` |
| `configs/sample.yaml` | the demo's, for two CPU cores |
| `configs/paper/` | a file for each row of the paper's tables |
| `configs/deepspeed/` | sharding, precision, offload, micro-batch: see its README |
| `slurm/cluster.env` | every setting of the cluster: fill it in first, then `source` it, once a session |
| `slurm/*.sbatch` | the jobs |

```
dit-ds data shard --refer-root refer --images coco/train2014 --dataset refcoco --split-by unc --out data_shards
dit-ds doctor --config configs/base.yaml
torchrun --nproc_per_node 8 -m dit_ds.cli train --config configs/base.yaml      # on one machine
source slurm/cluster.env && sbatch --nodes=2 slurm/train.sbatch --config configs/base.yaml
dit-ds eval runs/refcoco_ldit_vit_b --split testA
```

`dit-ds train --help` lists every key of a configuration. What you don't change here you can leave out: `--config base` and
`--deepspeed.config zero2` are the package's own files.
"""


def init_folder(folder: str | Path) -> dict[str, object]:
    """Write `configs/`, `slurm/` and `README.md` into a folder, which is made where it is missing.

    Returns:
        `folder`, and `files`, how many were written.
    Raises:
        UserError: one of them is there already, or the folder can't be written.
    """
    folder = Path(folder)
    for name in (*FOLDERS, "README.md"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} is there already: choose another folder, or move it away")
    sources = {name: installed_folder(name) for name in FOLDERS}
    with full_disk_is_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignore, copy_function=shutil.copyfile)
        (folder / "README.md").write_text(README)
    return {
        "folder": str(folder),
        "files": sum(f.is_file() for name in FOLDERS for f in (folder / name).rglob("*")) + 1,
    }
