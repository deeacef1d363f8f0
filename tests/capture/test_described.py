"""Described tensors: what the fast way says is what the careful way says."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
import torch

from tensortrace.capture.stats.queue import Stats, StatsQueue
from tensortrace.capture.tensors import Head, Tail, TensorDraft, TensorTable, describe
from tensortrace.records import Tensor


def test_the_fields_of_a_tensor_are_in_the_order_in_which_they_are_given() -> None:
    names = [field.name for field in msgspec.structs.fields(Tensor)]
    head, tail = len(get_args(Head)), len(get_args(Tail))
    assert names[:head] == [
        "id", "shape", "stride", "dtype", "device", "requires_grad", "is_leaf", "grad_fn", "numel",
    ]  # fmt: skip
    stats = head + len(Stats._fields)
    assert tuple(names[head:stats]) == Stats._fields
    assert names[stats : stats + tail] == ["grad_of", "previous", "view_of", "from_step"]
    assert names[stats + tail :] == ["units", "dead", "dead_since", "row_spread"]


A = torch.arange(6.0).reshape(2, 3)
TENSORS = {
    "plain": A,
    "needs grad": A.clone().requires_grad_(),
    "made": A.clone().requires_grad_() * 2,
    "view": A[0],
    "not contiguous": A.t(),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "half": A.half(),
    "integers": torch.arange(4),
    "complex": torch.complex(A, A),
    "parameter": torch.nn.Parameter(A.clone()),
    "buffer": torch.nn.Buffer(A.clone()),
    "sparse": A.to_sparse(),
    "meta": torch.empty(2, 3, device="meta"),
    "expanded": torch.ones(1).expand(5),
}


@pytest.mark.parametrize("name", TENSORS)
def test_the_fast_description_is_the_careful_one(name: str) -> None:
    tensor = TENSORS[name]
    queue = StatsQueue()
    number, draft = TensorTable(queue).identify(tensor)
    assert isinstance(draft, TensorDraft)
    queue.resolve()
    told = msgspec.structs.asdict(draft.record())
    expected = msgspec.structs.asdict(Tensor(**describe(tensor, number)))
    described = [field for field in expected if field not in Stats._fields]
    assert {f: told[f] for f in described} == {f: expected[f] for f in described}
