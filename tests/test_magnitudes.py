from __future__ import annotations

import math

import pytest

from tensortrace.magnitudes import counts_of, lower_end, share_from
from tests.builders import make_tensor


def counts(**ranges):
    """`counts(r3=5)`: five elements in range 3."""
    return tuple(ranges.get(f"r{i}", 0) for i in range(16))


def test_ranges_adjoin_from_zero_to_infinity():
    assert [lower_end(i) for i in (0, 1, 2, 3, 12, 15, 16)] == [
        0, 2.0**-32, 2.0**-28, 2.0**-24, 2.0**12, 2.0**24, math.inf
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "share"),
    [
        (2.0**-20, (0.75, 0.75)),  # where range 4 begins
        (2.0**-21, (0.75, 1.0)),  # inside range 3
        (2.0**-19, (0.5, 0.75)),
        (2.0**-24, (1.0, 1.0)),
        (0.0, (1.0, 1.0)),
        (1e30, (0.0, 0.25)),
        (-1.0, (1.0, 1.0)),
    ],
)
def test_share_is_known_up_to_one_range(limit, share):
    assert share_from(counts(r3=1, r4=1, r9=1, r15=1), limit) == share


@pytest.mark.parametrize(
    "wrong", [None, (), (1,), (1,) * 15, (1,) * 17, (0,) * 16, (-1, *[5] * 15), (1,) * 100_000]
)
def test_what_is_no_such_counts_is_none(wrong):
    assert counts_of(make_tensor(1, 64, exponents=wrong)) is None


def test_counts_of_any_length_of_digits_have_shares():
    huge = counts_of(make_tensor(1, 64, exponents=counts(r3=10**400, r4=10**400)))
    assert huge is not None
    assert share_from(huge, 2.0**-20) == (0.5, 0.5)
