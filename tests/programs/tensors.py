"""Programs with tensors that are not plain: sparse, quantized, nested, fake, subclasses."""

from __future__ import annotations

import torch
from torch import nn

from tests.programs import backward, batch, grads, linear, program, relu_net

NESTED = r"The PyTorch API of nested tensors is in prototype stage"
QUANTIZED = r"torch\.quantize_per_tensor, .* are deprecated"


@program()
def sparse_embedding():
    embedding = nn.Embedding(10, 4, sparse=True)
    y = embedding(torch.tensor([1, 2, 2]))
    y.sum().backward()
    return [y, embedding.weight.grad.to_dense()]


class SparseProduct(nn.Module):
    def forward(self, x):
        return torch.sparse.mm(x, torch.ones(4, 2)), x.to_sparse_csr()


@program("Sparse CSR tensor support is in beta state")
def sparse_tensors():
    product, compressed = SparseProduct()(batch().relu().to_sparse())
    return [product, compressed.to_dense()]


class Quantize(nn.Module):
    def forward(self, x):
        return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


@program(QUANTIZED)
def quantized():
    return [Quantize()(batch()).dequantize()]


@program(QUANTIZED, "torch.ao.quantization is deprecated")
def quant_dynamic():
    model = torch.ao.quantization.quantize_dynamic(relu_net(), {nn.Linear}, dtype=torch.qint8)
    return [model(batch())]


@program()
def complex_mod():
    layer = nn.Linear(4, 4, dtype=torch.complex64)
    y = layer(torch.randn(3, 4, dtype=torch.complex64)).conj() * 2
    y.abs().sum().backward()
    return [y, *grads(layer)]


@program(NESTED)
def nested_tensor_strided():
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    return [linear()(x).to_padded_tensor(0.0)]


@program(NESTED)
def nested_jagged():
    x = torch.nested.nested_tensor(
        [torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged, requires_grad=True
    )
    model = relu_net()
    return backward(model(x).values(), model)


@program()
def meta_model():
    with torch.device("meta"):
        model = relu_net()
    model(torch.empty(3, 4, device="meta")).sum().backward()
    return []


@program()
def fake_mode():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = relu_net()
        model(batch()).sum().backward()
    return []


class PlainSubclass(torch.Tensor):
    pass


@program()
def tensor_subclass():
    layer = linear()
    y = layer(batch().as_subclass(PlainSubclass))
    y.sum().backward()
    return [y.as_subclass(torch.Tensor), *grads(layer)]


@program()
def wrapper_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    model = relu_net()
    y = model(TwoTensor(batch(), batch()))
    y.sum().backward()
    return [y.a, y.b]


@program()
def logging_tensor_subclass():
    from torch.testing._internal.logging_tensor import LoggingTensor

    return [linear()(LoggingTensor(batch())).elem]


class ToFloat8(nn.Module):
    def forward(self, x):
        return x.to(torch.float8_e4m3fn)


@program()
def fp8():
    return [ToFloat8()(batch()).float()]


@program()
def zero_size():
    layer = linear()
    return backward(layer(torch.randn(0, 4)), layer)
