"""What is to blame where the damage shows far from it, and what is not to blame at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensortrace.records import Finding
from tests.checks.traced import find_live

Model = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def validated() -> None:
    """Whatever was compiled before in this process: torch.compile turns the arguments' test off."""
    torch.distributions.Distribution.set_default_validate_args(True)


def loud(program: Callable[[], Any], **options: Any) -> list[Finding]:
    return [f for f in find_live(program, **options) if f.severity != "note"]


def code_of(finding: Finding) -> str:
    assert finding.location is not None
    assert finding.location.code is not None
    return finding.location.code


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("heal", [
    lambda p, ok: p.nan_to_num(0.0), lambda p, ok: torch.where(ok.any(-1, keepdim=True), p, 0.0),
])  # fmt: skip
def test_a_row_that_is_masked_throughout_and_healed_is_no_fault(heal: Any, level: str) -> None:
    """The backward of softmax makes NaN, which that of masked_fill multiplies away."""

    def program() -> None:
        qkv, out = nn.Linear(8, 24), nn.Linear(8, 1)
        optimizer = torch.optim.Adam([*qkv.parameters(), *out.parameters()])
        for step in range(8):
            q, k, v = qkv(torch.randn(4, 6, 8)).chunk(3, -1)
            ok = torch.arange(6) < torch.tensor([6, 0 if step == 3 else 5, 4, 3])[:, None, None]
            scores = (q @ k.transpose(1, 2)).masked_fill(~ok, -math.inf)
            mixed = heal(F.softmax(scores, -1), ok) @ v
            optimizer.zero_grad()
            out(mixed.mean(1)).square().mean().backward()
            optimizer.step()
        assert all(bool(p.isfinite().all()) for p in qkv.parameters())

    assert loud(program, level=level) == []


def divided(grad: Tensor, by: Tensor) -> Tensor:
    return grad.div_(by)  # the cause


def assigned(grad: Tensor, by: Tensor) -> Tensor:
    return grad / by  # the cause


@pytest.mark.parametrize("bad_at", [2, 33])
@pytest.mark.parametrize("change", [divided, assigned])
def test_a_gradient_that_is_spoilt_after_backward_is_blamed_on_that_line(
    change: Callable[[Tensor, Tensor], Tensor], bad_at: int
) -> None:
    def program() -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(bad_at + 3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().mul(step != bad_at).backward()
            total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for parameter in model.parameters():
                parameter.grad = change(parameter.grad, total)
            optimizer.step()

    (found,) = loud(program)
    assert (found.step, found.code, found.severity) == (bad_at, "TT101", "error")
    assert code_of(found).endswith("# the cause")
    assert "harmless" not in found.message


@pytest.mark.parametrize("bad_at", [2, 33])
def test_gradients_combined_by_hand_and_assigned_after_another_backward_are_blamed_on_the_op(
    bad_at: int,
) -> None:
    """As PCGrad does: what is spoilt is computed before the last backward pass."""

    def program() -> None:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(bad_at + 3):
            out = model(torch.randn(8, 4)).square().mean(0)
            (one,) = torch.autograd.grad(out[0], model.weight, retain_graph=True)
            second = out[1] * (step != bad_at)
            (two,) = torch.autograd.grad(second, model.weight, retain_graph=True)
            ratio = (one * two).sum() / two.norm() ** 2  # the cause
            optimizer.zero_grad()
            (out[0] + second).backward()
            model.weight.grad = one - ratio * two
            optimizer.step()

    (found,) = loud(program)
    assert (found.step, found.code, found.severity) == (bad_at, "TT101", "error")
    assert code_of(found).endswith("# the cause")


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)  # the cause


class Attention(nn.Module):
    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.inner, self.unit = nn.Linear(8, 24, bias=False), Unit() if apart else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        if self.unit is not None:
            return self.mix(self.unit(q), k, v)
        return self.mix(q / q.norm(dim=-1, keepdim=True), k, v)  # the cause

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


@pytest.mark.parametrize("bad_at", [2, 33])
@pytest.mark.parametrize("apart", [True, False])
def test_what_fused_attention_hides_is_found(apart: bool, bad_at: int) -> None:
    """Of a row with NaN it makes zeros, and NaN of the gradient."""

    def program() -> None:
        model = nn.Sequential(Attention(apart), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(bad_at + 3):
            x = torch.randn(4, 5, 8)
            x[1, 2] = 0.0 if step == bad_at else x[1, 2]
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    (found,) = loud(program)
    assert found.step == bad_at
    assert code_of(found).endswith("# the cause")
    assert "x / 0 is infinite and 0 / 0" in found.explanation


@pytest.mark.parametrize("bad_at", [2, 33])
def test_values_that_make_the_next_call_raise_are_explained(bad_at: int) -> None:
    def program() -> None:
        model = nn.Linear(4, 12)
        for step in range(bad_at + 1):
            with torch.no_grad():
                logits = model(torch.randn(4, 4))
                banned = torch.full((12,), step == bad_at)
                banned[0] = step == bad_at
                chances = torch.softmax(logits.masked_fill(banned, -math.inf), -1)  # the cause
                torch.multinomial(chances, 1)

    found = raising(program)
    assert [(f.step, f.code) for f in found] == [(found[0].step, "TT101"), (found[0].step, "TT801")]
    assert code_of(found[0]).endswith("# the cause")
    assert "(TT101-1)" in found[1].explanation
    assert found[1].fix.startswith("mend TT101-1 first")


def test_an_exception_that_is_caught_does_no_harm() -> None:
    def program() -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            kernel = torch.eye(3) / torch.tensor(float(step != 3))
            try:
                scale = torch.linalg.cholesky(kernel).diagonal().sum()
            except torch.linalg.LinAlgError:
                scale = torch.tensor(1.0)
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) * scale).square().mean().backward()
            optimizer.step()

    assert loud(program) == []


def raising(program: Callable[[], Any]) -> list[Finding]:
    from tensortrace import trace
    from tests.capture import Recorded

    records = Recorded()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError), trace(out=records.append):
        program()
    return [f for f in records.of(Finding) if f.severity != "note"]


@pytest.mark.parametrize("bad_at", [2, 33])
def test_minus_infinity_of_the_end_of_the_step_before_is_told_where_it_was_made(
    bad_at: int,
) -> None:
    """A correction that is prepared before the model is called: it belongs to the step before."""

    def program() -> None:
        model = nn.Linear(4, 6)
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(bad_at + 3):
            counts = torch.ones(6)
            counts[2] = float(step != bad_at)
            correction = torch.log(counts)  # the cause
            logits = model(torch.randn(8, 4)) - correction
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)).backward()
            optimizer.step()

    (found,) = loud(program)
    assert (found.code, found.op) == ("TT101", "log")
    assert code_of(found).endswith("# the cause")


def test_a_mask_that_was_kept_does_not_lead_to_another_note_of_the_step_before() -> None:
    """A number for show is infinite at the end of step 3; in step 4 the mask is multiplied."""

    def program() -> None:
        model, out = nn.Linear(8, 6), nn.Linear(6, 1)
        optimizer = torch.optim.Adam([*model.parameters(), *out.parameters()])
        mask = torch.zeros(4, 6).masked_fill(torch.arange(6) > 3, -math.inf)
        for step in range(7):
            scores = model(torch.randn(4, 8))
            if step == 4:
                scores = scores.relu() * mask  # the cause
            weights = torch.softmax(scores + mask, -1)
            optimizer.zero_grad()
            out(weights).square().mean().backward()
            optimizer.step()
            torch.ones(2) / torch.full((2,), float(step != 3))

    (found,) = loud(program)
    assert (found.step, found.code, found.op) == (4, "TT101", "mul")
    assert code_of(found).endswith("# the cause")


def test_a_number_for_show_is_not_blamed_for_a_gradient() -> None:
    """Nobody sees what spoils the gradient, and a metric after backward is infinite."""

    def program() -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if step == 3:
                torch.ones(2) / torch.zeros(2)
                grads = [p.grad for p in model.parameters()]
                torch._foreach_mul_(grads, math.nan)
            optimizer.step()

    (found,) = loud(program)
    assert (found.step, found.code) == (3, "TT102")


@pytest.mark.parametrize("shape", [(2,), (8, 4)])
def test_of_two_notes_of_the_step_before_that_about_the_data_is_the_cause(
    shape: tuple[int, ...],
) -> None:
    """After the update a metric is infinite, and then the next batch is prepared."""

    def program() -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters())
        batch = torch.randn(8, 4)
        for step in range(6):
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.zeros(shape).log() if step == 3 else None
            spread = torch.randn(8, 1).expand(8, 4) * float(step != 3)
            batch = torch.randn(8, 4) / spread.abs()  # the cause

    (found,) = loud(program)
    assert (found.step, found.code, found.op) == (4, "TT101", "div")
    assert code_of(found).endswith("# the cause")


class Rescaled(nn.Module):
    """Makes NaN of a row of zeros; then something inside raises because of it, or does not."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.end = nn.Linear(4, 4), end

    def forward(self, x: Tensor) -> Tensor:
        x = x / x.abs().sum(1, keepdim=True)  # the cause
        h: Tensor = self.linear(x)
        self.end(h)
        return h


class Matcher(nn.Module):
    """No module is called inside, and nothing that it returns tells of what it made."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            cost = x / x.abs().sum(1, keepdim=True)  # the cause
            if not np.isfinite(cost.numpy()).all():
                raise ValueError("matrix contains invalid numeric entries")
        return x


def check_with_an_assertion(h: Tensor) -> None:
    assert torch.isfinite(h).all()


ENDS: dict[str, Callable[[], nn.Module]] = {
    "distribution": lambda: Rescaled(lambda h: torch.distributions.Normal(h, 1.0)),
    "assertion": lambda: Rescaled(check_with_an_assertion),
    "integer": lambda: Rescaled(lambda h: int(h.sum().item())),
    "matcher": Matcher,
}


def fed(model: nn.Module, bad_at: int, catches: bool = False) -> Callable[[], None]:
    def program() -> None:
        last = nn.Linear(4, 1)
        optimizer = torch.optim.Adam([*model.parameters(), *last.parameters()])
        for step in range(bad_at + 2):
            x = torch.randn(8, 4)
            x[3] *= float(step != bad_at)
            optimizer.zero_grad()
            try:
                h = model(x)
            except Exception:
                if catches:
                    continue
                raise
            last(h).square().mean().backward()
            optimizer.step()

    return program


@pytest.mark.parametrize("bad_at", [2, 33, 215])
@pytest.mark.parametrize("end", ENDS)
def test_what_raises_because_of_a_nan_that_was_made_inside_the_same_call(
    end: str, bad_at: int
) -> None:
    ends = AssertionError if end == "assertion" else ValueError
    cause, raised = loud(fed(ENDS[end](), bad_at), ends=ends)
    assert (cause.step, cause.code, cause.op) == (bad_at, "TT101", "div")
    assert cause.evidence["placed"] == "exact"
    assert code_of(cause).endswith("# the cause")
    assert raised.code == "TT801"
    assert f"({cause.id})" in raised.explanation
    assert raised.fix.startswith(f"mend {cause.id} first")


def test_an_exception_that_is_caught_or_about_something_else_makes_no_error_of_a_nan() -> None:
    assert loud(fed(ENDS["distribution"](), 2, catches=True)) == []
    other = Rescaled(lambda h: {}["lr"] if h.isnan().any() else None)
    (raised,) = loud(fed(other, 2), ends=KeyError)
    assert raised.code == "TT801"


class Entropy(nn.Module):
    """Makes NaN in every step, which is masked away; in one step the scale is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sign = nn.Linear(4, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        p = torch.relu(self.linear(x))
        entropy = torch.where(p > 0, p * p.detach().log(), 0.0).sum()
        scale = (self.linear(x).abs() + 1e-3) * self.sign
        return torch.distributions.Normal(p, scale).rsample() - 0 * entropy


@pytest.mark.parametrize("bad_at", [5, 33, 215])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_what_is_masked_away_is_not_why_something_finite_is_refused(
    where: str, bad_at: int
) -> None:
    model = Entropy()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def program() -> None:
        for step in range(bad_at + 2):
            if step == bad_at and where == "inside":
                model.sign = -1.0
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            if step == bad_at:
                raise ValueError("the stream is finite")

    (raised,) = loud(program, ends=ValueError)
    assert (raised.step, raised.code) == (bad_at, "TT801")
    assert "not finite" not in raised.explanation


class Rescaling(Entropy):
    """Makes NaN that is masked away, and then some of a row of zeros for which it is refused."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        x = x / x.abs().sum(1, keepdim=True)  # the cause
        return torch.distributions.Normal(x, 1.0).rsample() + 0 * h


@pytest.mark.parametrize("level", ["module", "op"])
def test_what_is_refused_leads_to_its_own_cause_and_not_to_what_was_masked_before(
    level: str,
) -> None:
    cause, raised = loud(fed(Rescaling(), 5), ends=ValueError, level=level)
    assert (cause.step, cause.code, cause.op) == (5, "TT101", "div")
    assert code_of(cause).endswith("# the cause")
    assert raised.fix.startswith(f"mend {cause.id} first")


class Doubled(nn.Module):
    """A hook of the user's changes what the forward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_forward_pre_hook(lambda module, args: (args[0], args[1] * 0))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x / scale)  # type: ignore[no-any-return]


def test_a_replayed_op_got_what_a_hook_has_made_of_the_arguments() -> None:
    model = Doubled()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def program() -> None:
        model(torch.randn(8, 4), torch.rand(8, 4) + 0.5).square().mean().backward()
        optimizer.step()

    (found,) = loud(program)
    assert (found.code, found.op) == ("TT101", "div")
    assert "the divisor has 32 zeros out of 32" in found.explanation


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x) / scale  # the cause


@pytest.mark.parametrize("bad_at", [2, 33, 215])
def test_data_that_are_bad_after_a_bad_call_lead_to_it(bad_at: int) -> None:
    """A policy acts, and its reward comes back from an environment that knows NumPy only."""

    def program() -> None:
        policy, critic = Policy(), nn.Linear(4, 1)
        optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], 1e-2)
        for step in range(bad_at + 2):
            x = torch.randn(8, 4)
            scale = torch.full((), float(step != bad_at))
            with torch.no_grad():
                action = policy(x, scale)
            reward = torch.from_numpy(np.abs(action.numpy()).sum(1) * scale.item())
            advantage = reward - critic(x).squeeze(-1)
            loss = advantage.square().mean() + policy(x, torch.ones(())).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with np.errstate(invalid="ignore"):
        (found,) = loud(program)
    assert (found.step, found.code) == (bad_at, "TT105")
    assert "; before it in this step div made " in found.message
    assert " of 16 from finite inputs" in found.message
    assert "what goes through NumPy" in found.explanation
    line = (
        Path(__file__)
        .read_text("utf-8")
        .splitlines()[int(found.evidence["made_before"].rpartition(":")[2]) - 1]
    )
    assert line == "        return self.linear(x) / scale  # the cause"


class Router(nn.Module):
    """Keeps a part of the loss in an attribute, beside values that do no harm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.scale = nn.Linear(8, 4), nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        shown = torch.where(logits > -99, logits, (logits.detach() * 0).log())
        self.aux = (shown * self.scale).exp().sum(-1).square().mean()  # the cause
        return self.up(x) * logits.softmax(-1)[:, :1]


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("bad_at", [0, 7, 34])
def test_a_part_of_the_loss_that_a_module_keeps_in_an_attribute(bad_at: int, level: str) -> None:
    def program() -> None:
        model = nn.Sequential(nn.Linear(8, 8), Router(), nn.Linear(8, 1))
        router = model[1]
        assert isinstance(router, Router)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        for step in range(bad_at + 3):
            # From there on, so that the same comes again where no weight was spoilt.
            router.scale = 1e5 if step >= bad_at else 1.0
            loss = model(torch.randn(16, 8)).square().mean() + router.aux
            optimizer.zero_grad()
            loss.backward()
            if step < bad_at:
                optimizer.step()

    (found,) = loud(program, level=level)
    assert (found.code, found.step, found.module, found.op) == ("TT101", bad_at, "1", "exp")
    assert code_of(found).endswith("# the cause")
