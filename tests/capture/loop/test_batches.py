from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tensortrace.capture.loop.batches import Batches


class Epoch:
    """Stands for an iterator of a loader."""


def rows(*numbers: int, long: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One row for each number, made from it alone and never constant."""
    base = torch.arange(long, dtype=torch.float64)
    return torch.stack([torch.sin(base * n + n) for n in numbers]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("long", [32, 5000])
def test_rows_are_counted_within_a_batch_and_against_those_before(
    long: int, dtype: torch.dtype
) -> None:
    batches, epoch = Batches(), Epoch()

    def told(*numbers: int) -> Any:
        return batches.repeated(epoch, (rows(*numbers, long=long, dtype=dtype), "name"))

    assert told(1, 2, 3) is None
    assert told(4, 4, 4, 5) == {"rows": 4, "within": 2, "earlier": 0}
    assert told(1, 6, 5) == {"rows": 3, "within": 0, "earlier": 2}


def test_new_iterator_is_a_new_epoch_and_old_batches_are_forgotten() -> None:
    batches, epoch = Batches(), Epoch()
    assert batches.repeated(epoch, rows(1, 2)) is None
    assert batches.repeated(Epoch(), rows(1, 2)) is None
    for i in range(8):
        assert batches.repeated(epoch, rows(10 + i)) is None
    assert batches.repeated(epoch, rows(1, 2)) is None


@pytest.mark.parametrize(
    "batch",
    [
        rows(1, 1, long=31),
        torch.ones(4, 64),
        torch.ones(4, 64, dtype=torch.long),
        torch.randn(64),
        torch.empty(0, 64),
        "text",
        None,
    ],
)
def test_short_rows_padding_words_and_no_tensors_are_left_out(batch: Any) -> None:
    assert Batches().repeated(Epoch(), batch) is None


def test_nothing_is_kept_alive() -> None:
    batches, epoch, batch = Batches(), Epoch(), rows(1, 2)
    batches.repeated(epoch, batch)
    gone = [weakref.ref(epoch), weakref.ref(batch)]
    del epoch, batch
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
