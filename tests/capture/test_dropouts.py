from __future__ import annotations

import functools
import linecache
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import dropout, dropout2d

from tensortrace.capture.dropouts import dropout_line

_options = {"p": 0.5}


class Named(nn.Module):
    def forward(self, x):
        return dropout(x)  # found


class InFull(nn.Module):
    def forward(self, x):
        for _ in range(2):
            x = x * 2
            x = torch.nn.functional.dropout2d(x, 0.5, inplace=False)  # found
        if x.ndim:
            return x
        return x


class Nested(nn.Module):
    def forward(self, x):
        return x + nn.functional.dropout(
            dropout2d(x * 2), 0.3  # found
        )  # fmt: skip


class Positional(nn.Module):
    def forward(self, x):
        return dropout(x, 0.5, x.requires_grad)


class Unpacked(nn.Module):
    def forward(self, x):
        return F.dropout(x, **_options)


class Starred(nn.Module):
    def forward(self, *given):
        return F.dropout(*given)


class AlphaIsOffByDefault(nn.Module):
    def forward(self, x):
        return F.alpha_dropout(x)


class Another(nn.Module):
    """Has a function of that name that is none of torch's."""

    def dropout(self, x):
        return x

    def forward(self, x):
        return self.dropout(x)


class Guarded(nn.Module):
    def forward(self, x):
        return F.dropout(x) if self.training else x


class Wrapped(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.dropout(x)


class Partial(nn.Module):
    forward = functools.partial(F.dropout, p=0.5)


class OfAConfig(nn.Module):
    def __init__(self, share=0.1):
        super().__init__()
        self.config = types.SimpleNamespace(dropout=share)

    def forward(self, x):
        return F.dropout(x, p=self.config.dropout)  # found


class Off(OfAConfig):
    def __init__(self):
        super().__init__(0.0)


class Computed(nn.Module):
    def forward(self, x):
        return F.dropout(x, p=0.2 if x.requires_grad else 0.0)


class ByArgument(nn.Module):
    def forward(self, x, train=True):
        if train:
            x = F.dropout(x, 0.2)
        return x


class Chosen(nn.Module):
    def forward(self, x, deterministic=False):
        return x if deterministic else F.dropout(x)


class ReturnsBefore(nn.Module):
    def forward(self, x):
        if not torch.is_grad_enabled():
            return x
        return F.dropout(x)


class LeavesOut(nn.Module):
    def forward(self, x):
        for part in range(2):
            if part:
                continue
            x = F.dropout(x)
        return x


class Shadowed(nn.Module):
    def forward(self, x):
        dropout = nn.Dropout()
        return dropout(x)


class AsksByName(nn.Module):
    def forward(self, x):
        x = F.dropout(x)
        return x if getattr(self, "training") else x / 2  # noqa: B009


class Later(nn.Module):
    def forward(self, x):
        def drop():
            return F.dropout(x)

        return drop() if x.requires_grad else x


class Inherited(Named):
    pass


@pytest.mark.parametrize("make", [Named, InFull, Nested, Inherited, OfAConfig])
def test_the_line_is_that_of_the_call(make):
    code, line = dropout_line(make())
    text = linecache.getline(__file__, line).rstrip()
    assert code is make.forward.__code__
    assert text.endswith("# found") or "nn.functional.dropout(" in text


@pytest.mark.parametrize("make", [
    Positional, Unpacked, Starred, AlphaIsOffByDefault, Another, Guarded, Wrapped, Partial, Off,
    Computed, ByArgument, Chosen, ReturnsBefore, LeavesOut, Shadowed, AsksByName, Later,
])  # fmt: skip
def test_what_may_be_off_or_know_of_the_mode_is_left_out(make):
    assert dropout_line(make()) is None


def test_torch_knows_of_the_mode():
    for module in (nn.Dropout(), nn.MultiheadAttention(4, 1), nn.TransformerEncoderLayer(4, 1)):
        assert dropout_line(module) is None


def test_code_without_text_is_left_out():
    space = {"F": F}
    exec("def forward(self, x): return F.dropout(x)", space)
    made = type("Made", (nn.Module,), {"forward": space["forward"]})
    assert dropout_line(made()) is None


def test_a_forward_of_the_object_is_not_that_of_its_class():
    module = Named()
    module.forward = types.MethodType(lambda self, x: x, module)
    assert dropout_line(module) is None
