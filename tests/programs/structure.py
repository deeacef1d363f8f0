"""Programs whose modules take and return unusual things, or are unusual themselves."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.programs import backward, batch, grads, linear, program, tanh_net


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, *, x, mask=None):
        return self.layer(x) * mask


@program()
def kwargs_only():
    module = Masked()
    return backward(module(x=batch(), mask=torch.ones(3, 1)), module)


@dataclasses.dataclass
class Pair:
    a: Tensor
    b: Any = None


class NamedPair(NamedTuple):
    a: Tensor
    b: Tensor


class TupleOfOneArgument(tuple):
    __slots__ = ()

    def __new__(cls, items):
        return super().__new__(cls, items)


class Returns(nn.Module):
    """Return what `make` builds of the output of a linear layer and its double."""

    def __init__(self, make):
        super().__init__()
        self.layer = linear()
        self.make = make

    def forward(self, x):
        y = self.layer(x)
        return self.make(y, y * 2)


def returned(make, unpack):
    module = Returns(make)
    tensors = unpack(module(batch()))
    sum(t.sum() for t in tensors).backward()
    return [*tensors, *grads(module)]


@program()
def out_dict():
    return returned(lambda a, b: {"a": a, "b": [b]}, lambda out: [out["a"], out["b"][0]])


@program()
def out_dataclass():
    return returned(Pair, lambda out: [out.a, out.b])


@program()
def out_namedtuple():
    return returned(NamedPair, lambda out: [out.a, out.b])


@program()
def out_tuple_subclass():
    return returned(lambda a, b: TupleOfOneArgument((a, b)), list)


@program()
def out_structseq_max():
    return returned(lambda a, _: a.max(dim=1), lambda out: [out.values])


@program()
def out_list():
    return returned(lambda a, b: [a, b, None, 3], lambda out: out[:2])


@program(package="transformers")
def out_modeloutput():
    from transformers.utils import ModelOutput

    @dataclasses.dataclass
    class PairOutput(ModelOutput):
        a: Tensor | None = None
        b: Tensor | None = None

    return returned(PairOutput, lambda out: [out.a, out.b])


class ReturnsNoTensor(nn.Module):
    def forward(self, x):
        return "s", None, 3


@program()
def no_tensor_output():
    ReturnsNoTensor()(torch.randn(2))
    return []


class TakesNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, n=2):
        return self.weight * n


@program()
def non_tensor_input():
    module = TakesNumber()
    first = module(3)
    first.sum().backward()
    return [first, *backward(module(), module)]


class CallsItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x, depth=3):
        return self.layer(x) if depth == 0 else self(x, depth - 1).tanh()


@program()
def recursive_module():
    module = CallsItself()
    return backward(module(batch()), module)


@program()
def cyclic_module():
    module = nn.Sequential(linear())
    object.__setattr__(module, "me", module)
    module.__dict__["others"] = [module]
    return backward(module(batch()), module)


class Unhashable(nn.Module):
    __hash__ = None  # type: ignore[assignment]

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def __eq__(self, other):
        return True

    def forward(self, x):
        return x * self.weight


class HoldsUnhashable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()
        self.__dict__["hidden"] = Unhashable()

    def forward(self, x):
        return self.hidden(self.layer(x))


@program()
def unhashable_module():
    module = HoldsUnhashable()
    return backward(module(batch()), module)


class YieldsOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x)
            yield x


@program()
def generator_forward():
    module = YieldsOutputs()
    outputs = list(module(batch()))
    outputs[-1].sum().backward()
    return [*outputs, *grads(module)]


@program()
def module_deleted_mid():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    hidden = model[0](batch())
    del model[0]
    gc.collect()
    y = model(hidden)
    y.sum().backward()
    return [y]


@program()
def lazy_modules():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    return backward(model(batch()), model)


@program()
def parametrize_wn_spectral():
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    model = nn.Sequential(weight_norm(linear()), spectral_norm(linear()))
    return backward(model(batch()), model)


@program()
def deepcopy_pickle_traced():
    model = tanh_net()
    y = model(batch())
    y.sum().backward()
    twin = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    restored = pickle.loads(pickle.dumps(model))
    z = twin(batch())
    z.sum().backward()
    torch.save({"output": y.detach(), "state": model.state_dict()}, io.BytesIO())
    return [z, *grads(twin), restored(batch())]


@program()
def pickle_nonleaf_output():
    y = nn.Sequential(linear())(batch())
    torch.save(y, io.BytesIO())
    return [y]


@program()
def deepcopy_params_mid():
    layer = linear()
    y = layer(batch())
    twin = copy.deepcopy(layer.weight)
    torch.save(layer, io.BytesIO())
    copy.deepcopy(layer)
    assert twin._backward_hooks is None, twin._backward_hooks
    y.sum().backward()
    return [twin]
