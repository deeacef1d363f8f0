"""Programs under torch.jit, torch.fx, torch.export, torch.compile and torch.func."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call

from tests.programs import (
    backward,
    batch,
    grads,
    linear,
    program,
    relu_net,
    scalar_net,
    tanh_net,
)

JIT = r"`torch\.jit\.\w+` (is|has been) deprecated"


@program(JIT)
def jit_script():
    model = torch.jit.script(relu_net())
    return backward(model(batch()), model)


@program(JIT)
def jit_trace_inside():
    net = relu_net()
    x = batch()
    model = torch.jit.trace(net, x)
    return backward(model(x), net)


@program(JIT)
def jit_script_inside():
    return [torch.jit.script(relu_net())(batch())]


@program()
def fx_trace_inside():
    return [torch.fx.symbolic_trace(relu_net())(batch())]


@program()
def export_inside():
    x = batch()
    return [torch.export.export(relu_net(), (x,)).module()(x)]


def three_layers():
    torch._dynamo.reset()
    return nn.Sequential(linear(), nn.ReLU(), linear())


@program()
def compile_eager_backend():
    model = three_layers()
    return backward(torch.compile(model, backend="aot_eager")(batch()), model)


@program()
def compile_fullgraph():
    model = three_layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return backward(compiled(batch()), model)


@program("flex_attention called without torch.compile")
def flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    return [flex_attention(q, q, q)]


def sin_or_cos(x):
    return torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))


@program()
def hop_cond():
    torch._dynamo.reset()
    return [torch.compile(sin_or_cos, backend="eager")(torch.randn(3))]


@program()
def func_grad():
    model = scalar_net()
    x = batch()

    def loss(parameters):
        return functional_call(model, parameters, (x,)).sum()

    return list(torch.func.grad(loss)(dict(model.named_parameters())).values())


@program()
def func_vmap():
    return [torch.func.vmap(scalar_net())(torch.randn(5, 3, 4))]


@program()
def func_per_sample_grad():
    model = scalar_net()

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return list(per_sample(dict(model.named_parameters()), torch.randn(5, 4)).values())


@program(JIT)
def func_jacrev_hessian():
    model = tanh_net()
    return [
        torch.func.jacrev(model)(torch.randn(4)),
        torch.func.hessian(lambda x: model(x).sum())(torch.randn(4)),
        torch.func.jvp(model, (torch.randn(4),), (torch.randn(4),))[1],
    ]


@program()
def functional_call_ensemble():
    models = [linear() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    return [torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, batch())]


@program(JIT)
def forward_ad():
    import torch.autograd.forward_ad as dual

    model = tanh_net()
    with dual.dual_level():
        x = dual.make_dual(batch(), batch())
        return [dual.unpack_dual(model(x)).tangent]


@program()
def autograd_functional_jac():
    model = tanh_net()
    return [
        torch.autograd.functional.jacobian(model, batch()),
        torch.autograd.functional.hessian(lambda x: model(x).sum(), batch()),
    ]


@program()
def grad_batched():
    model = tanh_net()
    y = model(batch()).sum(0)
    return list(
        torch.autograd.grad(y, model[0].weight, torch.eye(4), is_grads_batched=True)
    ) + grads(model)
