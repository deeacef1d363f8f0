"""Programs that reuse modules, change tensors in place or hand out views."""

from __future__ import annotations

from torch import nn

from tests.programs import backward, batch, grads, linear, program


@program()
def reuse_module():
    layer = linear()
    return backward(layer(layer(layer(batch()))), layer)


@program()
def inplace_relu():
    model = nn.Sequential(linear(), nn.ReLU(inplace=True), linear(), nn.Dropout(0.5, inplace=True))
    return backward(model(batch()), model)


@program()
def inplace_on_output():
    layer = linear()
    y = layer(batch())
    y.mul_(2)
    y += 1
    return backward(y, layer)


@program(raises=RuntimeError)
def residual_inplace():
    """Illegal as it is: the output that ReLU saved for backward is changed."""
    layer = linear()
    x = batch()
    y = nn.ReLU(inplace=True)(layer(x))
    y += x
    return backward(y, layer)


class FirstColumns(nn.Module):
    def forward(self, x):
        return x[:, :2]


class Flattened(nn.Module):
    def forward(self, x):
        return x.view(-1)


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, -1)


class AddsOneInPlace(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x


@program()
def view_out_then_inplace_base():
    layer = linear()
    base = layer(batch())
    view = FirstColumns()(base)
    base.mul_(3)
    (view.sum() + base.sum()).backward()
    return [view, base, *grads(layer)]


@program()
def view_out_inplace_view():
    layer = linear()
    base = layer(batch())
    view = Flattened()(base)
    view.mul_(3)
    base.sum().backward()
    return [view, base, *grads(layer)]


@program()
def chunk_outputs():
    layer = linear()
    a, b = Halves()(layer(batch()))
    (a * b).sum().backward()
    return [a, b, *grads(layer)]


@program()
def module_modifies_input():
    layer = linear()
    return backward(AddsOneInPlace()(layer(batch())), layer)


@program()
def pytree_identity():
    x = batch().requires_grad_()
    assert nn.Identity()(x) is x
    return [x]
