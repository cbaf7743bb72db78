"""What a command says on stderr begins at the start of a line, whatever bar is being drawn there."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from conftest import environment

# a command that draws a bar within a bar, logs, and fails in the middle
SCRIPT = """
import argparse, logging, os, sys, time
from dit_ds.cli import entry, runs
from dit_ds.errors import UserError
from dit_ds.data.progress import progress_bar

def train(args):
    log = logging.getLogger("dit_ds")
    outer = progress_bar(desc="train", total=6, mininterval=0, miniters=1)
    for step in range(3):
        for _ in progress_bar(range(4), "evaluate", mininterval=0, miniters=1, leave=False):
            log.info(f"step {step}: mIoU 0.5")
        outer.set_postfix(loss=0.5)
        outer.update()
    failing = progress_bar(range(3), "failing")
    next(iter(failing))
    raise UserError("the disk\\nis full")

runs._train = train
sys.exit(entry.main(["train", "--config", "x"]))
"""


def test_in_a_log_every_line_is_whole():
    """As slurm/common.sh looks for it: grep '^dit-ds.*error: '."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2 and "\r" not in done.stderr and "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if "error: " in line] == ["dit-ds: error: the disk is full"]
    assert [line for line in lines if "mIoU" in line] == [f"step {s}: mIoU 0.5" for s in range(3) for _ in range(4)]
    bars = [line for line in lines if line.startswith(("train:", "evaluate:", "failing:"))]
    assert bars and len(bars) + 13 == len(lines) < 30  # one in 30 seconds, and the last


def test_stdout_has_the_result_alone():
    """DeepSpeed, for one, prints some of its warnings there."""
    chatty = """
import logging, sys
from dit_ds.cli import entry, runs
from dit_ds.cli.output import report

def train(args):
    print("a library's warning")
    logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({"msg": "and one by a logger"}))
    report(args, {"step": 3})
    print("and another one")
    return 0

runs._train = train
status = entry.main(["train", "--config", "x", "--json"])
print("as before")
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", chatty], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout) == (0, '{"step": 3}\nas before\n')
    assert done.stderr == "a library's warning\nand one by a logger\nand another one\n"


def test_on_a_terminal_lines_push_the_bar_down():
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment())
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 2
    for line in (b"dit-ds: error: the disk is full\r\n", b"step 2: mIoU 0.5\r\n"):
        before = seen[: seen.index(line)]
        # the cursor stands at the start of a line that is empty, or was wiped
        assert before.endswith((b"\r", b"\n", b"\x1b[A", b"\x1b[K")), before[-80:]


@pytest.mark.fast
def test_a_bar_is_tqdms(capsys):
    from dit_ds.data.progress import progress_bar, write_line

    assert list(progress_bar(range(3), "count")) == [0, 1, 2]
    write_line("a line")
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "a line" and any("3/3" in line for line in said[:-1])
