"""The process in which one question is answered; nothing here may have been done before in it."""

from __future__ import annotations

import logging
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the answer is the same where there is a GPU, and takes nothing of it
os.environ["DS_ACCELERATOR"] = "cpu"


from dit_ds import engine as ds
from dit_ds.flops import count_flops, offline_text
from dit_ds.memory.fake import fake_cluster, fake_tensors
from dit_ds.memory.ledger import Ledger, Profile
from dit_ds.memory.predict import Answer, Question, on_gpu
from dit_ds.memory.step import Steps

_TRIES = 12  # micro-batches looked at in a search; it ends long before


def answer(question: Question) -> Answer:
    """Build the run on fake tensors and take its steps."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    config = on_gpu(question.config)
    sizes = question.micro_batches or (ds.deepspeed_config(config, question.ranks)["train_micro_batch_size_per_gpu"],)
    ledger = Ledger(host=lambda x: x.device.type == "cpu")
    with offline_text(config), fake_cluster(question.ranks) as world, fake_tensors(ledger):
        steps = Steps(config, world, ledger)
        steps.warm_up()
        profiles = {b: steps.take(b) for b in sizes}
        parameters = list(steps.engine.module.parameters())
        counts = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        trained = sum(n for n, p in zip(counts, parameters) if p.requires_grad)
        largest = None if question.capacity is None else _largest(steps, profiles, question.capacity)
        flops = None
        if question.flops:
            with count_flops() as counter:
                steps.take(1)
            flops = counter.get_total_flops() // min(2, steps.engine.gradient_accumulation_steps())
    return Answer(profiles, sum(counts), trained, largest, flops)


def _largest(steps: Steps, profiles: dict[int, Profile], capacity: int) -> int:
    """The largest micro-batch that fits.

    A peak over micro-batches is the largest of several lines, so it is convex: what a line through two of its points
    says beyond them is too little, and between them too much. Mostly it is one line, and the first guess right.
    """

    def peak(b: int) -> int:
        if b not in profiles:
            profiles[b] = steps.take(b)
        return profiles[b].peak

    known = sorted(profiles)
    low = next((b for b in reversed(known) if peak(b) <= capacity), 0)
    high = next((b for b in known if peak(b) > capacity), 0)
    if not low:
        low = int(peak(1) <= capacity)
        if not low:
            return 0
    below = 2 if low == 1 else low // 2  # another point for the line
    peak(below)
    if below > low and peak(below) <= capacity:
        low, below = below, low
    for _ in range(_TRIES):
        if high == low + 1:
            break
        other = high or below
        slope = max(1.0, (peak(other) - peak(low)) / (other - low))
        guess = low + int((capacity - peak(low)) / slope)
        if high:
            guess = min(max(guess, low + 1), high - 1)
        elif guess == low:
            break
        if peak(guess) <= capacity:
            low, below = guess, low
        else:
            high = guess
    return low
