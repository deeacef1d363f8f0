"""TT801 over written records: it fires, stays silent, and bears messages that it half knows."""

from __future__ import annotations

from typing import Any

import pytest

from tensortrace.records import Action, Location
from tests.builders import HERE, make_call, make_header, make_tensor
from tests.checks import closing, find, loss, module, op, optimizer

# One message of torch's for each kind of mistake, with nothing else known.
MESSAGES = [
    "",
    "mat1 and mat2 shapes cannot be multiplied (32x128 and 64x10)",
    "Expected size for first two dimensions of batch2 tensor to be: [2, 4] but got: [2, 5].",
    "Expected size for first two dimensions of batch2 tensor to be: [2, 4] but got: [3, 4].",
    "size mismatch, got input (2), mat (2x3), vec (4)",
    "inconsistent tensor size, expected tensor [3] and src [4] to have the same number of elements",
    "The size of tensor a (10) must match the size of tensor b (8) at non-singleton dimension 1",
    "Given groups=1, weight of size [16, 3, 3, 3], expected input[4, 1, 28, 28] to have 3 channels,"
    " but got 1 channels instead",
    "running_mean should contain 16 elements not 8",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0, cpu!",
    "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same",
    "mat1 and mat2 must have the same dtype, but got Double and Float",
    '"nll_loss_out_frame" not implemented for \'Half\'',
    "expected target dtype to be Long or Byte, but got Int",
    "Target 12 is out of bounds.",
    "index out of range in self",
    "index 5 is out of bounds for dimension 1 with size 4",
    "Class values must be smaller than num_classes.",
    "0D or 1D target tensor expected, multi-target not supported",
    "Expected input batch_size (3) to match target batch_size (4).",
    "Expected floating point type for target with class probabilities, got Long",
    "grad can be implicitly created only for scalar outputs",
    "Trying to backward through the graph a second time (or directly access saved tensors ...",
    "a leaf Variable that requires grad is being used in an in-place operation.",
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: [torch.FloatTensor [3]], which is output 0 of Tanh, is at version 1; expected",
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: [torch.cuda.FloatTensor []] is at version 1; expected version 0 instead.",
    "element 0 of tensors does not require grad and does not have a grad_fn",
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA error: device-side assert triggered",
    "Error(s) in loading state_dict for Net:",
    "shape '[4, -1]' is invalid for input of size 6",
    "shape '[0, -1]' is invalid for input of size 6",
    "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call):",
    "stack expects each tensor to be equal size, but got [3] at entry 0 and [4] at entry 1",
    "stack expects each tensor to be equal size",
    "Expected hidden size (2, 4, 24), got [2, 16, 24]",
    "Expected hidden[0] size (2, 24), got [2, 16, 24]",
    "unscale_() has already been called on this optimizer since the last update().",
    "value cannot be converted to type at::Half without overflow",
    "zip argument #1 must support iteration",
    "unsupported operand type(s) for *: 'float' and 'NoneType'",
]  # fmt: skip


def raised(message: str, seq: int = 50, *, step: int = 0, **detail: Any) -> Action:
    detail = {"type": "RuntimeError", "message": message, **detail}
    return Action(step=step, seq=seq, action="exception", location=HERE, detail=detail)


def shaped(name: str, *shape: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": "float32", "device": "cpu", **more}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_alone_is_told_without_failing(message: str) -> None:
    (finding,) = find([raised(message), closing()], "TT801")
    assert finding.severity == "error"
    assert finding.message
    assert finding.location == HERE


@pytest.mark.parametrize("message", MESSAGES)
def test_tensors_without_dims_are_told_without_failing(message: str) -> None:
    one = shaped("x", requires_grad=True)
    detail = {
        "module": "", "function": "cross_entropy", "operands": [one, {"name": "f()"}],
        "entered": [one], "arguments": [{**one, "name": name} for name in ("input", "target")],
        "parameters": [{**one, "name": "weight"}], "settings": {"num_features": 3},
    }  # fmt: skip
    for function in ("cross_entropy", "embedding", "forward"):
        (finding,) = find([raised(message, **{**detail, "function": function})], "TT801")
        assert finding.message


@pytest.mark.parametrize("message", [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:32145",
    "[../gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 1800000ms for recv operation",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12) ran for 600000 ms",
])  # fmt: skip
def test_what_a_rank_meets_that_waits_leads_to_the_others(message: str) -> None:
    ranks = [make_header(rank=1, world_size=2), raised(message)]
    (finding,) = find(ranks, "TT801")
    assert finding.message.startswith("another rank has gone, or waits elsewhere")
    assert "the logs of the other ranks" in finding.fix
    (alone,) = find([raised(message)], "TT801")
    assert "another rank" not in alone.message


def test_a_run_without_an_exception_is_silent() -> None:
    assert find([make_call(1), optimizer(), closing()], "TT801") == []
    assert find([], "TT801") == []


def test_it_is_found_at_once_and_not_again_when_the_step_closes() -> None:
    assert len(find([raised("no")], "TT801")) == 1
    assert len(find([raised("no"), closing()], "TT801")) == 1


def test_the_same_exception_at_the_same_line_is_one_finding() -> None:
    records = [raised("no"), closing(), raised("no", step=1), closing(1)]
    assert len(find(records, "TT801")) == 1
    elsewhere = Action(
        step=1, seq=1, action="exception", location=Location("train.py", 99, "main"),
        detail={"type": "RuntimeError", "message": "no"},
    )  # fmt: skip
    assert len(find([raised("no"), closing(), elsewhere, closing(1)], "TT801")) == 2


def test_module_phase_and_evidence_are_those_of_the_record() -> None:
    detail = {"module": "head", "phase": "forward", "expression": "a + b",
              "operands": [shaped("a", 2, 3), {"name": "n", "value": 3}]}  # fmt: skip
    (finding,) = find([raised("odd\nand more", **detail)], "TT801")
    assert (finding.module, finding.phase) == ("head", "forward")
    assert finding.evidence["placed"] == "direct"
    assert finding.evidence["said"] == "odd"
    assert finding.evidence["tensors"] == [shaped("a", 2, 3)]
    assert "in `a + b`: `a` [2, 3] f32" in finding.explanation


def test_an_operand_that_is_a_call_is_filled_in_from_the_op_that_failed() -> None:
    failed = op(3, "mul", [1, 2], [], [make_tensor(1, 8, 10), make_tensor(2, 8)],
                exception="RuntimeError")  # fmt: skip
    message = (
        "The size of tensor a (10) must match the size of tensor b (8) at non-singleton dimension 1"
    )
    detail = {"operands": [{"name": "f(x)"}, {"name": "g(x)"}]}
    (finding,) = find([failed, raised(message, **detail)], "TT801")
    assert "`f(x)` is [8, 10], `g(x)` is [8]" in finding.message


def test_an_exception_of_a_worker_names_the_line_of_its_dataset() -> None:
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "/x/torch/utils/data/fetch.py", line 52, in fetch\n    data = ...\n'
        '  File "/home/me/data.py", line 7, in __getitem__\n    raise ...\nValueError: no image\n'
    )
    (finding,) = find([raised(text)], "TT801")
    assert finding.message == (
        "a DataLoader worker raised ValueError at /home/me/data.py:7 in __getitem__: ValueError: "
        "no image"
    )


def test_memory_counts_parameters_outputs_and_the_shape_that_grew() -> None:
    def step(number: int, length: int) -> list[Any]:
        tensors = [make_tensor(1, 2, length), make_tensor(2, 2, length, 256)]
        return [make_call(1, "", step=number, inputs=[("input", 1)], outputs=[("output", 2)],
                          tensors=tensors)]  # fmt: skip

    text = "CUDA out of memory. Tried to allocate 2.00 GiB."
    head = module("", "weight", shape=(1024, 256))
    records = [head, *step(0, 8), closing(0), *step(1, 4096), raised(text, step=1)]
    (finding,) = find(records, "TT801")
    assert "no memory left for 2.00 GiB: input of the model went from [2, 8] to [2, 4096]" in (
        finding.message
    )
    assert "parameters 1 MiB" in finding.explanation
    assert "outputs of this step so far 8 MiB" in finding.explanation

    smaller = [head, *step(0, 4096), closing(0), *step(1, 8), raised(text, step=1)]
    assert "went from" not in find(smaller, "TT801")[0].message
    # A step in between that was not written says nothing about the one before.
    apart = [head, *step(0, 8), closing(0), closing(1), *step(2, 4096), raised(text, step=2)]
    assert "went from" not in find(apart, "TT801")[0].message


@pytest.mark.parametrize(("text", "told"), [
    ("Expected parameter loc to satisfy the constraint Real(), but found invalid values", True),
    ("linalg.svd: the input matrix contained non-finite values", True),
    ("probability tensor contains either `inf`, `nan` or element < 0", True),
    ("index 5 is out of bounds for dimension 1 with size 4", False),
    ("information is missing", False),
])  # fmt: skip
def test_an_exception_about_values_says_what_spoilt_them(text: str, told: bool) -> None:
    bad = op(1, "log", [1], [2], [make_tensor(1, 4), make_tensor(2, 4, nan=4)], location=HERE)
    spoilt = [bad, loss(2, "NaN", 2), optimizer(3, grad_norm="NaN"), closing()]
    (finding,) = [f for f in find([*spoilt, raised(text, step=1)]) if f.code == "TT801"]
    assert ("since step 0 there are values made by log" in finding.explanation) == told
    assert ("(TT101-1)" in finding.explanation) == told


def test_an_exception_long_after_a_batch_that_was_left_out_is_its_own() -> None:
    bad = op(1, "log", [1], [2], [make_tensor(1, 4), make_tensor(2, 4, nan=4)], location=HERE)
    skipped = [bad, loss(2, "NaN", 2), closing()]
    good = [loss(1, 1.0, step=1), optimizer(2, step=1), closing(1)]
    records = [*skipped, *good, raised("linalg.cholesky: not positive-definite", step=2)]
    (finding,) = [f for f in find(records) if f.code == "TT801"]
    assert "TT101" not in finding.explanation
