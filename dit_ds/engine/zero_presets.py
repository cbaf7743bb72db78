"""ZeRO settings worth comparing, by name."""

from __future__ import annotations

from typing import Any

_STAGE_1_OR_2 = {
    "reduce_bucket_size": 25_000_000,
    "allgather_bucket_size": 25_000_000,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_scatter": True,
}


_STAGE_3 = {
    "reduce_bucket_size": 25_000_000,
    "stage3_prefetch_bucket_size": 40_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 50_000_000,
    "overlap_comm": True,
    "contiguous_gradients": True,
}


_HOST = {"device": "cpu", "pin_memory": True}


# `zero_optimization` of configs/deepspeed/NAME.json
SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1} | _STAGE_1_OR_2,
    "zero2": {"stage": 2} | _STAGE_1_OR_2,
    "zero2_offload": {"stage": 2} | _STAGE_1_OR_2 | {"offload_optimizer": _HOST},
    "zero3": {"stage": 3} | _STAGE_3,
    "zero3_offload": {"stage": 3} | _STAGE_3 | {
        "sub_group_size": 100_000_000, "offload_optimizer": _HOST, "offload_param": _HOST
    },
}  # fmt: skip
