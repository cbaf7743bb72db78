"""From samples to batches: worker processes, and what they report."""

from __future__ import annotations

import copy
import functools
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from dit_ds.data.dataset import ExpressionDataset, Tokenize
from dit_ds.data.order import EvalBatches, TrainBatches
from dit_ds.errors import UserError


def collate(batch: dict[str, Any] | UserError) -> dict[str, Any] | UserError:
    """What the dataset makes of a list of items is a batch already."""
    return batch


def make_loader(dataset: ExpressionDataset, batches: TrainBatches | EvalBatches, workers: int, pin: bool) -> DataLoader:
    """A DataLoader over `batches`; iterate it through `checked`."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0 and isinstance(batches, TrainBatches),
        prefetch_factor=4 if workers else None,
        worker_init_fn=_quiet_worker,
        timeout=300 if workers else 0,
    )


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    # SLURM signals all processes of a task; the training process acts on these and ends its workers itself
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def checked(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The loader's batches.

    Raises:
        UserError: a worker met a damaged sample.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def make_tokenize(tokenizer: Any, length: int) -> Tokenize:
    """Expressions to `length` ids and a mask of the real ones, by a `transformers` tokenizer."""
    if not tokenizer.is_fast:
        return functools.partial(_tokenize_slowly, tokenizer, length)
    tokenizer = copy.deepcopy(tokenizer)  # whose settings stay those of `length`
    tokenizer("", padding="max_length", truncation=True, max_length=length)
    # what transformers wraps takes a quarter of the time
    return functools.partial(_tokenize, tokenizer.backend_tokenizer)


def _tokenize_slowly(tokenizer: Any, length: int, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(text, padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int64), np.array(encoded["attention_mask"], bool)


def _tokenize(backend: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    encoded = backend.encode(text)
    return np.array(encoded.ids, np.int64), np.array(encoded.attention_mask, bool)
