from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.records import Action, Finding, Param, Scalar, Tensor
from tests.builders import HERE
from tests.checks import brief, call, closing, find, loss, nan, ok, op, optimizer, param
from tests.checks.traced import find_live


def test_a_parameter_that_is_bad_before_the_step_is_an_error():
    records = [
        optimizer(), param(1001, "a.weight", ok(1)), param(1002, "b.weight", nan(2)),
        param(1003, "b.bias", nan(3)), closing(),
    ]  # fmt: skip
    (found,) = find(records, "TT104")
    assert brief([found]) == [("TT104", "error", "b")]
    assert found.param == "b.weight"
    assert found.message.endswith("1 NaN of 4 before this step, and 1 more parameter")
    assert found.evidence["parameters"] == ["b.weight", "b.bias"]


def test_an_update_that_is_bad_although_the_gradient_is_not_is_an_error():
    taken = param(1001, "a.weight", ok(1), grad=ok(2), update_norm="NaN")
    (found,) = find([optimizer(), taken, closing()], "TT104")
    assert "was written NaN or infinity by this optimizer step" in found.message


def test_finite_parameters_are_silent():
    huge = ok(1, max=3e38, norm=3e38)
    records = [optimizer(), param(1001, "a.weight", huge, update_norm=1e30), closing()]
    assert find(records, "TT104") == []


def test_a_learned_mask_of_minus_infinity_is_a_note():
    records = [optimizer(), param(1001, "a.mask", ok(1, neginf=3)), closing()]
    assert brief(find(records, "TT104")) == [("TT104", "note", "a")]


def test_what_a_bad_loss_does_to_the_parameters_is_only_counted():
    records = [
        op(1, "log", [1], [2], [ok(1), nan(2)]), loss(2, "NaN", 2), optimizer(grad_norm="NaN"),
        param(1001, "a.weight", ok(3), grad=nan(4), update_norm="NaN"), closing(),
        loss(1, "NaN", step=1), optimizer(step=1, grad_norm="NaN"),
        param(1001, "a.weight", nan(3), step=1, grad=nan(4), update_norm="NaN"), closing(1),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT101"]


def test_weights_that_came_in_bad_are_told_beside_the_module_that_shows_them():
    records = [
        call(1, "fc", [1], [2], [ok(1), nan(2)]), loss(2, "NaN", 2), optimizer(grad_norm="NaN"),
        param(1001, "fc.weight", nan(3), grad=nan(4), update_norm="NaN"), closing(),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT101", "TT104"]


def test_after_a_bad_update_all_follows_from_it():
    records = [
        optimizer(), param(1001, "fc.weight", ok(1), grad=ok(2), update_norm="NaN"), closing(),
        call(1, "fc", [1], [2], [ok(1), nan(2)], step=1), loss(2, "NaN", 2, step=1),
        optimizer(step=1, grad_norm="NaN"), closing(1),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT104"]


@pytest.mark.parametrize("evaluations", [10, 4])
def test_a_closure_that_meets_infinity_in_a_later_evaluation_is_told_once(evaluations):
    """LBFGS, whose record has the norm of the first; of four, the next step's weights are bad."""

    def program():
        model = nn.Linear(4, 1)
        lbfgs = torch.optim.LBFGS(model.parameters(), lr=1e4, max_iter=evaluations)
        x, y = torch.randn(32, 4), torch.randn(32, 1)

        def closure():
            lbfgs.zero_grad()
            loss = (model(x) - y).pow(4).mean()
            loss.backward()
            return loss

        for _ in range(4):
            lbfgs.step(closure)

    (found,) = find_live(program, "TT101", "TT102", "TT103", "TT104")
    assert (found.code, found.op, found.step) == ("TT101", "pow", 0)


def test_weights_that_a_replay_came_to_are_told_once():
    """Live, with what a loop does to them: one finding, with the parameter's name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=lambda record: None) as t:
        for i in range(5):
            if i == 3:
                with torch.no_grad():
                    model[2].bias[1] = math.nan
            optimizer.zero_grad()
            model(torch.randn(32, 8)).square().mean().backward()
            optimizer.step()
    (found,) = [f for f in t.findings if f.severity != "note"]
    assert (found.code, found.step, found.module, found.param) == ("TT101", 3, "2", "2.bias")
    assert found.message.startswith("2.bias holds 1 NaN of 4: module 2 (Linear) made 32 NaN of 128")
    assert "its weights are not" in found.explanation


def test_weights_that_were_spoilt_in_place_after_the_update_name_what_did_it() -> None:
    def train(eps: float) -> list[Finding]:
        torch.manual_seed(0)
        table, head = nn.Embedding(40, 8, padding_idx=0), nn.Linear(8, 2)
        optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (table, head)]
        with trace(out=io.BytesIO()) as t:
            for step in range(12):
                ids = torch.randint(1, 40, (16, 5))
                ids[:, 4] *= step < 8  # from then on padding
                loss = nn.functional.cross_entropy(head(table(ids).mean(1)), ids[:, 0] % 2)
                for each in optimizers:
                    each.zero_grad()
                loss.backward()
                for each in optimizers:
                    each.step()
                if step >= 4:
                    with torch.no_grad():
                        table.weight.div_(table.weight.norm(dim=1, keepdim=True) + eps)
        return [f for f in t.findings if f.severity != "note"]

    (found,) = train(0.0)
    assert brief([found]) == [("TT104", "error", "")]
    assert "written at the end of step 4, where div_ made them" in found.message
    assert found.location is not None and "table.weight.div_" in (found.location.code or "")
    assert "the divisor has 1 zero" in found.explanation
    assert train(1e-8) == []


def test_an_update_that_is_not_finite_is_told_at_the_line_of_the_step():
    step = optimizer(seq=5, location=HERE)
    spoilt = param(6, "fc.weight", ok(1), grad=ok(2), update_norm="NaN")
    (found,) = find([step, spoilt, closing()], "TT104")
    assert found.location == HERE
    assert "the update itself divides by zero" in found.explanation
    held = param(6, "fc.weight", nan(1), grad=ok(2))
    (found,) = find([step, held, closing()], "TT104")
    assert found.location is None


@pytest.mark.parametrize(("lr", "words"), [
    (["NaN"], "but the learning rate is NaN"), (["Infinity"], "but the learning rate is inf"),
    ([0.1, "NaN"], "but the learning rate of group 1 is NaN"),
    ([0.1], "the update itself divides by zero"), ([None], "the update itself divides by zero"),
])  # fmt: skip
def test_a_learning_rate_that_is_not_finite_is_blamed(lr: list[Scalar | None], words: str) -> None:
    spoilt = param(6, "fc.weight", ok(1), grad=ok(2), update_norm="NaN")
    # Another step of it, and another optimizer's, have other rates.
    others = [optimizer(seq=1, index=1, lr=["NaN"]), optimizer(seq=2, lr=[1e9])]
    (found,) = find([*others, optimizer(seq=5, lr=lr), spoilt, closing()], "TT104")
    assert words in found.explanation
    assert ("what sets the learning rate" in (found.fix or "")) is ("the learning rate" in words)


@pytest.mark.parametrize(("rates", "key", "words"), [
    ([0.1], "0.weight_decay", "but the weight decay is NaN"),
    ([0.1, 0.1], "1.momentum", "but the momentum of group 1 is NaN"),
    ([0.1], "0.betas", "but the betas hold NaN"),
])  # fmt: skip
def test_another_number_of_a_schedule_is_blamed(rates: list[float], key: str, words: str) -> None:
    spoilt = param(6, "fc.weight", ok(1), grad=ok(2), update_norm="NaN")
    (found,) = find([optimizer(seq=5, lr=rates, stray={key: "NaN"}), spoilt, closing()], "TT104")
    assert words in found.explanation
    assert f"what sets the {key.split('.')[1].replace('_', ' ')} in" in (found.fix or "")


@pytest.mark.parametrize(("of", "name", "value", "words"), [
    (torch.optim.AdamW, "weight_decay", math.nan, "the weight decay is NaN"),
    (torch.optim.SGD, "momentum", math.inf, "the momentum is inf"),
    (torch.optim.Adam, "betas", (0.9, math.nan), "the betas hold NaN"),
])  # fmt: skip
def test_number_of_a_group_that_a_schedule_spoils_is_seen(
    of: Callable[..., torch.optim.Optimizer], name: str, value: Any, words: str
) -> None:
    def program() -> None:
        model = nn.Linear(6, 4)
        optimizer = of(model.parameters(), lr=0.01, **{name: 0.1} if name != "betas" else {})
        for step in range(5):
            if step == 3:
                optimizer.param_groups[0][name] = value
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()

    (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.step) == ("TT104", 3)
    assert words in found.explanation


OPTIMIZERS = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad,
              torch.optim.RMSprop]  # fmt: skip


@pytest.mark.parametrize("of", OPTIMIZERS, ids=lambda of: str(of.__name__))
@pytest.mark.parametrize("total", [3, 30])
def test_a_schedule_past_its_end_is_what_spoils_the_weights(
    of: Callable[..., torch.optim.Optimizer], total: int
) -> None:
    def program(floor: float = -math.inf) -> None:
        model = nn.Linear(6, 4)
        optimizer = of(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: float(np.power(max(floor, 1 - step / total), 0.9))
        )
        for _ in range(total + 4):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            schedule.step()

    with np.errstate(invalid="ignore"):
        (found,) = [f for f in find_live(program) if f.severity != "note"]
    assert (found.code, found.step) == ("TT104", total + 1)
    assert "the learning rate is NaN" in found.explanation
    assert "max(0.0, 1 - step / total) ** 0.9" in (found.fix or "")
    assert [f.code for f in find_live(lambda: program(0.0)) if f.severity != "note"] == []


def spoilt(write: Callable[[nn.Parameter], None], at: int) -> Callable[[], None]:
    def program() -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            if step == at:
                with torch.no_grad():
                    write(model[0].weight)
            loss = (model(torch.randn(16, 8)) - torch.randn(16, 1)).square().mean()
            loss.backward()
            sgd.step()
            sgd.zero_grad()

    return program


def set_one(weight: nn.Parameter) -> None:
    weight[0, 0] = math.nan


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data / 0


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize(
    ("write", "at", "starts"),
    [
        (set_one, 0, "0.weight holds 1 NaN of 64: module 0 (Linear) made 16 NaN of 128"),
        (set_one, 2, "0.weight holds 1 NaN of 64: module 0 (Linear) made 16 NaN of 128"),
        (replace_data, 2, "0.weight holds "),
        (lambda weight: weight.div_(torch.zeros(8, 8)), 2, "div_ made "),
    ],
)
def test_weights_spoilt_by_hand_are_one_finding_at_each_level(
    write: Callable[[nn.Parameter], None], at: int, starts: str, level: str
) -> None:
    (found,) = [f for f in find_live(spoilt(write, at), level=level) if f.severity != "note"]
    assert (found.code, found.step, found.param) == ("TT101", at, "0.weight")
    assert found.message.startswith(starts)


def clip(seq: int, total_norm: Scalar) -> Action:
    detail = {"max_norm": 1.0, "total_norm": total_norm}
    return Action(step=0, seq=seq, action="clip", optimizer=0, detail=detail)


def unmeasured(seq: int) -> Param:
    grad = Tensor(id=2, shape=(4,), numel=4, unmeasured="not asked")
    return param(seq, "fc.weight", ok(1), grad=grad, update_norm="NaN")


def test_a_gradient_that_was_not_measured_is_not_called_finite():
    (found,) = find([optimizer(seq=5, grad_norm=None), unmeasured(6), closing()])
    assert found.code == "TT104"
    assert "the gradient was not measured" in found.explanation
    assert "were finite" not in found.explanation


@pytest.mark.parametrize("rate", ["NaN", "Infinity"])
def test_a_learning_rate_is_told_without_a_word_of_gradients_that_are_not_known(rate: str):
    step = optimizer(seq=5, grad_norm=None, lr=[rate])
    (found,) = find([step, unmeasured(6), closing()], "TT104")
    assert found.explanation.startswith("the learning rate is ")


def test_a_gradient_that_was_not_measured_is_known_by_the_norm_that_it_was_clipped_by():
    step = optimizer(seq=5, grad_norm=None)
    (found,) = find([clip(4, 3.0), step, unmeasured(6), closing()])
    assert (found.code, "gradients were finite" in found.explanation) == ("TT104", True)
    (found,) = find([clip(4, "NaN"), step, unmeasured(6), closing()])
    assert (found.code, found.param) == ("TT102", "fc.weight")
    assert found.message == (
        "gradients were clipped by a norm that is not finite, fc.weight's too; no backward call "
        "that was seen made it"
    )
