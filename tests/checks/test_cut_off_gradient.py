from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.checks import brief, call, closing, find, module, ok, optimizer, row
from tests.checks.traced import find_live

HELD = ["a.weight", "b.weight", "c.weight"]


def steps(gradients, count=10, *, held=HELD, no_grad=1, calls=True, **changes):
    """`gradients` is a dict of path to rms, or a function of the step that gives one."""
    for path in "abc":
        yield module(path, "weight", grad=changes.get("grad", True))
    for step in range(count):
        now = gradients(step) if callable(gradients) else gradients
        if calls:
            for i, path in enumerate(now):
                yield call(i, path, [], [], step=step,
                           grad_enabled=changes.get("grad_enabled", True),
                           training=changes.get("training", True))  # fmt: skip
        yield optimizer(
            step=step, parameters=held if not step else None, no_grad=no_grad,
            skipped=changes.get("skipped", False),
        )  # fmt: skip
        yield closing(step, grad_norm=1.0, modules=row(param_grad_rms=now))


CUT = {"a": None, "b": None, "c": 1.0}


def test_modules_before_the_cut_are_one_finding_at_the_one_next_to_it():
    (found,) = find(steps(CUT), "TT203")
    assert brief([found]) == [("TT203", "warning", "b")]
    assert (found.step, found.value, found.limit) == (7, 8, 8)
    assert found.evidence["modules"] == ["a", "b"]
    assert (
        "gradient None in 8 optimizer steps running (limit 8) for 2 of 3 modules" in found.message
    )
    assert found.location is not None
    assert "argmax" in found.fix and "round" not in found.fix


def test_seven_steps_are_not_enough():
    assert find(steps(CUT, 7), "TT203") == []
    assert len(find(steps(CUT, 7), "TT203", sustain=7)) == 1


def test_exactly_zero_is_cut_off_and_tiny_is_not():
    (found,) = find(steps({"a": 0.0, "c": 1.0}, no_grad=0), "TT203")
    assert "gradient exactly 0" in found.message
    assert "round, floor or sign" in found.fix and "argmax" not in found.fix
    assert find(steps({"a": 1e-30, "c": 1.0}), "TT203") == []


def test_a_branch_that_had_a_gradient_once_is_silent():
    assert find(steps(lambda s: {"a": 1.0 if s == 1 else None, "c": 1.0}, 30), "TT203") == []
    zero_init = lambda s: {"a": 0.0 if s == 0 else 0.1, "c": 1.0}  # noqa: E731
    assert find(steps(zero_init, 30), "TT203") == []


def test_what_nobody_means_to_train_is_silent():
    assert find(steps(CUT, grad=False), "TT203") == []  # frozen
    assert find(steps(CUT, held=["c.weight"]), "TT203") == []  # target network
    assert find(steps(CUT, grad_enabled=False), "TT203") == []  # teacher under no_grad
    assert find(steps(CUT, training=False), "TT203") == []
    assert find(steps(CUT, skipped=True), "TT203") == []
    assert find(steps({"a": None, "c": None}), "TT203") == []  # no gradient anywhere


def test_gradients_put_in_by_hand_are_no_cut():
    assert find(steps(CUT, no_grad=0), "TT203") == []


class Tries(nn.Module):
    """Tries one layer and takes another where that raises; or takes that one in any case."""

    def __init__(self, width, *, raises):
        super().__init__()
        self.first, self.other = nn.Linear(width, 16), nn.Linear(8, 16)
        self.head, self.raises = nn.Linear(16, 4), raises

    def forward(self, x):
        try:
            h = self.first(x)
            h = h if self.raises else self.other(x)
        except RuntimeError:
            h = self.other(x)
        return self.head(h.relu())


@pytest.mark.parametrize("raises", [True, False])
def test_a_module_whose_call_raises_has_not_run(raises):
    def program():
        model = Tries(7 if raises else 8, raises=raises)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(30):
            x = torch.randn(16, 8)
            sgd.zero_grad()
            F.mse_loss(model(x), x[:, :4]).backward()
            sgd.step()

    found = find_live(program, "TT203")
    assert [f.module for f in found] == ([] if raises else ["first"])


def test_it_waits_for_a_step_that_shows_the_calls():
    assert find(steps(CUT, calls=False), "TT203") == []


def test_a_module_of_another_optimizer_waits_for_its_own_steps():
    def gan():
        yield from (module(path, "weight") for path in "gd")
        for step in range(30):
            generator = step % 10 == 9
            yield from (call(i, path, [], [], step=step) for i, path in enumerate("gd"))
            held = (["g.weight"] if generator else ["d.weight"]) if step in (0, 9) else None
            yield optimizer(step=step, index=int(generator), parameters=held, no_grad=1)
            rms = {"g": 1.0 if generator else None, "d": 1.0}
            yield closing(step, modules=row(param_grad_rms=rms))

    assert find(gan(), "TT203") == []


class Tuned(nn.Module):
    """A frozen embedding, blocks that `run` calls, and a head."""

    def __init__(self, run):
        super().__init__()
        self.embed = nn.Embedding(20, 8).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head, self.run = nn.Linear(8, 20), run

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.head(x)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def of_an_input_with_gradient(block, x):
    return checkpoint(block, x if x.requires_grad else x.requires_grad_(), use_reentrant=True)


def not_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def no_grad(block, x):
    with torch.no_grad():
        return block(x)


def tuning(run, count=8):
    def program():
        model = Tuned(run)
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(count):
            ids = torch.randint(20, (16,))
            adam.zero_grad()
            F.cross_entropy(model(ids), (ids + 1) % 20).backward()
            adam.step()

    return program


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("run", [reentrant, no_grad])
def test_blocks_that_run_under_no_grad_in_a_forward_with_gradients_are_told(run, level):
    (found,) = find_live(tuning(run), "TT203", level=level)
    assert (found.step, found.severity, found.module, found.value) == (7, "warning", "blocks.1", 8)
    assert "for 2 of 9 modules: blocks.0.0, blocks.1.0; blocks.0, blocks.1 ran" in found.message
    assert "ran under no_grad, with gradients enabled around, and not again" in found.message
    line = "checkpoint(block, x, use_reentrant=True)" if run is reentrant else "block(x)"
    assert found.location.code == f"return {line}"
    assert "enable_input_require_grads()" in found.fix and "use_reentrant=False" in found.fix
    assert find_live(tuning(run, 7), "TT203", level=level) == []


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("run", [of_an_input_with_gradient, not_reentrant])
def test_checkpoints_that_the_backward_runs_again_are_silent(run, level):
    assert find_live(tuning(run, 20), "TT203", level=level) == []


class Beside(nn.Module):
    """A part that runs under no_grad and one that learns; the loop calls both."""

    def __init__(self, target):
        super().__init__()
        self.embed, self.part = nn.Embedding(20, 8).requires_grad_(False), nn.Linear(8, 8)
        self.head, self.target = nn.Linear(8, 8), target

    def run(self, ids):
        with torch.no_grad():
            seen = self.part(self.embed(ids))
        if self.target:
            return self.head(self.embed(ids)) - seen
        return self.head(seen.tanh())


@pytest.mark.parametrize(
    ("target", "held", "told"),
    [(False, "all", 1), (False, "head", 0), (False, "frozen", 0), (True, "all", 0)],
    ids=["goes on", "features that nobody trains", "frozen", "target network"],
)
def test_a_part_under_no_grad_counts_where_its_output_goes_on_to_one_that_learns(
    target, held, told
):
    def program():
        model = Beside(target)
        model.part.requires_grad_(held != "frozen")
        sgd = torch.optim.SGD((model.head if held == "head" else model).parameters(), lr=0.1)
        for _ in range(20):
            sgd.zero_grad()
            model.run(torch.randint(20, (16,))).square().mean().backward()
            sgd.step()

    found = find_live(program, "TT203")
    assert [f.location.code for f in found] == told * ["seen = self.part(self.embed(ids))"]


def nested_steps(count, *, outer=True, learns=True):
    """`b` runs in `a` under no_grad, around which "" may be; `c` takes what it makes."""
    yield from (module(path, "weight", grad=path != "c" or learns) for path in ("", "b", "c"))
    yield module("a")
    rms = {"": 1.0, "a": None, "b": None, "c": 1.0 if learns else None}
    for step in range(count):
        parent = 0 if outer else None
        if outer:
            yield call(0, "", [1], [4], [ok(1), ok(4)], step=step, training=True)
        yield call(1, "a", [1], [2], [ok(2)], step=step, parent=parent, grad_enabled=False)
        yield call(2, "b", [1], [3], [ok(3)], step=step, parent=1, grad_enabled=False)
        yield call(3, "c", [2], [5], [ok(5)], step=step, parent=parent)
        held = ["weight", "b.weight", "c.weight"] if not step else None
        yield optimizer(step=step, parameters=held, no_grad=1)
        yield closing(step, grad_norm=1.0, modules=row(param_grad_rms=rms))


def test_the_outermost_call_under_no_grad_is_the_place():
    (found,) = find(nested_steps(9), "TT203")
    assert (found.step, found.module, found.seq) == (7, "a", 1)
    assert found.evidence["modules"] == ["b"] and found.evidence["no_grad"] == ["a"]
    assert find(nested_steps(7), "TT203") == []
    assert [f.module for f in find(nested_steps(9, outer=False), "TT203")] == ["a"]
    assert find(nested_steps(9, outer=False, learns=False), "TT203") == []


def idle_steps(count, rms=0.0, loss=1.0):
    yield from (module(path, "weight") for path in "ab")
    for step in range(count):
        now = rms(step) if callable(rms) else rms
        yield optimizer(step=step, parameters=["a.weight", "b.weight"], grad_norm=now)
        told = loss(step) if callable(loss) else loss
        yield closing(step, loss=told, modules=row(param_grad_rms={"a": now, "b": now}))


@pytest.mark.parametrize(("count", "steps"), [(40, [39]), (39, [])])
def test_gradients_that_are_all_zero_from_the_start_are_told_in_the_end(count, steps):
    found = find(idle_steps(count), "TT203")
    assert [f.step for f in found] == steps
    for finding in found:
        assert (finding.severity, finding.module, finding.value) == ("warning", "b", 40)
        assert "of all 2 modules that have one is exactly 0 in 40 optimizer" in finding.message
        assert "detach()" in finding.fix


def test_gradients_that_are_all_zero_may_be_right():
    assert find(idle_steps(60, loss=0.0), "TT203") == []  # no reward so far, a margin that is kept
    assert find(idle_steps(60, loss="NaN"), "TT203") == []
    assert find(idle_steps(60, rms=lambda step: float(step == 3)), "TT203") == []  # converged
    assert find(idle_steps(60, rms=lambda step: float(step == 39)), "TT203") == []
    late = lambda step: float(step > 20)  # noqa: E731
    assert [f.step for f in find(idle_steps(80, loss=late), "TT203")] == [60]


def dying_steps(count, *, after=2.0, loss=3.0, dies=5):
    """From step `dies` on gradients are 0, and the loss is what it says; before it is `loss`."""
    return idle_steps(
        count, rms=lambda step: float(step < dies), loss=lambda step: loss if step < dies else after
    )


@pytest.mark.parametrize(("count", "steps"), [(45, [44]), (44, [])])
def test_gradients_that_are_all_zero_later_at_a_loss_that_stays_are_told(count, steps):
    found = find(dying_steps(count), "TT203")
    assert [f.step for f in found] == steps
    for finding in found:
        assert (finding.severity, finding.module, finding.value) == ("warning", "b", 40)
        assert "exactly 0 in 40 optimizer steps running" in finding.message
        assert "at a loss of 2 to the last bit" in finding.message


def test_gradients_that_are_all_zero_later_may_be_right():
    assert find(dying_steps(60, after=0.0), "TT203") == []  # a hinge, a problem that is solved
    assert find(dying_steps(60, after=0.29), "TT203") == []  # solved, and kept from 0 by a clamp
    assert find(dying_steps(60, loss=2.0), "TT203") == []  # it never moved
    again = lambda step: float(step < 5 or step % 30 == 0)  # noqa: E731
    assert find(idle_steps(90, rms=again, loss=lambda s: 3.0 - (s > 4)), "TT203") == []
    assert find(dying_steps(60, after="NaN"), "TT203") == []
    noise = lambda step: 3.0 + step % 2  # noqa: E731
    assert find(idle_steps(60, rms=lambda s: float(s < 5), loss=noise), "TT203") == []


@pytest.mark.parametrize(("rate", "steps"), [(1e3, [40]), (1e-2, [])])
def test_a_scale_that_leapt_until_its_exponential_is_zero_is_told(rate, steps):
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(12, 16), nn.Linear(10, 16)
            self.scale = nn.Parameter(torch.tensor(2.66))

        def forward(self, x, y):
            x, y = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
            return self.scale.exp() * x @ y.T

    def program():
        model = Clip()
        towers = [*model.image.parameters(), *model.text.parameters()]
        groups = [{"params": towers}, {"params": [model.scale], "lr": rate}]
        sgd = torch.optim.SGD(groups, lr=1e-2)
        for _ in range(45):
            sgd.zero_grad()
            logits = model(torch.randn(32, 12), torch.randn(32, 10))
            F.cross_entropy(logits, torch.arange(32)).backward()
            sgd.step()

    found = find_live(program, "TT203")
    assert [(f.step, f.module) for f in found] == [(step, "") for step in steps]
    assert all("all 1024 that (root) returns are 0" in f.message for f in found)


def policy(old):
    def program():
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(41):
            new = model(torch.randn(16, 8)).log_softmax(-1).gather(1, torch.randint(4, (16, 1)))
            loss = -((new - old(new)).exp() * torch.randn(16, 1)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

    return program


def test_ratio_of_a_probability_to_itself_is_told_with_its_line():
    (found,) = find_live(policy(lambda new: new), "TT203")
    assert (found.step, found.op) == (39, "sub")
    assert "sub of a tensor and itself is constant at " in found.message
    assert "(new - old(new)).exp()" in found.location.code
    assert find_live(policy(torch.Tensor.detach), "TT203") == []


def test_rounded_output_is_told_at_the_op():
    def program():
        model = nn.Linear(8, 4)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(41):
            x = torch.randn(16, 8)
            sgd.zero_grad()
            F.mse_loss(model(x).round(), x[:, :4]).backward()
            sgd.step()

    (found,) = find_live(program, "TT203")
    assert (found.op, found.severity) == ("round", "warning")
    assert "the slope of round is 0" in found.message


class Heads(nn.Module):
    """Predicts three things, as one that has been trained for all of them does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
        self.pooler = nn.Sequential(nn.Linear(32, 4), nn.Tanh())
        self.action, self.state = nn.Linear(32, 2), nn.Linear(32, 4)

    def forward(self, x):
        h = self.body(x)
        return {"state": self.state(h), "action": self.action(h), "pooled": self.pooler(h)}


def heads(loss_of):
    def run():
        model = Heads()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(12):
            x = torch.randn(16, 6)
            loss = loss_of(model(x), x)
            adam.zero_grad()
            loss.backward()
            adam.step()

    return run


@pytest.mark.parametrize("every", [1, "auto"])
def test_heads_that_the_loss_does_not_need_are_a_note(every):
    program = heads(lambda made, x: (made["action"] - x[:, :2]).square().mean())
    (found,) = find_live(program, "TT203", every=every)
    assert (found.severity, found.evidence["modules"]) == ("note", ["state", "pooler.0"])
    assert "returned, and nothing takes it" in found.message
    assert "add their term to the loss" in found.fix


@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda h: h.detach().square()])
def test_a_head_that_is_cut_off_on_the_way_to_the_loss_is_none_that_it_does_not_need(cut):
    def loss_of(made, x):
        return (made["action"] - x[:, :2]).square().mean() + (cut(made["state"]) - 1).mean()

    found = find_live(heads(loss_of), "TT203")
    told = {f.severity: f.evidence["modules"] for f in found}
    assert told == {"warning": ["state"], "note": ["pooler.0"]}
