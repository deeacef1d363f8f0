"""Programs with threads, coroutines, workers, exceptions and nested traces."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.programs import backward, batch, grads, linear, program, tanh_net


def in_threads(work, count):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@program()
def dataparallel_threads():
    models = [tanh_net() for _ in range(3)]
    inputs = [batch() for _ in range(3)]
    outputs = [None] * 3
    grad_enabled = torch.is_grad_enabled()

    def work(i):
        torch.set_grad_enabled(grad_enabled)
        outputs[i] = models[i](inputs[i])

    in_threads(work, 3)
    sum(y.sum() for y in outputs).backward()
    return [*outputs, *grads(*models)]


@program()
def backward_other_thread():
    model = tanh_net()
    loss = model(batch()).sum()
    in_threads(lambda _: loss.backward(), 1)
    return grads(model)


@program()
def hogwild_threads():
    model = tanh_net()
    model.share_memory()
    inputs = [batch() for _ in range(4)]
    results = [[]] * 4

    def work(i):
        loss = model(inputs[i]).sum()
        results[i] = list(torch.autograd.grad(loss, list(model.parameters())))

    in_threads(work, 4)
    return results


@program()
def async_functions():
    model = tanh_net()
    inputs = [batch() for _ in range(3)]

    async def one(x):
        hidden = model[0](x)
        await asyncio.sleep(0)
        return model[1](hidden)

    async def all_of_them():
        return await asyncio.gather(*map(one, inputs))

    outputs = asyncio.run(all_of_them())
    sum(y.sum() for y in outputs).backward()
    return [*outputs, *grads(model)]


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer = linear()
        self.error = error

    def forward(self, x):
        self.layer(x)
        raise self.error


class Recovers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Fails(ValueError("boo"))
        self.second = linear()

    def forward(self, x):
        with contextlib.suppress(ValueError):
            self.first(x)
        return self.second(x)


class Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Fails(KeyboardInterrupt())
        self.second = linear()

    def forward(self, x):
        return self.second(self.first(x))


@program()
def exception_caught_in_block():
    module = Recovers()
    return backward(module(batch()), module)


@program()
def kbdint_caught_in_block():
    module = Interrupted()
    with contextlib.suppress(KeyboardInterrupt):
        module(batch())
    layer = linear()
    return backward(layer(batch()), layer)


@program(raises=ValueError)
def exception_leaves_block():
    """The one program that is not in the list of situations: the exception must come through."""
    return [Fails(ValueError("boo"))(batch())]


@program()
def nested_trace(trace):
    model = tanh_net()
    with trace():
        y = model(batch())
    return backward(y, model)


@program()
def dataloader_workers():
    layer = linear()
    echo = linear()

    def collate(rows):
        with torch.no_grad():
            return echo(torch.stack(rows)) * 0 + torch.stack(rows)

    data = torch.arange(24.0).view(6, 4)
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)
    outputs = [layer(x) for x in loader]
    sum(y.sum() for y in outputs).backward()
    return [*outputs, *grads(layer)]
