"""Optimizer steps: what is said about each parameter, against float64 oracles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tensortrace import trace
from tensortrace.capture import compiled
from tensortrace.capture.loop import optimizers
from tensortrace.capture.loop.optimizers import SAMPLE
from tensortrace.checks import all_checks
from tensortrace.export.contents import found_again
from tensortrace.records import End, Optimizer, Param, Step
from tensortrace.run import open_run
from tests.capture import Net, Recorded, record


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone().double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().double() for name, p in model.named_parameters()}


def total(tensors: dict[str, torch.Tensor]) -> float:
    """The L2 norm over all of them."""
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors.values()))


def params(records: Recorded, step: int = 0) -> dict[str, Param]:
    return {param.name: param for param in records.of(Param, step=step)}


def test_optimizer_record_says_what_stepped() -> None:
    model = Net()
    optimizer = torch.optim.SGD(
        [
            {"params": model.net.parameters(), "lr": 0.1},
            {"params": model.head.parameters(), "lr": torch.tensor(0.5)},
        ]
    )

    def program(t: Any) -> None:
        for _ in range(2):
            train(model, optimizer, torch.rand(2, 4))

    records = record(program)
    first, second = records.of(Optimizer)
    assert (first.cls, first.index, first.skipped, first.no_grad) == ("SGD", 0, False, 0)
    assert first.lr == [0.1, 0.5]
    assert first.parameters == [name for name, _ in model.named_parameters()]
    assert second.parameters is None
    assert first.location is not None
    assert first.location.function == "train"
    assert records.steps()[0].lr == [0.1, 0.5]


@pytest.mark.parametrize(("lr", "told"), [(math.inf, "Infinity"), (torch.tensor(math.nan), "NaN")])
def test_a_learning_rate_that_is_not_finite_leaves_the_log_readable(
    lr: Any, told: str, tmp_path: Path
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with trace(tmp_path / "log.jsonl") as t:
        train(model, optimizer, torch.rand(2, 4))
    run = open_run(tmp_path / "log.jsonl")
    lines = [r for r in run.records() if isinstance(r, (Optimizer, Step))]
    assert [line.lr for line in lines] == [[told], [told]]
    again = found_again(run, all_checks(), {}).findings
    assert [(f.code, f.message) for f in again] == [(f.code, f.message) for f in t.findings]


def test_a_learning_rate_on_a_device_is_not_waited_for() -> None:
    assert optimizers._rate(torch.tensor(0.1, device="meta")) is None


def test_parameters_are_listed_again_when_they_change() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)

    def program(t: Any) -> None:
        train(model, optimizer, torch.rand(2, 4))
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.01})
        train(model, optimizer, torch.rand(2, 4))

    first, second = record(program).of(Optimizer)
    assert first.parameters == ["net.0.weight", "net.0.bias"]
    assert second.parameters == ["net.0.weight", "net.0.bias", "head.weight", "head.bias"]
    assert second.lr == [0.1, 0.01]


def test_total_gradient_norm_is_that_of_an_oracle() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, torch.Tensor] = {}

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).square().sum().backward()
        seen.update(grads(model))
        optimizer.step()

    records = record(program)
    assert records.of(Optimizer)[0].grad_norm == pytest.approx(total(seen), rel=1e-6)
    assert records.steps()[0].grad_norm == pytest.approx(total(seen), rel=1e-6)


def test_accumulated_gradient_is_measured_as_the_optimizer_sees_it() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, torch.Tensor] = {}

    def program(t: Any) -> None:
        for _ in range(3):
            model(torch.rand(2, 4)).square().sum().backward()
        seen.update(grads(model))
        optimizer.step()

    records = record(program)
    last = records.of(Optimizer)[0].step
    for name, param in params(records, last).items():
        assert param.grad is not None
        assert param.grad.norm == pytest.approx(seen[name].norm().item(), rel=1e-6)


def test_parameter_is_as_it_was_before_the_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    records = record(lambda t: train(model, optimizer, torch.rand(2, 4)))
    assert params(records).keys() == before.keys()
    for name, param in params(records).items():
        assert param.value.shape == tuple(before[name].shape)
        assert param.value.norm == pytest.approx(before[name].norm().item(), rel=1e-6)
        assert param.value.max == before[name].max().item()
        assert param.optimizer == 0
        assert param.changed


def test_update_of_sgd_is_the_learning_rate_times_the_gradient() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    records = record(lambda t: train(model, optimizer, torch.rand(2, 4)))
    for name, param in params(records).items():
        update = 0.1 * grads(model)[name].norm().item()
        assert param.update_norm == pytest.approx(update, rel=1e-4)
        assert param.update_ratio == pytest.approx(update / before[name].norm().item(), rel=1e-4)
        assert param.sampled == before[name].numel()


@pytest.mark.parametrize("kernel", ["compiled", "torch"])
def test_update_of_a_large_parameter_is_estimated_from_a_sample(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch":
        monkeypatch.setattr(compiled, "kernel", None)
    torch.manual_seed(0)
    model = nn.Linear(500, 400, bias=False)  # 200,000 elements
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)["weight"].norm().item()
    records = record(lambda t: train(model, optimizer, torch.rand(2, 500)))
    (param,) = records.of(Param)
    change = 0.1 * grads(model)["weight"].norm().item()
    assert SAMPLE / 2 < param.sampled <= SAMPLE
    assert param.update_norm == pytest.approx(change, rel=0.03)
    assert param.update_ratio == pytest.approx(change / before, rel=0.03)


def test_parameter_at_zero_has_an_update_and_no_ratio() -> None:
    model = nn.Linear(4, 2)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = record(lambda t: train(model, optimizer, torch.rand(2, 4)))
    bias = params(records)["bias"]
    assert bias.update_norm == pytest.approx(0.1 * grads(model)["bias"].norm().item(), rel=1e-4)
    assert bias.update_ratio is None


def test_warm_up_from_a_learning_rate_of_zero_writes_and_does_not_move() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)

    def program(t: Any) -> None:
        for _ in range(3):
            train(model, optimizer, torch.rand(2, 4))
            schedule.step()

    records = record(program)
    assert [o.lr for o in records.of(Optimizer)] == [[pytest.approx(lr)] for lr in (0.0, 0.1, 0.2)]
    assert [step.lr[0] for step in records.steps()] == pytest.approx([0.0, 0.1, 0.2])
    assert {p.update_norm for p in records.of(Param, step=0)} == {0.0}
    assert all(p.update_norm for p in records.of(Param, step=1))
    assert [step.update for step in records.steps()] == [1, 2, 3]


def test_parameter_without_a_gradient_is_counted_and_has_no_record() -> None:
    model, unused = Net(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *unused.parameters()], lr=0.1)
    records = record(lambda t: train(model, optimizer, torch.rand(2, 4)))
    assert records.of(Optimizer)[0].no_grad == 2
    assert len(params(records)) == 4


def test_frozen_parameter_held_by_the_optimizer_has_its_name() -> None:
    model = Net()
    model.net.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = record(lambda t: train(model, optimizer, torch.rand(2, 4)))
    (step,) = records.of(Optimizer)
    assert step.no_grad == 2
    assert step.parameters == [name for name, _ in model.named_parameters()]


def test_parameter_of_a_module_that_is_never_called_has_its_name() -> None:
    # MultiheadAttention hands the weights of its out_proj to a function.
    model = nn.MultiheadAttention(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        x = torch.rand(3, 1, 4)
        model(x, x, x)[0].sum().backward()
        optimizer.step()

    records = record(program)
    assert set(params(records)) == {name for name, _ in model.named_parameters()}
    assert params(records)["out_proj.weight"].module == "out_proj"


def test_parameter_that_no_module_owns_is_named_by_its_place_in_the_optimizer() -> None:
    w, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [w]}, {"params": [v], "lr": 1.0}], lr=0.1)

    def program(t: Any) -> None:
        (w * v).sum().backward()
        optimizer.step()

    records = record(program)
    assert [(p.name, p.module) for p in records.of(Param)] == [
        ("group0.0", None),
        ("group1.0", None),
    ]


def test_what_a_closure_makes_is_what_its_optimizer_is_said_to_take() -> None:
    """Lightning and skorch always give one, with the forward and backward pass inside."""
    model, x = Net(), torch.rand(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, taken = values(model), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        taken.append(grads(model))
        return loss

    def program(t: Any) -> None:
        for _ in range(2):
            optimizer.step(closure)

    records = record(program)
    assert records.of(Optimizer)[0].parameters == list(before)
    for step, gradients in enumerate(taken):
        (found,) = records.of(Optimizer, step=step)
        assert (found.no_grad, found.grad_norm) == (0, pytest.approx(total(gradients), rel=1e-5))
        assert params(records, step).keys() == before.keys()
    for name, param in params(records).items():
        assert param.value.norm == pytest.approx(before[name].norm().item(), rel=1e-5)
        assert param.update_norm == pytest.approx(0.1 * taken[0][name].norm().item(), rel=1e-4)


def test_an_optimizer_that_never_calls_its_closure_is_said_to_move_nothing_known() -> None:
    class Lazy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()

    model = Net()
    optimizer = Lazy(model.parameters(), lr=0.1)
    records = record(lambda t: optimizer.step(lambda: 0.0))
    (found,) = records.of(Optimizer)
    assert (found.no_grad, records.of(Param)) == (4, [])
    assert records.actions("tracer_error") == []


def test_parameter_that_was_made_in_inference_mode_is_followed() -> None:
    """Torch does not count how often it is written."""

    @torch.inference_mode()
    def program(t: Any) -> None:
        weight = nn.Parameter(torch.ones(3), requires_grad=False)
        weight.grad = torch.ones(3)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(2):
            optimizer.step()

    records = record(program)
    params = records.of(Param)
    assert [param.changed for param in params] == [True, True]
    # sqrt(3) * 0.1 of sqrt(3)
    assert params[0].update_ratio == pytest.approx(0.1)
    assert records.of(End)[0].updates == 2


def test_gradients_of_a_backward_in_inference_mode_are_followed() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        for _ in range(2):
            loss = model(torch.rand(2, 4)).sum()
            with torch.inference_mode():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    records = record(program)
    assert records.actions("tracer_error") == []
    assert [param.grad is not None for param in records.of(Param)] == [True] * 8


def test_parameter_that_the_optimizer_did_not_write_is_not_changed() -> None:
    class Picky(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.param_groups[0]["params"][0].sub_(1.0)

    model = nn.Linear(4, 2)
    optimizer = Picky(model.parameters())
    records = record(lambda t: train(model, optimizer, torch.rand(2, 4)))
    found = params(records)
    assert {name: param.changed for name, param in found.items()} == {"weight": True, "bias": False}
    assert found["weight"].update_norm == pytest.approx(math.sqrt(8))
    assert found["bias"].update_norm == 0.0
    assert records.of(Optimizer)[0].cls == "Picky"


def test_norm_in_the_step_line_is_that_before_clipping() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, torch.Tensor] = {}

    def program(t: Any) -> None:
        (model(torch.rand(2, 4)) * 100).square().sum().backward()
        seen.update(grads(model))
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    records = record(program)
    assert records.steps()[0].grad_norm == pytest.approx(total(seen), rel=1e-5)
    assert records.of(Optimizer)[0].grad_norm == pytest.approx(1.0, rel=1e-3)
    for name, param in params(records).items():
        assert param.grad is not None
        clipped = seen[name].norm().item() / total(seen)
        assert param.grad.norm == pytest.approx(clipped, rel=1e-3)


def test_gradient_clipped_by_value_is_measured_after_it() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        (model(torch.rand(2, 4)) * 100).square().sum().backward()
        clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()

    for param in record(program).of(Param):
        assert param.grad is not None
        assert param.grad.max is not None
        assert param.grad.max <= 0.01


def test_gradient_replaced_by_hand_is_measured_as_it_is() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        model(torch.rand(2, 4)).sum().backward()
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
        optimizer.step()

    for param in record(program).of(Param):
        assert param.grad is not None
        assert (param.grad.min, param.grad.max) == (3.0, 3.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_norm_that_is_not_finite_is_written_by_its_name(value: float) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program(t: Any) -> None:
        (model(torch.rand(2, 4)) * value).sum().backward()
        optimizer.step()

    records = record(program)
    name = "NaN" if math.isnan(value) else "Infinity"
    assert records.of(Optimizer)[0].grad_norm == name
    assert records.steps()[0].grad_norm == name


def scaled(model: nn.Module, optimizer: Any, scaler: Any, factors: list[float]) -> Any:
    def program(t: Any) -> None:
        for factor in factors:
            optimizer.zero_grad()
            loss = (model(torch.rand(2, 4)) * factor).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

    return program


def test_scaler_that_skips_counts_no_update_and_ends_the_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = values(model)
    records = record(scaled(model, optimizer, scaler, [1.0, math.inf, 1.0]))
    assert [o.skipped for o in records.of(Optimizer)] == [False, True, False]
    assert [o.step for o in records.of(Optimizer)] == [0, 1, 2]
    assert [(s.step, s.update, s.skipped) for s in records.steps()] == [
        (0, 1, False), (1, 1, True), (2, 2, False),
    ]  # fmt: skip
    assert {p.changed for p in records.of(Param, step=1)} == {False}
    assert [r.update for r in records.modules(module="")] == [0, 1, 1]
    assert not torch.equal(before["head.weight"], values(model)["head.weight"])


def test_loss_is_what_entered_the_scaler() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    records = record(scaled(model, optimizer, scaler, [1.0]))
    (loss,) = records.actions("loss")
    mean = records.op("mean")
    assert loss.tensor == mean.outputs[0][1]
    assert loss.detail["value"] == records.output(mean).mean == records.steps()[0].loss


def test_scaler_says_its_scale_and_whether_it_found_infinity() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    records = record(scaled(model, optimizer, scaler, [1.0, math.inf, 1.0]))
    # An overflow halves the scale.
    assert [a.detail for a in records.actions("scale")] == [
        {"scale": 64.0}, {"scale": 64.0}, {"scale": 32.0},
    ]  # fmt: skip
    assert [a.detail for a in records.actions("unscale")] == [
        {"scale": 64.0, "found_inf": 0.0}, {"scale": 64.0, "found_inf": 1.0},
        {"scale": 32.0, "found_inf": 0.0},
    ]  # fmt: skip


def test_columns_of_a_scaled_step_are_those_of_the_unscaled_loss() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    records = record(scaled(model, optimizer, scaler, [1.0]))
    columns = records.steps()[0].modules
    grad = grads(model)
    both = max(
        grad[name].norm().item() / math.sqrt(grad[name].numel())
        for name in ("head.weight", "head.bias")
    )
    assert columns.param_grad_rms[columns.path.index("head")] == pytest.approx(both, rel=1e-4)
    assert records.steps()[0].grad_norm == pytest.approx(total(grad), rel=1e-5)


def test_scaler_without_unscale_measures_what_it_unscaled_itself() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def program(t: Any) -> None:
        scaler.scale(model(torch.rand(2, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    records = record(program)
    assert records.of(Optimizer)[0].grad_norm == pytest.approx(total(grads(model)), rel=1e-5)
    assert len(records.actions("unscale")) == 1


def test_scaler_that_is_off_is_not_there() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def program(t: Any) -> None:
        for _ in range(2):
            scaler.scale(model(torch.rand(2, 4)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

    records = record(program)
    assert records.actions("scale") == records.actions("unscale") == []
    assert len(records.actions("loss")) == 2
    assert [s.update for s in records.steps()] == [1, 2]


def test_scaler_under_autocast_trains_a_step_a_turn() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def program(t: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.rand(2, 4)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    records = record(program)
    assert [(c.step, c.autocast) for c in records.modules(module="head")] == [
        (0, "cpu:bfloat16"), (1, "cpu:bfloat16"),
    ]  # fmt: skip
    assert records.output(records.modules(module="head")[0]).dtype == "bfloat16"
    assert [s.update for s in records.steps()] == [1, 2]


def rms(x: torch.Tensor) -> float:
    return (x.double().square().mean().sqrt()).item()


def test_columns_of_the_step_line_are_those_of_an_oracle() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, before = torch.randn(6, 4), values(model)
    hidden = model.net(x).detach().requires_grad_()
    out = model.head(hidden)
    out.retain_grad()
    out.square().sum().backward()
    model.zero_grad()
    step = record(lambda t: train(model, optimizer, x)).steps()[0]
    columns, grad = step.modules, grads(model)
    assert columns.path == ["", "net", "net.0", "net.1", "head"]
    row = {path: i for i, path in enumerate(columns.path)}
    assert hidden.grad is not None
    assert out.grad is not None
    close = pytest.approx
    assert columns.output_rms[row["net.1"]] == close(rms(hidden), rel=1e-4)
    assert columns.output_rms[row["head"]] == close(rms(out), rel=1e-4)
    assert columns.zero_frac[row["net.1"]] == close((hidden == 0).double().mean().item(), rel=1e-4)
    assert columns.zero_frac[row["net.0"]] == 0.0
    assert columns.grad_rms[row["net.1"]] == close(rms(hidden.grad), rel=1e-4)
    assert columns.grad_rms[row["head"]] == close(rms(out.grad), rel=1e-4)
    assert columns.param_grad_rms[row["head"]] == close(
        max(rms(grad["head.weight"]), rms(grad["head.bias"])), rel=1e-4
    )
    assert columns.param_grad_rms[row["net.1"]] is None
    ratio = 0.1 * grad["head.weight"].norm() / before["head.weight"].norm()
    assert columns.update_ratio[row["head"]] == close(ratio.item(), rel=1e-3)
    assert columns.update_ratio[row["net"]] is None
    assert step.loss == close(out.detach().double().square().sum().item(), rel=1e-5)


def test_columns_of_a_reused_module_are_the_largest_of_its_calls() -> None:
    records = record(lambda t: [nn.Identity()(torch.full((3,), x)) for x in (1.0, -5.0, 2.0)])
    assert max(r for r in records.steps()[0].modules.output_rms if r is not None) == 5.0


def test_flags_of_the_step_line_say_what_a_module_made() -> None:
    class Makes(nn.Module):
        def forward(self, x: torch.Tensor, value: float) -> torch.Tensor:
            return x * value

    model = nn.ModuleDict({"fine": Makes(), "nan": Makes(), "inf": Makes()})

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> int:
            self.parts["fine"](x, 1.0)
            self.parts["nan"](x, math.nan)
            self.parts["inf"](x, math.inf)
            return 0

    columns = record(lambda t: Root()(torch.ones(2)), checks=()).steps()[0].modules
    assert dict(zip(columns.path, columns.flags, strict=True)) == {
        "": "", "parts.fine": "", "parts.nan": "no", "parts.inf": "io",
    }  # fmt: skip


class Lookahead(torch.optim.Optimizer):
    """An optimizer whose step calls that of another one."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_inside_another_hides_no_op_of_the_loop(with_closure: bool) -> None:
    model = Net()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1))

    def program(t: Any) -> None:
        for _ in range(3):
            loss = model(torch.rand(2, 4)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step((lambda: None) if with_closure else None)

    records = record(program)
    assert [call.step for call in records.ops() if call.op == "square"] == [0, 1, 2]
    assert [action.step for action in records.actions("loss")] == [0, 1, 2]


def test_the_first_step_of_one_that_takes_the_number_of_another_says_so():
    records = Recorded()
    models = nn.Linear(3, 2), nn.Linear(3, 2)
    with trace(out=records.append):
        for model, steps in zip((*models, models[1]), (2, 1, 3), strict=True):
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(steps):
                model(torch.ones(4, 3)).sum().backward()
                sgd.step()
                sgd.zero_grad()
            del sgd
    told = [(r.index, r.anew) for r in records.of(Optimizer)]
    assert told == [(0, new) for new in (False, False, True, False, False, False)]


class Plain(torch.optim.Optimizer):
    """Writes what counts in no version."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [Plain, torch.optim.SGD])
def test_one_made_anew_has_the_number_of_that_which_stepped_the_same_weights(kind: Any) -> None:
    records = Recorded()
    with trace(out=records.append):
        for model in (nn.Linear(3, 2), nn.Linear(3, 2)):
            for _ in range(3):
                optimizer = kind(model.parameters(), lr=0.1)
                for _ in range(25):
                    optimizer.zero_grad()
                    model(torch.ones(4, 3)).sum().backward()
                    optimizer.step()
                del optimizer
    told = [(r.index, r.anew) for r in records.of(Optimizer)]
    assert told == [(0, False)] * 75 + [(1, False)] * 75


def test_one_at_the_addresses_of_weights_that_are_gone_has_another_number() -> None:
    records = Recorded()
    with trace(out=records.append):
        for _ in range(6):
            model = nn.Linear(3, 2)
            plain = Plain(model.parameters(), lr=0.1)
            for _ in range(25):
                plain.zero_grad()
                model(torch.ones(4, 3)).sum().backward()
                plain.step()
            del model, plain
    assert [r.index for r in records.of(Optimizer)] == [i for i in range(6) for _ in range(25)]
