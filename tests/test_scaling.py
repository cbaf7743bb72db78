"""Bytes by formula are the bytes that torch.distributed is asked to send; FLOPs and predictions by hand."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import MINILM, ROOT, dit_ds
from scaling_worker import compare, configuration

from dit_ds.cli.entry import main
from dit_ds.engine.batch_split import BatchSplit, split_batch
from dit_ds.planning import flops, scaling
from dit_ds.planning.communication import Event, ModuleTrace, Transfer, communication_volume, count_fetches
from dit_ds.planning.gpus import known_gpu, peak_flops

# so small that the tiny model's layers are gathered again and again, and prefetched in part
TIGHT = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_max_reuse_distance": 100_000,
}
TWO_RANKS = [
    {"stage": 0, "accumulation": 2},
    {"stage": 1, "accumulation": 2, "bf16": True},
    {"stage": 2, "override": {"communication_data_type": "fp32"}, "bf16": True},
    {"stage": 2, "override": {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}}},
    {"stage": 3, "accumulation": 2},
    {"stage": 3, "freeze_text": False, "policy": "block", "override": {"zero_optimization": TIGHT}},
]
FOUR_RANKS = [
    {"stage": 2, "accumulation": 2},
    {"stage": 3, "freeze_text": False, "freeze_image": True, "policy": "block",
     "override": {"zero_optimization": TIGHT}},
    {"stage": 3, "accumulation": 2, "override": {"zero_optimization": TIGHT | {"zero_hpz_partition_size": 2}}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, TWO_RANKS[-1:]),
        pytest.param(2, TWO_RANKS[:-1], marks=pytest.mark.slow),
        pytest.param(4, FOUR_RANKS, marks=pytest.mark.slow),
    ],
)
def test_the_formula_is_what_is_sent(ranks, settings):
    """To the byte; the gradient norm's and overflow's single numbers come on top."""
    for got in compare(ranks, settings):
        assert got["formula"] == got["counted"], got["setting"]
        assert got["scalars"] <= 16, got["setting"]


def ds(stage: int, **zero) -> dict:
    return {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage, **zero}}


def test_a_ring_by_hand():
    """1000 trained elements and 24 frozen ones in bf16 on 4 ranks, two micro-batches."""
    trace = ModuleTrace([1000, 24], [True, False], [])
    sent = {s: sum(t.sent for t in communication_volume(trace, ds(s), 4, 2)) for s in (0, 1, 2)}
    ring = 2000 * 3 / 4
    assert sent == {0: 2 * ring, 1: 3 * ring, 2: 5 * ring}
    assert communication_volume(trace, ds(2), 1, 2) == []


def test_what_is_needed_again_soon_is_gathered_once():
    order = [(0,), (1,), (2,), (2,), (1,), (0,)]
    events = [Event(p[0], enters, i > 2, False, p) for i, p in enumerate(order) for enters in (True, False)]
    trace = ModuleTrace([100, 100, 100], [True] * 3, events)

    def times(reuse: int) -> list[int]:
        fetches, _ = count_fetches(trace, persistence_threshold=10, prefetch=0, max_live=10**9, max_reuse=reuse)
        return [sum(n for (p, _), n in fetches.items() if p == i) for i in range(3)]

    assert (times(0), times(1), times(201), times(401)) == ([2, 2, 2], [2, 2, 1], [2, 1, 1], [1, 1, 1])


@pytest.mark.slow
def test_flops_leave_random_numbers_alone_and_recomputation_adds_a_forward():
    """The ViT's layers are nearly all of a ViT-B's forward."""
    values = {"text": {"name": MINILM, "layers": 1, "random_init": True}, "data": {"image_size": 256}}
    config = configuration(1, 0).model_validate(values)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    model, plain = flops.step_flops(config), flops.hardware_flops(config)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 2.9 < model / plain.forward < 3.1
    config.train.activation_checkpointing = "block"
    recomputed = flops.hardware_flops(config)
    assert recomputed.forward == plain.forward
    assert 0.9 < (recomputed.backward - plain.backward) / plain.forward < 1


def test_gpus_go_by_the_names_that_cuda_gives():
    names = {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA A100-SXM4-80GB": "A100",
        "Tesla V100-PCIE-16GB": "V100 PCIe", "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA H200": "H200",
        "NVIDIA L40S": "L40S", "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "a toaster": None,
    }  # fmt: skip
    assert {name: known_gpu(name) for name in names} == names
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None


def test_a_prediction_by_hand():
    """One trained GB, all-reduced after the backward pass between 2 nodes of 2 GPUs at 10 GB/s inside, 1 between."""
    machine = scaling.Machine("A100", 2, link_gbit=8, intra_gb_s=10, mfu=0.5, overlap=1, latency_us=0)
    work = scaling.Work(0, flops.Passes(52 * 10**12, 104 * 10**12), ModuleTrace([5 * 10**8], [True]), ds(0),
                        torch.bfloat16, 8, 1)  # fmt: skip
    got = scaling.predict(work, machine, nodes=2, micro_batch=1, accumulation=2)
    assert got["compute_seconds"] == pytest.approx(2)  # 312 TFLOP at 156 a second
    assert got["gradients_seconds"] == pytest.approx(2 * (0.5 / 10 + 0.5 / 1))
    assert got["samples_per_second"] == pytest.approx(8 / 3.1)
    assert got["dominated_by"] == "compute"


def test_overlap_hides_no_more_than_its_share_of_the_pass():
    machine = scaling.Machine("A100", 1, link_gbit=8, mfu=0.5, overlap=0.5, latency_us=0)
    slow = Transfer("gradients", "all-reduce", 10**9, 1, 2, "backward", 1)
    assert scaling.seconds(slow, machine) == pytest.approx(1)
    assert scaling._exposed([slow], machine, {"backward": 1.0})["gradients"] == pytest.approx(0.5)
    assert scaling._exposed([slow], machine, {"backward": 9.0})["gradients"] == 0


def test_a_batch_is_divided_as_a_run_would():
    assert split_batch(64, 4, 8) == BatchSplit(8, 2, 4)
    assert split_batch(64, 16, 8) == BatchSplit(4, 1, 16)
    assert split_batch(96, 16, 4) == BatchSplit(3, 2, 16)
    assert split_batch(64, 128, 8) is None


SMALL = ["--config", ROOT / "configs/base.yaml", "--model.size", "vit_t", "--data.image_size", "64",
         "--text.layers", "1"]  # fmt: skip


@pytest.mark.slow
def test_the_command():
    """BERT-base's shape is known without a hub; 128 GPUs for a batch of 64 are marked."""
    done = json.loads(dit_ds("scaling", *SMALL, "--nodes", "1,2,16", "--json", real=True).stdout)
    assert done["predicted"] is True
    assert [r["gpus"] for r in done["rows"]] == [8, 16, 128]
    assert done["rows"][0]["fixed"]["efficiency"] == done["rows"][0]["grown"]["efficiency"] == 1
    assert done["rows"][2]["fixed"] is None
    assert done["rows"][2]["grown"]["batch"] == 16 * 64
    assert done["rows"][1]["grown"]["sent_bytes"] > done["rows"][0]["grown"]["sent_bytes"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "abacus"], "choose one of"),
        (["--gpu", "V100"], "no rate in bfloat16"),
        (["--mfu", "1.5"], "'1.5' is not a number above 0, up to 1"),
        (["--nodes", "0"], "each a whole number from 1 to 65536"),
        (["--link", "0"], "--link"),
        (["--deepspeed.config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_impossible_inputs_are_refused_in_a_line(capsys, options, says):
    assert main(["scaling", *map(str, SMALL), *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
