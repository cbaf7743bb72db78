"""Over which smaller numbers of nodes the batch of a run divides, for ELASTIC: one a line, the largest first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from dit_ds.config.load import load_config
from dit_ds.engine.deepspeed_json import deepspeed_config
from dit_ds.errors import UserError


def main() -> int:
    """`node_counts.py NODES TASKS_PER_NODE` and the arguments of `dit-ds train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", type=int)
    parser.add_argument("tasks", type=int)
    parser.add_argument("--config", required=True)
    for flag in ("--resume", "--json"):
        parser.add_argument(flag, action="store_true")
    args, overrides = parser.parse_known_args()
    refused, counts = None, []
    try:
        config = load_config(args.config, overrides)
        for nodes in range(args.nodes - 1, 0, -1):
            try:
                deepspeed_config(config, nodes * args.tasks)
                counts.append(nodes)
            except UserError as e:
                refused = refused or e
        if not counts and refused:
            raise UserError(f"ELASTIC=1, but with fewer than {args.nodes} nodes {refused}")
    except UserError as e:
        print(f"node_counts: error: {e}", file=sys.stderr)
        return 2
    print("\n".join(map(str, counts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
