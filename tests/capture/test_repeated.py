from __future__ import annotations

import pytest
from torch import nn

from tensortrace.capture.repeated import repeated

A, B, C, R = (nn.Linear(2, 2) for _ in range(4))


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        ([A, B, C], []),
        ([A, A], [("0", 2)]),
        ([A] * 5, [("0", 5)]),
        ([A, B] * 2, [("0", 2), ("1", 2)]),
        ([C, *[A, R] * 3, B], [("1", 3), ("2", 3)]),
        # An activation before the first and after the last: it stands once more.
        ([C, R, *[A, R] * 2, B], [("1", 3), ("2", 2)]),
        ([A, B, A], []),
        ([A, B, C, B, A], []),
        ([A, R, B, R, C, R], []),
        ([A, A, B, A], []),
        ([A, B, B, C], [("1", 2)]),
        ([], []),
    ],
)
@pytest.mark.parametrize("container", [nn.ModuleList, lambda every: nn.Sequential(*every)])
def test_what_is_put_there_by_a_product_is_listed(container, children, expected):
    module = container(children)
    assert list(repeated(module, module)) == expected


def test_keys_of_a_dict_are_names():
    module = nn.ModuleDict({"first": A, "second": A, "last": B})
    assert list(repeated(module, module)) == [("first", 2)]


def test_other_modules_share_on_purpose():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = A

    tied = Tied()
    assert list(repeated(tied, tied)) == []


def test_what_has_a_name_of_its_own_is_shared_on_purpose():
    root = nn.Module()
    root.layers = nn.ModuleList([A] * 3)
    assert list(repeated(root.layers, root)) == [("0", 3)]
    root.layer = A
    assert list(repeated(root.layers, root)) == []
