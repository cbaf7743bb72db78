"""`dit-ds ARGS` on a rank that has one error of the network while it receives another rank's part.

python tests/local_saves_worker.py RANK ARGS
"""

from __future__ import annotations

import os
import sys

from dit_ds.checkpointing.exchange import Exchange
from dit_ds.cli.entry import main

number = Exchange._number
calls = 0


def broken_once(self: Exchange, rank: int) -> int:
    global calls
    calls += 1
    if calls == 3:  # the second checkpoint's size; the first one's and its record's came before
        raise ConnectionError("reset by the test")
    return number(self, rank)


if os.environ["RANK"] == sys.argv[1]:
    Exchange._number = broken_once
sys.argv[1:] = sys.argv[2:]
sys.exit(main())
