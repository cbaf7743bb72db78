"""Which ranks are on which node, and which node's disk has the copies of which rank's part."""

from __future__ import annotations

import os
import socket

from dit_ds.distributed import gather_objects


def node_name() -> str:
    """This process's node: SLURM's name for it, else the host's with torchrun's number of it."""
    env = os.environ
    return env.get("SLURMD_NODENAME") or f"{socket.gethostname()}/{env.get('GROUP_RANK', '0')}"


def ranks_by_node() -> dict[str, list[int]]:
    """The ranks of each node, in the order of their first ones. Collective."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(gather_objects(node_name())):
        nodes.setdefault(name, []).append(rank)
    return nodes


def copy_holders(nodes: dict[str, list[int]]) -> dict[int, int]:
    """For each rank the one that keeps a copy of its part: on the next node, which is another one. None on one node."""
    groups = list(nodes.values())
    if len(groups) < 2:
        return {}
    following = groups[1:] + groups[:1]
    return {
        rank: there[i % len(there)]
        for here, there in zip(groups, following, strict=True)
        for i, rank in enumerate(here)
    }
