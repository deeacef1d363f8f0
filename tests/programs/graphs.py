"""Programs that use autograd in other ways, hooks of their own, or modes of their own."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from tests.programs import backward, batch, grads, linear, program, scalar_net, tanh_net


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return Product.apply(x, self.weight)


@program()
def custom_function():
    module = Scale()
    x = batch().requires_grad_()
    return [*backward(module(x), module), x.grad]


@program()
def double_backward():
    model = scalar_net()
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (grad.norm() - 1).pow(2).backward()
    return [x.grad, *grads(model)]


@program()
def retain_graph_twice():
    model = tanh_net()
    loss = model(batch()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return grads(model)


@program()
def autograd_grad_only():
    model = tanh_net()
    return list(torch.autograd.grad(model(batch()).sum(), list(model.parameters())))


@program()
def hook_removed_during():
    layer = linear()
    handles = []

    def remove_itself(module, args, output):
        handles[0].remove()

    handles.append(layer.register_forward_hook(remove_itself))
    return backward(layer(layer(batch())), layer)


@program("Full backward hook is firing when gradients are computed with respect to")
def user_hooks_mix():
    model = tanh_net()
    seen = []
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(1))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    for p in model.parameters():
        p.register_hook(lambda grad: grad * 0.5)
    y = model(batch())
    y.register_hook(lambda grad: grad * 3)
    return [*backward(y, model), torch.tensor(len(seen))]


@program()
def saved_tensors_hooks_user():
    model = tanh_net()
    with torch.autograd.graph.save_on_cpu():
        y = model(batch())
    return backward(y, model)


@program()
def allow_mutation():
    model = tanh_net()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = model(batch())
        y.mul_(2)
        y.sum().backward()
    return [y, *grads(model)]


@program()
def user_dispatch_mode_flops():
    from torch.utils.flop_counter import FlopCounterMode

    model = scalar_net()
    with FlopCounterMode(display=False) as counter:
        result = backward(model(batch()), model)
    return [*result, torch.tensor(counter.get_total_flops())]


@program()
def user_counting_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.n += 1
            return op(*args, **(kwargs or {}))

    model = scalar_net()
    with Count() as count:
        result = backward(model(batch()), model)
    return [*result, torch.tensor(count.n)]


@program("Anomaly Detection has been enabled")
def anomaly_user():
    model = tanh_net()
    with torch.autograd.detect_anomaly():
        return backward(model(batch()), model)


@program()
def graph_freed_memory():
    model = tanh_net()
    outputs = []
    for _ in range(3):
        y = model(batch())
        outputs.append(weakref.ref(y))
        y.sum().backward()
        del y
    assert all(output() is None for output in outputs), "outputs kept alive"
    return grads(model)
