from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tensortrace.records import Call
from tests.checks import brief, call, closing, find, loss, nan, ok, op, optimizer, param
from tests.checks.traced import find_live


def test_nan_in_the_batch_is_an_error_and_the_only_one():
    records = [
        op(1, "to", [1], [2], [nan(1, 8, 3), nan(2, 8, 3)]),
        call(2, "net", [2], [3], [nan(3)]),
        loss(3, "NaN", 3),
        optimizer(grad_norm="NaN"),
        closing(),
    ]
    (found,) = find(records)
    assert brief([found]) == [("TT105", "error", "to")]
    assert found.tensor == 1
    assert "1 NaN of 24 in the data" in found.message


def test_data_that_an_op_hands_on_as_it_is_stays_data():
    """`x.to(device)` returns x itself where it lies there already, as in any loop on a CPU."""
    records = [
        op(1, "to", [1], [1], [nan(1)]),
        call(2, "net", [1], [2], [nan(2)]),
        loss(3, "NaN", 2),
        optimizer(),
    ]
    assert brief(find(records)) == [("TT105", "error", "to")]


def test_what_is_said_of_a_batch_is_true_after_many_updates():
    records = [
        optimizer(), param(1001, "net.weight", ok(1), update_norm=0.1), closing(),
        call(1, "net", [1], [2], [nan(1), nan(2)], step=1), loss(3, "NaN", 2, step=1),
        optimizer(step=1, grad_norm="NaN"), closing(1),
    ]  # fmt: skip
    (found,) = find(records)
    assert (found.code, found.step) == ("TT105", 1)
    assert found.explanation == "NaN loss on some batches only, whatever the weights are"


def test_infinity_in_the_batch_is_a_warning():
    records = [call(1, "net", [1], [2], [ok(1, posinf=1), nan(2)]), loss(3, "NaN", 2), optimizer()]
    assert brief(find(records)) == [("TT105", "warning", "net")]


def test_missing_values_that_are_handled_are_a_note_at_the_end():
    records = [op(1, "nan_to_num", [1], [2], [nan(1), ok(2)]), loss(3, 1.0, 2), optimizer()]
    assert find(records) == []
    assert brief(find([*records, closing()])) == [("TT105", "note", "nan_to_num")]


def test_a_mask_of_minus_infinity_is_a_note():
    records = [call(1, "net", [1], [2], [ok(1, neginf=3), ok(2)]), loss(3, 1.0), closing()]
    assert brief(find(records)) == [("TT105", "note", "net")]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "int64"}, {"requires_grad": True}, {"from_step": 0}, {"view_of": 9},
        {"previous": 9}, {"grad_of": 9}, {"numel": 1},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_is_no_data_is_not_looked_at(changes):
    records = [
        call(1, "net", [1], [2], [nan(1, **changes), nan(2)]),
        loss(3, "NaN", 2),
        optimizer(),
    ]
    assert find(records, "TT105") == []


def test_a_tensor_that_a_call_of_the_step_made_is_no_data():
    made = op(1, "rand", [], [1], [nan(1)])
    records = [made, call(2, "net", [1], [2], [nan(2)]), loss(3, "NaN", 2), optimizer()]
    assert find(records, "TT105") == []
    records[0] = op(1, "torch.tensor", [], [1], [nan(1)])
    assert brief(find(records, "TT105")) == [("TT105", "error", "net")]


def spoilt(step=1, **changes):
    """A step that takes a NaN from the one before and passes it on to the loss."""
    return [
        call(1, "net", [1], [2], [nan(1, **{"from_step": step - 1, **changes}), nan(2)], step=step),
        loss(2, "NaN", 2, step=step),
        optimizer(step=step, grad_norm="NaN"),
        closing(step),
    ]


def test_a_batch_that_nobody_was_seen_to_make_at_the_end_of_the_step_before_is_data():
    (found,) = find([call(1, "net", [1], [2], [ok(1), ok(2)]), closing(), *spoilt()])
    assert brief([found]) == [("TT105", "error", "net")]
    assert (found.step, found.tensor) == (1, 1)


def test_a_batch_taken_from_bad_data_at_the_end_of_the_step_before_is_told_by_its_line():
    take = [op(1, "getitem", [1], [2], [nan(1, 80), nan(2)]), closing()]
    note, error = find([*take, *spoilt()])
    assert brief([note, error]) == [("TT105", "note", "getitem"), ("TT105", "error", "getitem")]
    assert (error.step, error.seq, error.evidence["made_in_step"]) == (1, None, 0)
    assert error.message == "1 NaN of 80 in the data: args[0] of getitem, at the end of step 0"


def test_data_of_which_a_clean_batch_was_taken_is_not_blamed_for_another():
    take = [op(1, "getitem", [1], [2], [nan(1, 80), ok(2)]), closing()]
    note, error = find([*take, *spoilt()])
    assert brief([note, error]) == [("TT105", "note", "getitem"), ("TT105", "error", "net")]


def test_a_batch_into_which_a_nan_was_written_at_the_end_of_the_step_before_is_data():
    write = [op(1, "setitem", [1], [2], [ok(1), nan(2, previous=1)]), closing()]
    assert brief(find([*write, *spoilt()])) == [("TT105", "error", "net")]


@pytest.mark.parametrize("two_before", [False, True])
def test_what_a_call_of_the_step_before_made_is_no_data(two_before):
    made = [call(1, "net", [1], [2], [ok(1), nan(2)]), loss(3, 1.0), closing()]
    later = [closing(1), *spoilt(2, from_step=0)] if two_before else spoilt()
    assert find([*made, *later], "TT105") == []


def test_what_enters_an_inner_module_is_left_to_the_forward_check():
    inner = call(2, "net.a", [3], [2], [nan(3)], parent=1)
    records = [call(1, "net", [1], [2], [ok(1), nan(2)]), inner, loss(3, "NaN", 2), optimizer()]
    assert [f.code for f in find(records)] == ["TT101"]


def test_the_gradient_that_a_loop_of_ones_own_takes_is_no_data():
    made = Call(step=0, seq=3, phase="backward", module="a", outputs=[("weight", 3)],
                tensors=[nan(3)])  # fmt: skip
    update = op(4, "mul", [4], [5], [nan(4), nan(5)])
    records = [loss(2, "NaN"), made, update, closing()]
    assert find(records, "TT105") == []
    assert [f.code for f in find([loss(2, "NaN"), update, closing()], "TT105")] == ["TT105"]


@pytest.mark.parametrize("given", [math.nan, 0.5])
def test_a_buffer_that_is_to_be_overwritten_is_no_data(given):
    """``out=``: memory that was never written, or what is left of a batch before."""
    buffer = torch.full((16, 8), given)

    def program():
        net = nn.Linear(8, 1)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            raw = torch.rand(16, 8)
            torch.sub(raw, 0.5, out=buffer)
            sgd.zero_grad()
            net(buffer).square().mean().backward()
            sgd.step()
            buffer.fill_(given)

    assert find_live(program, "TT1") == []


def test_data_that_is_written_over_itself_is_data():
    def program():
        net, batch = nn.Linear(8, 1), torch.rand(16, 8)
        for i in range(3):
            batch[i, 0] = math.nan
            torch.sub(batch.clone(), 0.5, out=batch)
            net(batch).square().mean().backward()

    assert "TT105" in {f.code for f in find_live(program, "TT1")}


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("each", [False, True])
def test_what_torch_func_returns_of_a_gradient_is_no_data(each, level):
    def program():
        net = nn.Linear(3, 3, bias=False)
        weight = net.weight.detach().clone()

        def loss(weight, x):
            y = torch.func.functional_call(net, {"weight": weight}, (x,))
            return (y * 0).square().sum(-1).sqrt().mean()  # an infinite slope

        for _ in range(3):
            x = torch.randn(8, 3)
            if each:
                slope = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x).mean(0)
            else:
                slope = torch.func.grad(loss)(weight, x)
            weight = weight - 0.1 * slope

    found = [f.code for f in find_live(program, "TT1", level=level)]
    assert "TT105" not in found
    assert "TT101" in found


def test_what_a_sampler_goes_on_with_is_not_the_data_of_a_later_step():
    """The step between only carries it on: what that leaves was made in the one before it."""
    net = nn.Sequential(nn.Linear(2, 32), nn.LayerNorm(32), nn.Linear(32, 2))

    @torch.no_grad()
    def program():
        x = torch.randn(64, 2)
        for _ in range(24):
            x = (x - 0.1 * net(x)) * 1e2

    found = [f for f in find_live(program) if f.severity != "note"]
    assert [(f.code, f.op) for f in found] == [("TT101", "layer_norm")]
