"""What source lines cost, beside the tools that they are built on, in interleaved pairs.

Each pair runs a function as it is and traced right after each other, in CPU time of this process;
every other pair the other way round. What is stated is the median of the ratios with its quartiles.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.benchmarks.measure import hush

Function = Callable[[], object]
_TURNS = 200


def _tensor_loop() -> Function:
    weight, start, head = torch.randn(64, 64) / 8, torch.randn(64, 64), nn.Linear(64, 1)

    def tensor_loop() -> torch.Tensor:
        x = start
        for _ in range(_TURNS):
            y = x @ weight
            x = torch.tanh(y)
        return head(x)  # with a module in it the call is a step, whose records are finished

    return tensor_loop


def _plain_loop() -> Function:
    def plain_loop() -> int:
        total = 0
        seen: list[int] = []
        for i in range(_TURNS):
            total += i * i
            if i % 50 == 0:
                seen.append(total)
        return total + len(seen)

    return plain_loop


def _training() -> Function:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    inputs, labels = torch.randn(256, 256), torch.randint(0, 10, (256,))

    def training() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            output = net(inputs)
            loss = nn.functional.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()

    return training


def _traced(**options: Any) -> Callable[[Function], Function]:
    from tensortrace import trace

    # The decorator gets the records, so that no disk takes part.
    return trace(out=lambda record: None, every=1, **options)


def _pysnooper(function: Function) -> Function:
    import pysnooper

    traced: Function = pysnooper.snoop(io.StringIO())(function)
    return traced


def _torchsnooper(function: Function) -> Function:
    from tensortrace.capture.lines.tensor_words import import_torchsnooper

    traced: Function = import_torchsnooper().snoop(io.StringIO())(function)
    return traced


WORKLOADS: dict[str, Callable[[], Function]] = {
    f"{_TURNS} turns of two small tensor ops": _tensor_loop,
    f"{_TURNS} turns of plain Python": _plain_loop,
    "10 training steps of an MLP": _training,
}
WAYS: dict[str, Callable[[Function], Function]] = {
    "nothing (noise)": lambda function: function,
    "`trace()` without lines": _traced(),
    "`lines=True`": _traced(lines=True),
    "`lines=True`, live text": _traced(lines={"output": io.StringIO()}),
    "every execution (`thin=False`)": _traced(lines={"thin": False}),
    "torchsnooper": _torchsnooper,
    "pysnooper": _pysnooper,
}


def print_lines(pairs: int) -> None:
    """Measure all ways on all workloads and print a table of ratios to untraced."""
    print(f"| step time traced / untraced | {' | '.join(WORKLOADS)} |")
    print(f"|---|{'---|' * len(WORKLOADS)}")
    with hush():
        functions = {name: make() for name, make in WORKLOADS.items()}
        for title, way in WAYS.items():
            cells = [_cell(function, way(function), pairs) for function in functions.values()]
            print(f"| {title} | {' | '.join(cells)} |", flush=True)
    base = " | ".join(f"{_seconds(function) * 1e3:.3g}" for function in functions.values())
    print(f"| untraced, ms | {base} |")


def _cell(function: Function, traced: Function, pairs: int) -> str:
    ratios = []
    for run in (function, traced):
        run()
    for i in range(pairs):
        if i % 2:
            slow, plain = _seconds(traced), _seconds(function)
        else:
            plain, slow = _seconds(function), _seconds(traced)
        ratios.append(slow / plain)
    if pairs < 2:
        return f"**{ratios[0]:.2f}**"
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"**{median:.2f}** {low:.2f}-{high:.2f}"


def _seconds(function: Function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
