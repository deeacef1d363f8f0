from __future__ import annotations

import io
import math
import re
import warnings
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn

from tensortrace import trace
from tensortrace.causes import plain_op
from tensortrace.checks.nonfinite_forward.origins import origins_of
from tensortrace.records import Action, Call, Finding, Location, Tensor
from tensortrace.step_view import StepView
from tests.checks import brief, call, closing, find, loss, module, nan, ok, op, optimizer, row
from tests.checks.traced import find_live


def inf(id, **changes):
    return ok(id, posinf=1, **changes)


def mask(id, **changes):
    return ok(id, neginf=2, **changes)


def bad_log(seq=1, **changes):
    return op(seq, "log", [1], [2], [ok(1, 640, zeros=12, min=0.0), mask(2, numel=640)], **changes)


def test_names_the_op_its_numbers_and_its_line():
    records = [bad_log(), op(2, "mean", [2], [3], [mask(3)]), loss(3, "-Infinity", 3), optimizer()]
    (found,) = find(records, "TT101")
    assert brief([found]) == [("TT101", "error", "log")]
    assert "log made 2 -inf of 640 from finite inputs" in found.message
    assert "12 zeros of 640 (f32 [640] from 0 to 1)" in found.explanation
    assert found.explanation not in found.message  # told once
    assert (found.seq, found.tensor, found.value, found.limit) == (1, 2, 2, 0)
    assert found.location == Location("train.py", 12, "main", "loss = model(x)")
    assert found.evidence["placed"] == "direct"
    assert "clamp_min" in found.fix


def test_is_told_at_the_gate_and_once():
    gate = [bad_log(), loss(2, "Infinity", 2), optimizer()]
    assert len(find(gate, "TT101")) == 1
    assert len(find([*gate, closing()], "TT101")) == 1


def test_the_same_cause_in_a_later_step_is_only_counted():
    steps = [[bad_log(step=s), loss(2, "NaN", 2, step=s), closing(s)] for s in range(3)]
    assert [f.step for f in find(chain.from_iterable(steps), "TT101")] == [0]


def test_a_long_trail_of_harmless_values_is_gone_over_once(monkeypatch):
    """A loop that goes on with a NaN for hundreds of turns had every pair of its ops compared."""

    def asked(turns):
        count = 0

        def nonfinite(step, names, look=StepView.nonfinite):
            nonlocal count
            count += 1
            return look(step, names)

        def program():
            state = torch.ones(3)
            for i in range(turns):
                state.mul_(0.5).add_(torch.full((3,), 3.5 - i).sqrt())
            nn.Linear(3, 1)(torch.ones(3)).sum().backward()

        with monkeypatch.context() as patch:
            patch.setattr(StepView, "nonfinite", nonfinite)
            (found,) = find_live(program, "TT101", level="op")
        assert (found.severity, found.op) == ("note", "sqrt")
        return count

    assert asked(160) < 5 * asked(40)


def test_a_clean_step_is_silent():
    records = [op(1, "log", [1], [2], [ok(1), ok(2)]), loss(2, 1.0, 2), optimizer(), closing()]
    assert find(records, "TT101") == []


def test_bad_inputs_are_not_its_fault():
    records = [op(1, "exp", [1], [2], [nan(1), nan(2)]), loss(2, "NaN", 2), optimizer(), closing()]
    assert find(records, "TT101") == []


@pytest.mark.parametrize("name", ["masked_fill", "torch.Tensor.__setitem__", "full", "empty_like"])
def test_fills_and_memory_as_it_was_are_no_origin(name):
    records = [op(1, name, [1], [2], [ok(1), nan(2)]), loss(2, "NaN", 2), optimizer(), closing()]
    assert find(records, "TT101") == []


def test_a_mask_that_is_consumed_is_silent_and_a_fully_masked_row_is_the_softmax():
    masked = op(1, "masked_fill", [1], [2], [ok(1), mask(2)])
    healthy = [masked, op(2, "softmax", [2], [3], [ok(3)]), loss(3, 1.0, 3), optimizer(), closing()]
    assert find(healthy, "TT101") == []
    sick = [masked, op(2, "softmax", [2], [3], [nan(3)]), loss(3, "NaN", 3), optimizer()]
    (found,) = find(sick, "TT101")
    assert brief([found]) == [("TT101", "error", "softmax")]
    assert "mask hides every position" in found.explanation


def test_infinity_of_a_mask_is_not_explained_by_what_makes_nan():
    def told(made, value):
        masked = op(1, "masked_fill", [1], [2], [ok(1), mask(2)])
        square = op(2, "square", [2], [3], [made])
        (found,) = find([masked, square, loss(3, value, 3), optimizer()], "TT101")
        return found.explanation

    assert told(inf(3), "Infinity").startswith("-inf went in (2 of 4) and inf came out: mask after")
    assert told(nan(3), "NaN") == "0 * -inf and -inf + inf are NaN; it got 2 -inf of 4"


def test_what_is_masked_away_is_a_note_at_the_end_of_the_step():
    records = [bad_log(), op(2, "where", [2], [3], [ok(3)]), loss(3, 1.0, 3), optimizer()]
    assert find(records, "TT101") == []
    (found,) = find([*records, closing()], "TT101")
    assert brief([found]) == [("TT101", "note", "log")]
    assert "harmless" in found.message


def test_the_origin_on_the_way_to_the_loss_is_told_not_the_healed_one():
    records = [
        bad_log(),
        op(2, "nan_to_num", [2], [3], [ok(3)]),
        op(3, "sqrt", [4], [5], [ok(4, min=-1.0), nan(5)]),
        op(4, "add", [3, 5], [6], [nan(6)]),
        loss(5, "NaN", 6),
        optimizer(),
        closing(),
    ]
    assert brief(find(records, "TT101")) == [("TT101", "error", "sqrt")]


def test_the_first_of_two_that_reach_the_loss_is_told():
    records = [
        op(1, "sqrt", [1], [2], [ok(1), nan(2)]),
        op(2, "exp", [3], [4], [ok(3), inf(4)]),
        op(3, "add", [2, 4], [5], [nan(5)]),
        loss(4, "NaN", 5),
        optimizer(),
    ]
    assert brief(find(records, "TT101")) == [("TT101", "error", "sqrt")]


def test_the_innermost_module_completes_first():
    records = [
        call(1, "", [1], [4], [ok(1), nan(4)]),
        call(2, "block", [1], [3], [nan(3)], parent=1),
        call(3, "block.fc", [1], [2], [nan(2)], parent=2),
        call(4, "head", [3], [4], parent=1),
        loss(5, "NaN", 4),
        optimizer(),
    ]
    (found,) = find(records, "TT101")
    assert brief([found]) == [("TT101", "error", "block.fc")]
    assert found.evidence["placed"] == "module"


def test_a_module_that_is_a_loss_gets_the_reason_of_the_loss():
    records = [
        module("CrossEntropyLoss", cls="CrossEntropyLoss"),
        call(1, "CrossEntropyLoss", [1], [2], [ok(1), nan(2)]),
        loss(2, "NaN", 2),
        optimizer(),
    ]
    (found,) = find(records, "TT101")
    assert "ignored" in found.explanation


def test_a_fault_between_two_children_is_the_parents_with_both_lines():
    a, b = Location("net.py", 5, "forward"), Location("net.py", 7, "forward")
    records = [
        module("", cls="Net"),
        call(1, "", [1], [4], [ok(1), nan(4)]),
        call(2, "a", [1], [2], [ok(2)], parent=1, location=a),
        call(3, "b", [3], [4], [nan(3)], parent=1, location=b),
        loss(5, "NaN", 4),
        optimizer(),
    ]
    (found,) = find(records, "TT101")
    assert found.module == ""
    assert found.evidence["between"] == ["a", "b"]
    assert found.evidence["between_lines"] == ["net.py:5", "net.py:7"]
    assert (
        "the code of Net made 1 NaN of 4 between the exit of a and the entry of b" in found.message
    )
    assert "net.py:5 to net.py:7" in found.message


def test_a_fault_before_the_first_child_and_after_the_last_one():
    before = [
        call(1, "net", [1], [3], [ok(1), nan(3)]),
        call(2, "net.a", [2], [3], [nan(2)], parent=1),
        loss(5, "NaN", 3),
        optimizer(),
    ]
    (found,) = find(before, "TT101")
    assert (found.module, found.evidence["between"]) == ("net", [None, "net.a"])
    after = [
        call(1, "net", [1], [3], [ok(1), nan(3)]),
        call(2, "net.a", [1], [2], [ok(2)], parent=1),
        loss(5, "NaN", 3),
        optimizer(),
    ]
    (found,) = find(after, "TT101")
    assert (found.module, found.evidence["between"]) == ("net", ["net.a", None])


def test_a_state_from_an_earlier_step_is_not_made_here():
    records = [
        call(1, "net", [1], [3], [ok(1), nan(3)]),
        call(2, "net.a", [2], [3], [nan(2, from_step=3)], parent=1),
        loss(5, "NaN", 3),
        optimizer(),
        closing(),
    ]
    assert find(records, "TT101") == []


def test_without_a_loss_the_output_of_the_model_is_the_judge():
    sick = [call(1, "net", [1], [2], [ok(1), nan(2)]), closing()]
    assert brief(find(sick, "TT101")) == [("TT101", "error", "net")]
    healed = [sick[0], op(2, "nan_to_num", [2], [3], [ok(3)]), closing()]
    assert brief(find(healed, "TT101")) == [("TT101", "note", "net")]
    banned = [call(1, "net", [1], [2], [ok(1), mask(2)]), closing()]
    assert brief(find(banned, "TT101")) == [("TT101", "note", "net")]
    metric = [op(1, "div", [1], [2], [ok(1), nan(2)]), closing()]
    assert brief(find(metric, "TT101")) == [("TT101", "note", "div")]


def backward(seq, of, ins, outs, tensors, **changes):
    return Call(step=0, seq=seq, phase="backward", forward=of, tensors=tensors,
                inputs=[("output[0]", i) for i in ins], outputs=[("input[0]", i) for i in outs],
                **changes)  # fmt: skip


def test_masked_in_forward_and_nan_in_its_own_backward_is_an_error():
    records = [
        bad_log(),
        op(2, "where", [2], [3], [ok(3)]),
        loss(3, 1.0, 3),
        backward(4, 1, [10], [11], [ok(10), nan(11)], op="log"),
        optimizer(grad_norm="NaN"),
    ]
    assert brief(find(records, "TT101")) == [("TT101", "error", "log")]
    # Multiplied away before it reaches a parameter: softmax of a row that is masked throughout.
    healed = [*records[:-1], optimizer(), closing()]
    assert brief(find(healed, "TT101")) == [("TT101", "note", "log")]


def test_a_gradient_that_another_op_spoils_leaves_the_mask_a_note():
    records = [
        bad_log(),
        op(2, "where", [2], [3], [ok(3)]),
        op(3, "sqrt", [3], [4], [ok(4)]),
        loss(4, 1.0, 4),
        backward(5, 3, [10], [11], [ok(10), nan(11)], op="sqrt"),
        optimizer(grad_norm="NaN"),
    ]
    assert find(records, "TT101") == []


def test_a_value_that_a_sparse_product_leaves_out_is_an_error_where_its_gradient_takes_it():
    records = [
        op(1, "softmax", [1], [2], [ok(1), nan(2)]),
        op(2, "elu", [2], [3], [nan(3)]),
        op(3, "mm", [4, 3], [5], [ok(4), ok(5)]),
        loss(4, 1.0, 5),
        backward(5, 3, [10], [11], [ok(10), nan(11)], op="mm"),
        optimizer(grad_norm="NaN"),
    ]
    assert brief(find(records, "TT101")) == [("TT101", "error", "softmax")]
    parameter = Call(step=0, seq=5, phase="backward", module="gcn", outputs=[("weight", 11)],
                     tensors=[ok(10), nan(11)])  # fmt: skip
    taken = Call(step=0, seq=3, module="gcn", inputs=[("input[0]", 3)], outputs=[("output[0]", 5)],
                 tensors=[ok(5)])  # fmt: skip
    records = [module("gcn"), *records[:2], taken, loss(4, 1.0, 5), parameter, optimizer()]
    assert brief(find(records, "TT101")) == [("TT101", "error", "softmax")]


def test_under_a_scaler_a_bad_gradient_is_no_damage_and_a_bad_loss_is():
    scale = Action(step=0, seq=2, action="scale", detail={"scale": 65536.0})
    overflow = [
        op(1, "mul", [1], [2], [ok(1), inf(2)]),
        loss(2, 1.0, 1),
        scale,
        backward(4, 1, [10], [11], [ok(10), inf(11)], op="mul"),
        optimizer(),
        closing(),
    ]
    assert brief(find(overflow, "TT101")) == [("TT101", "note", "mul")]
    assert brief(find([bad_log(), scale, loss(3, "NaN", 2), optimizer()], "TT101")) == [
        ("TT101", "error", "log")
    ]


def test_after_the_parameters_went_bad_all_follows_until_weights_are_loaded():
    first = [bad_log(), loss(2, "NaN", 2), optimizer(grad_norm="NaN"), closing()]
    later = [call(1, "fc", [1], [2], [ok(1), nan(2)], step=1), loss(2, "NaN", 2, step=1),
             optimizer(step=1), closing(1)]  # fmt: skip
    assert brief(find([*first, *later], "TT101")) == [("TT101", "error", "log")]
    load = Action(step=1, seq=0, action="load_state_dict")
    assert brief(find([*first, load, *later], "TT101")) == [
        ("TT101", "error", "log"),
        ("TT101", "error", "fc"),
    ]


def test_what_was_called_before_weights_are_loaded_follows_from_those_it_had():
    """A validation, and the last checkpoint in the step that it ends."""
    first = [bad_log(), loss(2, "NaN", 2), optimizer(grad_norm="NaN"), closing()]
    judged = call(1, "fc", [1], [2], [ok(1), nan(2)], step=1)
    load = Action(step=1, seq=2, action="load_state_dict")
    later = call(1, "fc", [1], [2], [ok(1), nan(2)], step=2)
    found = find([*first, judged, load, closing(1), later, closing(2)], "TT101")
    assert [(f.step, f.module) for f in found] == [(0, None), (2, "fc")]


def test_a_skipped_step_does_not_spoil_the_parameters():
    first = [bad_log(), loss(2, "NaN", 2), optimizer(grad_norm="NaN", skipped=True), closing()]
    later = [
        call(1, "fc", [1], [2], [ok(1), nan(2)], step=1),
        loss(2, "NaN", 2, step=1),
        closing(1),
    ]
    assert len(find([*first, *later], "TT101")) == 2


def test_recomputed_and_replayed_calls_are_not_counted_again():
    records = [
        op(1, "log", [1], [2], [ok(1), nan(2)], recompute=True),
        op(2, "log", [1], [2], replay=True),
        loss(3, "NaN"),
        optimizer(),
        closing(),
    ]
    assert find(records, "TT101") == []


def test_the_chain_goes_back_to_what_made_the_zeros_and_no_further():
    zeros = {"zeros": 2, "min": 0.0}
    records = [
        op(1, "linear", [1], [2], [ok(1), ok(2)]),
        op(2, "clamp", [2], [3], [ok(3, **zeros)]),
        op(3, "mul", [3], [4], [ok(4, **zeros)]),
        op(4, "view", [4], [5], [ok(5, **zeros)]),
        op(5, "log", [5], [6], [mask(6)]),
        loss(6, "NaN", 6),
        optimizer(),
    ]
    (found,) = find(records, "TT101")
    assert [(link.op, link.tensor) for link in found.chain] == [
        ("clamp", 3), ("mul", 4), ("view", 5), ("log", 6),
    ]  # fmt: skip
    (found,) = find(records, "TT101", chain=2)
    assert [(link.seq, link.tensor) for link in found.chain] == [(4, 5), (5, 6)]


def test_the_chain_ends_where_values_are_computed_anew():
    records = [
        op(1, "linear", [1], [2], [ok(1), ok(2)]),
        op(2, "t", [2], [3], [ok(3)]),
        op(3, "sqrt", [3], [4], [nan(4)]),
        loss(4, "NaN", 4),
        optimizer(),
    ]
    (found,) = find(records, "TT101")
    assert [link.op for link in found.chain] == ["linear", "t", "sqrt"]
    # The log of a tensor without zeros or negatives: nothing behind it is to blame.
    unclear = [op(3, "log", [3], [4], [ok(3, min=0.5), nan(4)])]
    (found,) = find([*records[:2], *unclear, *records[3:]], "TT101")
    assert [link.op for link in found.chain] == ["log"]


def test_a_few_zeros_far_back_do_not_explain_many():
    records = [
        op(1, "linear", [1], [2], [ok(1, 100, zeros=1), ok(2, 100, zeros=1)]),
        op(2, "relu", [2], [3], [ok(3, 100, zeros=50, min=0.0)]),
        op(3, "log", [3], [4], [mask(4)]),
        loss(4, "NaN", 4),
        optimizer(),
    ]
    (found,) = find(records, "TT101")
    assert [link.op for link in found.chain] == ["relu", "log"]


def test_notes_of_the_same_layer_over_and_over_are_one():
    records = [
        op(i, "log", [i], [100 + i], [ok(i), mask(100 + i)], module=f"layers.{i}")
        for i in range(1, 13)
    ]
    assert len(find([*records, loss(50, 1.0), optimizer(), closing()], "TT101")) == 1


def test_a_division_blames_the_divisor():
    tensors = [ok(1, numel=4), ok(2, zeros=3, min=0.0), inf(3)]
    divide = op(1, "__truediv__", [1, 2], [3], tensors)
    (found,) = find([divide, loss(2, "Infinity", 3), optimizer()], "TT101")
    assert "the divisor has 3 zeros out of 4" in found.explanation


def test_minus_infinity_from_nowhere_is_the_parents_unless_a_softmax_gets_it():
    def run(cls):
        return [
            module("net.b", cls=cls),
            call(1, "net", [1], [4], [ok(1), nan(4)]),
            call(2, "net.a", [1], [2], [ok(2)], parent=1),
            call(3, "net.b", [3], [4], [mask(3)], parent=1),
            loss(5, "NaN", 4),
            optimizer(),
        ]

    (found,) = find(run("Linear"), "TT101")
    assert (found.module, found.evidence["between"]) == ("net", ["net.a", "net.b"])
    (found,) = find(run("Softmax"), "TT101")
    assert (found.module, "between" in found.evidence) == ("net.b", False)


def test_data_spoilt_after_the_last_update_is_an_error_where_it_does_harm():
    prepare = [op(1, "div", [1, 2], [3], [ok(1), ok(2, zeros=1), nan(3)]), closing()]
    later = [
        call(1, "net", [1], [2], [nan(1, from_step=0), nan(2)], step=1),
        loss(2, "NaN", 2, step=1),
        optimizer(step=1, grad_norm="NaN"),
        closing(1),
    ]
    note, error = find([*prepare, *later])
    assert brief([note, error]) == [("TT101", "note", "div"), ("TT101", "error", "div")]
    assert (error.step, error.seq, error.evidence["made_in_step"]) == (1, None, 0)
    assert "made at the end of step 0" in error.message


def test_weights_that_a_loop_of_ones_own_spoils_after_the_loss_are_told_by_its_line() -> None:
    def train(eps: float, steps: int = 40) -> list[Finding]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 1))
        with trace(out=io.BytesIO()) as t:
            for step in range(steps):
                x = torch.zeros(16, 5) if step == 25 else torch.randn(16, 5)
                nn.functional.mse_loss(model(x).squeeze(1), x.sum(1)).backward()
                with torch.no_grad():
                    for p in model.parameters():
                        assert p.grad is not None
                        p.sub_(0.001 * p.grad / (p.grad.norm() + eps))
                        p.grad = None
        return [f for f in t.findings if f.severity != "note"]

    (found,) = train(0.0)
    assert brief([found]) == [("TT101", "error", "div")]
    assert (found.step, found.evidence["made_in_step"]) == (26, 25)
    assert "written to weights: module 0 (Linear) made" in found.message
    assert found.location is not None and "p.grad.norm()" in (found.location.code or "")
    assert train(1e-12) == []


def test_what_was_written_to_no_weights_leaves_a_later_fault_its_own() -> None:
    wrote = op(2, "div_", [2], [3], [ok(2), nan(3, 3, 3, previous=2)])
    later = [module("net", "weight", step=1), call(1, "net", [1], [2], [ok(1), nan(2)], step=1),
             loss(2, "NaN", 2, step=1), optimizer(step=1), closing(1)]  # fmt: skip
    found = find([wrote, loss(1, 1.0), closing(), *later], "TT101")
    assert brief(found) == [("TT101", "note", "div_"), ("TT101", "error", "net")]
    assert "written" not in found[1].message


def test_validation_loss_that_is_nan_is_an_error_though_no_backward_follows() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x - x.mean(0)) / x.std(0))

    model = Normalised()
    with warnings.catch_warnings(), torch.no_grad(), trace(out=io.BytesIO()) as t:
        warnings.simplefilter("ignore")
        scores = model(torch.randn(1, 4))
        nn.functional.cross_entropy(scores, torch.tensor([1])).item()
        (scores.argmax(-1) == 1).sum()
    assert [(f.code, f.severity, f.op) for f in t.findings] == [("TT101", "error", "std")]


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize(
    "read", [lambda y: y.argmax(-1), lambda y: torch.eq(y, y), lambda y: y.isnan()]
)
@pytest.mark.parametrize("healed", [False, True])
def test_nan_that_only_an_index_or_a_comparison_reads_is_an_error_unless_healed(
    read, level, healed
) -> None:
    class Ratio(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x

    with torch.no_grad(), trace(out=io.BytesIO(), level=level) as t:
        made = Ratio()(torch.zeros(2, 3))
        read(made.nan_to_num() if healed else made)
    severities = [f.severity for f in t.findings if f.code == "TT101"]
    assert severities == (["note"] if healed else ["error"])


def test_nan_that_a_float_op_heals_after_the_module_is_no_error() -> None:
    class Ratio(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x

    with torch.no_grad(), trace(out=io.BytesIO()) as t:
        ratio = Ratio()(torch.tensor([0.0, 1.0]))
        (ratio + 1).nan_to_num().sum()
    assert all(f.severity == "note" for f in t.findings)


@pytest.mark.parametrize(("updates", "says"), [
    ([], "the scaler has not decided yet"), ([True], "the scaler skipped the step"),
])  # fmt: skip
def test_under_a_scaler_gradients_that_are_bad_are_not_said_to_stay_finite(updates, says):
    scale = Action(step=0, seq=4, action="scale", detail={"scale": 1024.0})
    spoilt = Call(step=0, seq=5, phase="backward", module="a", outputs=[("weight", 5)],
                  tensors=[nan(5)])  # fmt: skip
    records = [
        bad_log(), loss(3, 1.0), scale, spoilt,
        *(optimizer(grad_norm="NaN", skipped=skipped) for skipped in updates), closing(),
    ]  # fmt: skip
    (found,) = find(records, "TT101")
    assert found.severity == "note"
    assert found.message.endswith(f"; the loss stays finite, the gradients do not: {says}")
    (found,) = find([*records[:3], closing()], "TT101")
    assert found.message.endswith("; harmless in this step: loss and gradients stay finite")


def test_what_is_not_seen_to_lead_to_bad_gradients_is_not_said_to_be_harmless():
    records = [bad_log(), loss(3, 1.0), optimizer(grad_norm="NaN"), closing()]
    (found,) = find(records, "TT101")
    assert found.severity == "note"
    assert found.message.endswith("; no way from it to what did harm in this step was seen")


def test_what_a_skipped_step_has_left_is_told_without_what_became_of_that_step():
    scale = Action(step=0, seq=4, action="scale", detail={"scale": 1024.0})
    spoilt = Call(step=0, seq=5, phase="backward", module="a", outputs=[("weight", 5)],
                  tensors=[nan(5)])  # fmt: skip
    left = [op(1, "div", [1], [2], [ok(1), nan(2)]), loss(3, 1.0), scale, spoilt, closing()]
    later = [
        call(1, "net", [9], [3], [nan(9, from_step=0), nan(3)], step=1), loss(2, "NaN", 3, step=1),
        optimizer(step=1, grad_norm="NaN"), closing(1),
    ]  # fmt: skip
    note, error = find([*left, *later], "TT101")
    assert (note.severity, error.severity) == ("note", "error")
    assert error.message == "div made 1 NaN of 4 from finite inputs; made at the end of step 0"


def unmeasured(id):
    return Tensor(id=id, shape=(4,), numel=4, unmeasured="subclass Scaled")


def test_what_was_not_measured_is_not_said_to_be_finite():
    made = op(1, "add", [1, 2], [3], [ok(1), unmeasured(2), nan(3)])
    (found,) = find([made, loss(2, "NaN", 3), optimizer()], "TT101")
    assert found.message == "add made 1 NaN of 4 from inputs not all of which were measured"
    assert found.explanation.startswith(
        "args[1] of add, a tensor of class Scaled, was not measured: f32 [4], which may"
    )
    assert found.evidence["placed"] == "not all that it may come from was measured"


def test_the_way_back_goes_on_through_what_was_not_measured():
    records = [
        op(1, "exp", [1], [2], [ok(1), inf(2)]), op(2, "wrap", [2], [3], [unmeasured(3)]),
        op(3, "view_as", [3], [4], [unmeasured(4)]), op(4, "add", [1, 4], [5], [nan(5)]),
        loss(5, "NaN", 5), optimizer(),
    ]  # fmt: skip
    (found,) = find(records, "TT101")
    assert found.message == "exp made 1 inf of 4 from finite inputs"
    # A tensor that is known to be finite ends it.
    records[1] = op(2, "where", [2], [3], [ok(3)])
    (found,) = find(records, "TT101")
    assert found.op == "add"


def test_the_way_back_goes_into_a_module_whose_output_was_not_measured():
    """Tensor parallel: what `b` took is an inf that code of `m` made, what `m` returned unknown."""
    records = [
        call(1, "", [1], [7], [ok(1)]), call(2, "m", [1], [5], [unmeasured(5)], parent=1),
        call(3, "m.a", [1], [2], [ok(2)], parent=2), call(4, "m.b", [3], [4], [inf(3), nan(4)],
        parent=2), call(5, "o", [6], [7], [nan(6), nan(7)], parent=1), loss(6, "NaN", 7),
        optimizer(),
    ]  # fmt: skip
    (found,) = find(records, "TT101")
    assert found.message.startswith("the code of m made 1 inf of 4 between the exit of m.a and")
    assert "measured" not in found.message


def test_code_after_a_module_whose_output_was_not_measured_may_be_innocent():
    records = [
        call(1, "", [1], [4], [ok(1)]), call(2, "enc", [1], [2], [unmeasured(2)], parent=1),
        call(3, "dec", [3], [4], [inf(3), nan(4)], parent=1), loss(6, "NaN", 4), optimizer(),
    ]  # fmt: skip
    (found,) = find(records, "TT101")
    assert "between the exit of enc and the entry of dec" in found.message
    assert found.message.endswith(", or a call before that did: not all was measured")
    assert found.explanation.startswith("output[0] of enc")


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_of_a_norm_that_was_spoilt_is_told_like_any_other(level, bad):
    def program():
        net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for step in range(4):
            if step == 2:
                net[1].weight.data[0] = bad
            optimizer.zero_grad()
            F.cross_entropy(net(torch.randn(16, 8)), torch.randint(2, (16,))).backward()
            optimizer.step()

    found = [f for f in find_live(program, level=level) if f.severity == "error"]
    assert [(f.step, f.code, f.param) for f in found] == [(2, "TT101", "1.weight")]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        return self.dense(x)


class Outer(nn.Module):
    """What makes -inf is its own code, or that of what calls it."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), Inner(), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.inner(torch.log(self.first(x) * 0)))


def test_minus_infinity_that_is_handed_down_is_of_the_code_that_made_it():
    def program():
        net = Outer()
        net(torch.randn(4, 8)).sum().backward()

    found = [f for f in find_live(program, narrow=False) if f.severity == "error"]
    assert [(f.code, f.module) for f in found] == [("TT101", "")]
    assert "between the exit of first (Linear) and the entry of inner (Inner)" in found[0].message


class Walked(list):
    """Calls that count how often somebody walks over all of them."""

    walks = 0

    def __iter__(self):
        Walked.walks += 1
        return super().__iter__()


def test_masks_do_not_make_each_call_walk_over_all_others(monkeypatch):
    """A sampler sets all but the best to -inf, in each of its turns."""

    def watched(step):
        plain, step.calls = step.calls, Walked(step.calls)
        try:
            return origins_of(step)
        finally:
            step.calls = plain

    monkeypatch.setattr("tensortrace.checks.nonfinite_forward.origins_of", watched)
    Walked.walks, made = 0, []
    for i in range(1, 50):
        tensors = [ok(2 * i), mask(2 * i + 1)]
        made.append(op(2 * i, "exp", [2 * i], [2 * i + 1], tensors))
        made.append(call(2 * i + 1, f"m{i}", [2 * i], [2 * i + 1], tensors))
    find([*made, optimizer()], "TT101")
    assert 1 <= Walked.walks <= 2


def test_weights_that_an_optimizer_spoils_while_it_evaluates_its_closure_are_its_own_doing():
    """strong_wolfe: the loss and the gradients are finite, and what it makes of them is NaN."""

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.tensor(v)) for v in (1.0, 0.5, 0.0))

        def forward(self, x):
            return self.a * torch.exp(-self.b * x) + self.c

    def program():
        net, x = Decay(), torch.linspace(0, 30, 100)
        y = 6 * torch.exp(-0.12 * x) - 1
        lbfgs = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            loss = (net(x) - y).pow(2).mean()
            loss.backward()
            return loss

        lbfgs.step(closure)

    (found,) = find_live(program, "TT101", "TT104")
    assert found.message == "a holds 1 NaN of 1: Decay made 100 NaN of 100"
    assert re.fullmatch(
        r"LBFGS.step\(\) at .*test_nonfinite_forward.py:\d+ wrote its weights between two "
        r"evaluations of its closure, unless the closure itself did; it had met losses up to "
        r"1.4e\+21 and gradients up to 8.5e\+22",
        found.explanation,
    )
    assert found.fix.startswith('a smaller lr, line_search_fn=None if it is "strong_wolfe"')


def test_weights_that_code_spoils_after_a_step_of_the_same_turn_are_not_the_optimizers_doing():
    def program():
        first, second = nn.Linear(4, 4), nn.Linear(4, 1)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (first, second)]
        for each, sgd in zip((first, second), optimizers, strict=True):
            each(torch.randn(8, 4)).square().mean().backward()
            sgd.step()
            with torch.no_grad():
                second.bias.fill_(math.nan)

    (found,) = find_live(program, "TT101", "TT104")
    assert "code between the steps did" in found.explanation


@pytest.mark.parametrize("level", ["module", "op"])
def test_weights_that_overflow_the_loss_and_then_their_layer_are_one_error(level):
    def program():
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
        sgd = torch.optim.SGD(model.parameters(), lr=5.0)
        x = torch.randn(64, 6)
        for _ in range(6):
            sgd.zero_grad()
            F.mse_loss(model(x), x[:, :1] * 2 - x[:, 1:2]).backward()
            sgd.step()

    (found,) = find_live(program, "TT101", level=level)
    assert (found.op, found.step) == ("mse_loss", 3)
    assert re.match(r"the update before moved all weights by \S+ times .* \(limit 10\); the result "
                    "is over the range", found.explanation)  # fmt: skip
    assert found.fix.startswith("a lower learning rate, warm-up, clip_grad_norm_")


@pytest.mark.parametrize(("ratios", "told"), [
    ((10.1, 11.0), True), ((10.0, 11.0), False), ((None, 11.0), True), ((None, None), False),
])  # fmt: skip
def test_an_update_that_moved_all_weights_far_is_told_of(ratios, told):
    before = closing(0, modules=row(update_ratio=dict(zip("ab", ratios, strict=True))))
    records = [before, bad_log(), op(2, "mean", [2], [3], [mask(3)]), loss(3, "-Infinity", 3)]
    later = [structs.replace(r, step=1) for r in records[1:]]
    (found,) = find([before, *later, optimizer(step=1)], "TT101")
    assert ("the update before moved all weights" in found.explanation) == told
    assert ("a lower learning rate" in found.fix) == told


def test_a_layer_that_is_not_on_the_way_to_what_overflowed_is_another_error():
    x, y = torch.randn(64, 6), torch.randn(64, 1)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 1), nn.Linear(6, 1)
            nn.init.constant_(self.b.weight, 100)

        def forward(self, x, scale):
            return self.a(x), self.b(x * scale)

    def program():
        model = Two()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(6):
            sgd.zero_grad()
            a, b = model(x, 1e37 if step == 5 else 1.0)
            left = F.mse_loss(a * (1e22 if step == 4 else 1.0), y)
            (left.detach() + F.mse_loss(b, y)).backward()
            sgd.step()

    found = find_live(program, "TT101")
    assert [(f.op, f.module, f.step) for f in found] == [("mse_loss", None, 4), ("linear", "b", 5)]


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_a_loop_of_torch_func_has_its_cause_in_its_step(wrong):
    """There is neither a backward() nor an optimizer to say that it did harm."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(parameters, x, bad):
        out = torch.func.functional_call(net, parameters, (x,))
        if bad:
            out = out + ((out * 0).log() if wrong == "forward" else (out * 0).sqrt())
        return out.square().mean()

    def program():
        weights = {name: p.detach() for name, p in net.named_parameters()}
        for step in range(8):
            grads, _ = torch.func.grad_and_value(loss)(weights, torch.randn(16, 4), step == 5)
            weights = {name: p - 0.01 * grads[name] for name, p in weights.items()}

    (found,) = find_live(program)
    op = {"forward": "log", "backward": "autograd.grad"}[wrong]
    assert (found.code, found.severity, found.op, found.step) == ("TT101", "error", op, 5)


@pytest.mark.parametrize(("op", "word"), [
    ("torch.Tensor.log_", "log"), ("LogBackward0", "log"), ("div.Tensor", "div"),
    ("masked_fill_.Scalar", "maskedfill"), ("log.default", "log"), ("autograd.grad", "grad"),
    ("new_full", "newfull"), (None, ""),
])  # fmt: skip
def test_the_plain_name_of_an_op(op, word):
    assert plain_op(op) == word


def test_an_overload_that_is_called_by_its_name_is_the_op():
    """An exported program calls those, and a backend that rewrites frames."""
    aten = torch.ops.aten

    class Net(nn.Module):
        def forward(self, x):
            return aten.div.Tensor(x, aten.sum.dim_IntList(x, [-1], True))

    (found,) = find_live(lambda: Net()(torch.zeros(2, 3)), level="op")
    assert (found.severity, found.op) == ("error", "div.Tensor")
    masked = lambda: aten.masked_fill.Scalar(torch.ones(3), torch.ones(3).bool(), -torch.inf)  # noqa: E731
    assert find_live(masked, level="op") == []
