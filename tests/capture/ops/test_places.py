"""Ops in loops outside modules: few executions are recorded, and nothing bad is passed over."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrace import Lines, trace
from tensortrace.capture import compiled
from tensortrace.capture.ops import function_mode as ops
from tensortrace.capture.ops.places import Places
from tensortrace.capture.source import SourceLines
from tensortrace.records import Call, Finding, Line
from tests.capture import Recorded, record

pytestmark = pytest.mark.usefixtures("closing_folder")

N = 200
POWERS = [0, 1, 2, 3, 7, 15, 31, 63, 127]
ALL = list(range(N))


def recorded(records: Recorded, op: str) -> list[float | None]:
    """What the recorded calls of an op made, of one element each."""
    return [records.output(call).min for call in records.ops(op=op)]


def each() -> tuple[Tensor, ...]:
    """The numbers from 0, each a tensor of its own."""
    return torch.arange(float(N)).unbind()


def text_of(line: Any) -> str:
    lines, first = inspect.getsourcelines(inspect.getmodule(text_of))  # type: ignore[arg-type]
    return lines[line.location.line - max(first, 1)].strip()


def test_a_loop_records_three_executions_and_powers_of_two_and_counts_the_others() -> None:
    def program(t: Any) -> None:
        for x in each():
            (x + 0).abs()

    records = record(program)
    assert recorded(records, "add") == recorded(records, "abs") == POWERS
    assert records.steps()[0].dropped == 2 * (N - len(POWERS))


def test_each_step_counts_anew() -> None:
    def program(t: Any) -> None:
        for _ in range(3):
            for x in each()[:5]:
                x.neg()
            t.step()

    assert recorded(record(program), "neg") == [0, -1, -2, -3] * 3


@pytest.mark.parametrize("options", [{"level": "op"}, {"lines": Lines(thin=False)}])
def test_all_executions_can_be_had(options: dict[str, Any]) -> None:
    def program(t: Any) -> None:
        for x in each():
            x.abs()

    assert recorded(record(program, **options), "abs") == ALL


def test_a_function_that_many_lines_call_is_no_loop() -> None:
    def helper(x: Tensor) -> Tensor:
        return x.abs()

    def program(t: Any) -> None:
        x = torch.ones(())
        helper(x), helper(x), helper(x)
        helper(x), helper(x), helper(x)

    assert len(record(program).ops(op="abs")) == 6


def test_two_ops_at_one_place_are_told_apart() -> None:
    def program(t: Any) -> None:
        for x in each()[:4]:
            for function in (torch.abs, torch.neg):
                function(x)

    records = record(program)
    assert (recorded(records, "abs"), recorded(records, "neg")) == ([0, 1, 2, 3], [0, -1, -2, -3])


def test_what_gradients_flow_through_is_recorded_in_full() -> None:
    w = torch.ones((), requires_grad=True)

    def program(t: Any) -> None:
        total = torch.zeros(())
        for x in each():
            total = total + w * x
        total.backward()

    records = record(program)
    assert recorded(records, "mul") == ALL
    backward = [call for call in records.of(Call, phase="backward") if call.op == "mul"]
    assert len(backward) == N


def test_an_output_that_requires_grad_in_the_middle_of_a_loop_has_its_way_back() -> None:
    w = torch.ones((), requires_grad=True)

    def program(t: Any) -> None:
        for i, x in enumerate(each()):
            y = (w if i == 150 else x) * 3
            if i == 150:
                y.backward()

    records = record(program)
    assert 150 not in POWERS
    (node,) = [c for c in records.of(Call, phase="backward") if c.op == "mul"]
    (made,) = [c for c in records.ops(op="mul") if records.output(c).requires_grad]
    assert node.forward == made.seq
    assert made.seq < node.seq


def into(x: Tensor) -> None:
    torch.add(x, 1, out=x)


def overwrite(x: Tensor) -> None:
    x[...] = 5


@pytest.mark.parametrize(
    ("op", "run"),
    [
        ("add_", lambda x: x.add_(1)), ("add_", lambda x: x.__iadd__(1)), ("add", into),
        ("relu", lambda x: F.relu(x, inplace=True)), ("setitem", overwrite),
        ("batch_norm", lambda x: F.batch_norm(A, x, B, training=True)),
    ],
)  # fmt: skip
def test_an_op_that_writes_is_recorded_each_time_with_what_was_there_before(
    op: str, run: Callable[[Tensor], Any]
) -> None:
    x = torch.zeros(1)

    def program(t: Any) -> None:
        for _ in range(20):
            run(x)

    calls = record(program).ops(op=op)
    assert len(calls) == 20


A, B = torch.rand(4, 1), torch.ones(1)


def test_the_input_of_a_write_in_a_loop_was_measured_before_it() -> None:
    x = torch.zeros(1)

    def program(t: Any) -> None:
        for _ in range(20):
            x.add_(1)

    records = record(program)
    pairs = [(records.input(c).min, records.output(c).min) for c in records.ops(op="add_")]
    assert pairs == [(float(i), float(i + 1)) for i in range(20)]


@pytest.mark.parametrize(
    "other", [torch.ones(2), torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.int64)]
)
def test_another_shape_or_dtype_is_news_and_so_is_the_first_one_again(other: Tensor) -> None:
    def program(t: Any) -> None:
        for i, x in enumerate(each()[:30]):
            (other if i == 20 else x).abs()

    records = record(program)
    found = [records.output(call).min for call in records.ops(op="abs")]
    assert found == [0, 1, 2, 3, 7, 15, 1, 21]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_recorded_each_time_and_once_when_it_is_over(bad: float) -> None:
    def program(t: Any) -> None:
        for i, x in enumerate(each()):
            x * (bad if i in (150, 151) else 1.0)

    records = record(program)
    calls = records.ops(op="mul")
    values = [records.output(call) for call in calls]
    assert [tensor.min for tensor in values if not tensor.nonfinite] == [*POWERS, 152]
    assert [tensor.nonfinite for tensor in values if tensor.nonfinite] == [1, 1]
    assert [records.input(c).min for c, v in zip(calls, values, strict=True) if v.nonfinite] == [
        150, 151,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, x.t())[1] / 1, lambda x: x.t(), lambda x: x[:, 1], lambda x: x.double() * 1,
        lambda x: torch.complex(x, x), lambda x: x.to(torch.float8_e5m2), lambda x: x.half() * 1,
        lambda x: x.max(0), lambda x: x.chunk(2), lambda x: x.expand(3, 4, 4), lambda x: -x.conj(),
    ],
)  # fmt: skip
def test_a_nan_is_met_in_whatever_an_op_makes(make: Callable[[Tensor], Any]) -> None:
    good, bad = torch.ones(4, 4), torch.ones(4, 4)
    bad[:, 1] = math.nan

    def program(t: Any) -> None:
        for i in range(20):
            make(bad if i == 13 else good)

    records = record(program)
    seen = [call for call in records.ops() if any(
        records.tensors()[number].nonfinite for _, number in call.outputs
    )]  # fmt: skip
    assert seen
    quiet = record(lambda t: [make(good) for _ in range(20)])
    assert quiet.steps()[0].dropped > 0


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("every", [1, "auto"])
@pytest.mark.parametrize("writes", [False, True])
def test_a_nan_of_an_execution_that_would_be_passed_over_has_its_op_and_line(
    lines: bool, every: Any, writes: bool
) -> None:
    found: list[Any] = []

    def program() -> None:
        state = torch.ones(3)
        for i in range(N):
            scale = torch.full((3,), 149.5 - i)
            root = scale.sqrt()
            if writes:
                state.mul_(0.5).add_(root)
            else:
                state = state * 0.5 + root

    for _ in range(2):
        with torch.no_grad():
            trace(out=found.append, every=every, lines=lines)(program)()
    findings = [one for one in found if isinstance(one, Finding) and one.code == "TT101"]
    assert len(findings) == 2
    for finding in findings:
        assert finding.op == "sqrt"
        assert finding.location is not None
        assert text_of(finding) == "root = scale.sqrt()"
        (call,) = [c for c in found if isinstance(c, Call) and c.seq == finding.seq][:1]
        assert call.op == "sqrt"
    flagged = [line for line in found if isinstance(line, Line) and line.flags]
    assert [(text_of(line), line.nth) for line in flagged] == [("root = scale.sqrt()", 150)] * (
        2 * lines
    )


def test_a_reversed_operator_that_would_be_passed_over_has_its_operands_in_order() -> None:
    def program(t: Any) -> None:
        for x in each():
            1.0 / (x - 9)  # an infinity in one that is to be passed over

    calls = record(program).ops(op="div")
    assert len(calls) > len(POWERS)
    assert all(call.arguments == {"self": 1.0} for call in calls)


def test_a_nan_in_a_thin_step_of_a_long_run_has_its_op_and_line() -> None:
    found: list[Any] = []
    with trace(out=found.append, checks=["TT101"]) as t:
        for step in range(35):
            x = torch.ones(3)
            for i in range(N):
                x = (x * (-1.0 if (step, i) == (33, 150) else 1.0)).sqrt()
            t.step()
    (finding,) = [one for one in found if isinstance(one, Finding)]
    assert (finding.step, finding.op) == (33, "sqrt")
    assert text_of(finding).startswith("x = (x * (-1.0")


def test_an_op_that_raises_is_recorded_whichever_execution_it_is() -> None:
    def program(t: Any) -> None:
        x = torch.ones(2, 2)
        for i in range(N):
            y = torch.ones(3, 3) if i == 150 else torch.ones(2, 2)
            with contextlib.suppress(RuntimeError):
                torch.matmul(x, y)

    records = record(program)
    (call,) = [call for call in records.ops(op="matmul") if call.exception]
    assert call.exception == "RuntimeError"
    assert [records.tensors()[number].shape for _, number in call.inputs] == [(2, 2), (3, 3)]


def test_every_tensor_is_described_before_it_is_named() -> None:
    head = nn.Linear(4, 1)

    def program(t: Any) -> None:
        x = torch.ones(2, 4)
        for i in range(N):
            y = x * 0.5
            x = y + 1
            if i == 150:
                x.mul_(2)
        head(x)

    for lines in (False, True):
        records = record(program, lines=lines)
        described: set[int] = set()
        for one in sorted(records.of(Call), key=lambda call: call.seq):
            described |= {tensor.id for tensor in one.tensors}
            assert described >= {number for _, number in one.inputs}
            assert described >= {number for _, number in one.outputs}


def test_lines_and_their_ops_are_recorded_together() -> None:
    def program(t: Any) -> None:
        x = torch.ones(4)
        for i in range(N):
            y = x * 0.5
            x = torch.cat([y, y]) if i == 150 else y + 1
        x.sum()

    records = Recorded()
    trace(out=records.append, lines=True)(program)(None)
    for text, op in (("y = x * 0.5", "mul"), ("x = torch.cat", "add")):
        lines = [r for r in records.of(Line) if r.what == "line" and text_of(r).startswith(text)]
        calls = {c.seq: c for c in records.ops()}
        assert lines[-1].nth == N - 1
        for line in lines:
            made = [calls[s].op for s in range(line.seq, line.seq + 3) if s in calls]
            assert made[0] == ("cat" if (op, line.nth) == ("add", 150) else op)
        # That of the last execution is known to be needed when it has run.
        made = [c for c in records.ops() if text_of(c) == text_of(lines[0]) and c.inputs]
        assert len(lines) - 1 == len(made)


def test_what_is_used_after_a_loop_has_its_maker() -> None:
    def program(t: Any) -> None:
        found, halves = [], []
        for x in each():
            found.append(x * 2)
            halves.append((x + torch.ones(2)).chunk(2))
        torch.stack(found)
        nn.Identity()(halves[100][1])

    records = record(program)
    (stack,) = records.ops(op="stack")
    assert len(stack.inputs) == N
    makers = {number: c for c in records.ops() for _, number in c.outputs}
    made = [makers[number] for _, number in stack.inputs]
    assert [call.op for call in made] == ["mul"] * N
    assert [call.seq for call in made] == sorted(call.seq for call in made)
    assert {text_of(call) for call in made} == {"found.append(x * 2)"}
    module = records.module("")
    half = makers[module.inputs[0][1]]
    assert (half.op, [name for name, _ in half.outputs]) == ("chunk", ["output[0]", "output[1]"])
    assert half.outputs[1][1] == module.inputs[0][1]
    written = len(records.ops())
    assert records.steps()[0].dropped == N * 4 + 3 - written  # each() is two


def test_what_is_gone_is_forgotten_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortrace.capture.tensors._MOST_PASSED", 10)
    held: list[int] = []

    def program(t: Any) -> None:
        kept = []
        for x in each():
            y = x * 2
            if len(kept) < 30:
                kept.append(y)
            held.append(len(t._recorder.tensors.passed))
        torch.stack(kept)

    records = record(program)
    (stack,) = records.ops(op="stack")
    makers = {number for c in records.ops(op="mul") for _, number in c.outputs}
    assert makers >= {number for _, number in stack.inputs}
    assert max(held) <= 10 + 2 * 30 + 1


def test_a_tensor_that_an_earlier_step_made_is_known_as_that() -> None:
    def program(t: Any) -> None:
        batches = [x * 2 for x in each()]
        t.step()
        nn.Identity()(batches[100])

    records = record(program)
    assert records.input(records.module("")).from_step == 0


def test_targets_that_a_loop_shaped_on_purpose_are_no_accident() -> None:
    w = torch.ones(4, requires_grad=True)
    found: list[Any] = []
    with trace(out=found.append, every=1):
        loss = torch.zeros(())
        for i in range(20):
            target = torch.full((4,), float(i)).unsqueeze(1)
            loss = loss + (w * 2 - target).square().mean()
        loss.backward()
        nn.Identity()(w)
    assert [one.code for one in found if isinstance(one, Finding)] == []


def test_another_mode_below_ours_sees_no_question_of_ours() -> None:
    def program(t: Any) -> None:
        with torch.device("cpu"):
            for x in each():
                x.abs()

    assert recorded(record(program), "abs") == POWERS


def test_nothing_is_asked_where_nothing_is_measured() -> None:
    def program(t: Any) -> None:
        for i, x in enumerate(each()):
            x * (math.nan if i == 150 else 1)

    records = record(program, stats="none")
    assert len(records.ops(op="mul")) == len(POWERS)


def test_without_the_kernel_the_same_executions_are_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "kernel", None)
    monkeypatch.setattr(ops, "_call", None)

    def program(t: Any) -> None:
        for i, x in enumerate(each()):
            x * (math.nan if i == 150 else 1)

    records = record(program)
    assert recorded(records, "mul") == [*POWERS, None, 151]


def test_places_of_code_that_is_made_anew_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensortrace.capture.source._MOST_CODES", 10)
    sources = SourceLines()
    places = Places(sources)
    made = []
    for i in range(30):
        space: dict[str, Any] = {"places": places, "frame": inspect.currentframe}
        exec(compile(f"place = places.find('op{i}', frame())", f"file{i}.py", "exec"), space)
        made.append(space["place"])
    assert len(sources._codes) == len(sources._same) <= 10
    assert len(set(map(id, made))) == 30


def test_equal_code_has_the_same_places_and_lines_unless_it_is_of_another_file() -> None:
    sources = SourceLines()
    places = Places(sources)
    made = []
    for file in ("a.py", "a.py", "b.py"):
        space: dict[str, Any] = {"places": places, "frame": inspect.currentframe}
        exec(compile("place = places.find('op', frame())", file, "exec"), space)
        made.append(space["place"])
    assert made[0] is made[1] is not made[2]
    assert [place.location.file for place in made] == ["a.py", "a.py", "b.py"]
    assert len(sources._codes) == 2


# ---- the kernel's question

SPECIAL: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.ones(4, device="meta"),
    "sparse": lambda: torch.ones(4).to_sparse(),
    "csr": lambda: torch.ones(4, 4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4), torch.ones(2)]),
    "functional": lambda: torch._to_functional_tensor(torch.ones(4)),
    "zero": lambda: torch._efficientzerotensor(4),
    "mkldnn": lambda: torch.ones(4).to_mkldnn(),
    "transposed": lambda: torch.ones(4, 2).t(),
    "expanded": lambda: torch.ones(1).expand(4),
    "int": lambda: torch.ones(4, dtype=torch.int64),
    "empty": lambda: torch.ones(0),
}


@pytest.mark.skipif(compiled.kernel is None, reason="there is no kernel to ask")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SPECIAL)
def test_the_kernel_calls_no_tensor_quiet_that_is_not_plain(kind: str) -> None:
    assert compiled.kernel is not None
    tensor = SPECIAL[kind]()
    try:
        shape = tensor.shape
    except RuntimeError:
        shape = torch.Size([4])
    assert not compiled.kernel.is_quiet(tensor, shape, tensor.dtype)


@pytest.mark.skipif(compiled.kernel is None, reason="there is no kernel to ask")
def test_the_kernel_says_nothing_inside_vmap_and_grad() -> None:
    kernel = compiled.kernel
    assert kernel is not None
    answers = []

    def look(x: Tensor) -> Tensor:
        answers.append(kernel.is_quiet(x, x.shape, x.dtype))
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    assert answers[0] is None
    assert not answers[1]


@pytest.mark.skipif(compiled.kernel is None, reason="there is no kernel to ask")
@pytest.mark.parametrize("n", [1, 7, 8192, 8193, 100_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_kernel_says_whether_all_is_finite(n: int, bad: float, dtype: torch.dtype) -> None:
    kernel = compiled.kernel
    assert kernel is not None
    x = torch.full((n,), torch.finfo(dtype).max, dtype=dtype)
    assert kernel.is_quiet(x, x.shape, dtype) is True
    assert kernel.is_quiet(x, torch.Size([n + 1]), dtype) is False
    assert kernel.is_quiet(x, x.shape, torch.float32) is (dtype == torch.float32)
    assert kernel.is_quiet(x.clone().requires_grad_(), x.shape, dtype) is False
    x[n - 1] = bad
    assert kernel.is_quiet(x, x.shape, dtype) is False


@pytest.mark.skipif(compiled.kernel is None, reason="there is no kernel to ask")
def test_the_kernel_reads_no_memory_that_was_given_back() -> None:
    kernel = compiled.kernel
    assert kernel is not None
    x = torch.ones(1000)
    x.untyped_storage().resize_(0)
    assert kernel.is_quiet(x, x.shape, x.dtype) is None
    x.untyped_storage().resize_(100)
    assert kernel.is_quiet(x, x.shape, x.dtype) is None
