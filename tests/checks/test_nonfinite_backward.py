from __future__ import annotations

import threading

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tensortrace.records import Action, Call, Location
from tests.builders import make_header
from tests.checks import brief, call, closing, find, loss, module, nan, ok, op, optimizer, param
from tests.checks.traced import find_live


class Euler(torch.autograd.Function):
    """Two steps back along a net, as the adjoint method goes; the first divides by 0."""

    @staticmethod
    def forward(ctx, y, net, *weights):
        ctx.net = net
        ctx.save_for_backward(y)
        return y + net(y)

    @staticmethod
    def backward(ctx, a):
        for _ in range(2):
            with torch.enable_grad():
                y = ctx.saved_tensors[0].detach().requires_grad_()
                got = torch.autograd.grad(ctx.net(y), (y, *ctx.net.parameters()), a)
            a = a + got[0] / (a - a)
        return a, None, *got[1:]


@pytest.mark.parametrize("level", ["module", "op"])
def test_a_pass_that_an_own_backward_began_with_what_is_bad_blames_that(level):
    def program():
        net = nn.Linear(4, 4)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            sgd.zero_grad()
            Euler.apply(torch.randn(3, 4), net, *net.parameters()).square().mean().backward()
            sgd.step()

    (found,) = find_live(program, "TT102", level=level)
    assert found.message.startswith("the backward of Euler made")
    assert "Euler is an autograd function of yours" in found.explanation


def test_of_a_pass_inside_a_backward_that_nobody_saw_begin_no_seed_is_called_finite():
    """Its function is a library's; and what was computed after that pass is not before it."""
    records = [
        call(10, "f", [1], [2], [ok(1), ok(2)], recompute=True),
        arrived(12, 10, nan(12, grad_of=2), "f"), made(13, nan(13), "f"),
        call(14, "f", [3], [4], [ok(3), ok(4)], recompute=True), optimizer(),
    ]  # fmt: skip
    (found,) = find(records, "TT102")
    assert "between the exit of f and the exit of the program made 1 NaN" in found.message
    assert "finite gradients went in" not in found.explanation


def grads(seq, of, ins, outs, tensors, *, names=("output[0]", "input[0]"), **changes):
    return Call(step=0, seq=seq, phase="backward", forward=of, tensors=tensors,
                inputs=[(names[0], i) for i in ins], outputs=[(names[1], i) for i in outs],
                **changes)  # fmt: skip


def arrived(seq, of, tensor, path):
    """The gradient of a module's output."""
    return grads(seq, of, [tensor.id], [], [tensor], module=path)


def made(seq, tensor, path, name="weight"):
    """The gradient of a parameter."""
    return grads(seq, None, [], [tensor.id], [tensor], names=("", name), module=path)


ROOT = Location("loss.py", 3, "distance", "return d.sqrt()")
FORWARD = [
    call(1, "net", [1], [4], [ok(1), ok(4)]),
    call(2, "net.a", [1], [2], [ok(2)], parent=1),
    call(3, "net.b", [3], [4], [ok(3)], parent=1),
    op(4, "sqrt", [4], [5], [ok(5)], location=ROOT),
    loss(5, 1.0, 5),
]
BAD = made(30, nan(30), "net.b")


def node(bad_in=False, bad_out=True):
    return grads(
        10, 4, [10], [11], [nan(10) if bad_in else ok(10), nan(11) if bad_out else ok(11)],
        op="sqrt", location=ROOT,
    )  # fmt: skip


def test_names_the_op_outside_modules_and_the_line_of_its_forward():
    (found,) = find([*FORWARD, node(), BAD, optimizer(grad_norm="NaN")], "TT102")
    assert brief([found]) == [("TT102", "error", "sqrt")]
    assert found.location == ROOT
    assert found.evidence["placed"] == "direct"
    assert "the backward of sqrt made 1 NaN of 4 from finite gradients" in found.message
    assert "infinity times a zero gradient" in found.explanation
    assert [link.seq for link in found.chain] == [4, 10]


def test_finite_gradients_are_silent_and_so_is_a_large_norm():
    fine = [*FORWARD, node(bad_out=False), made(30, ok(30), "net.b")]
    assert find([*fine, optimizer(grad_norm=1e30), closing()], "TT102") == []
    assert find([*fine, optimizer(grad_norm="Infinity"), closing()], "TT102") == []


def test_a_bad_gradient_at_a_tensor_blames_the_module_that_took_it():
    records = [
        *FORWARD, arrived(10, 1, ok(10), "net"), arrived(11, 3, ok(11), "net.b"),
        arrived(12, 2, nan(12, grad_of=2), "net.a"), made(13, nan(13), "net.a"),
    ]  # fmt: skip
    taken = [*FORWARD[:2], call(3, "net.b", [2], [4], [], parent=1), *records[3:], optimizer()]
    (found,) = find(taken, "TT102")
    assert brief([found]) == [("TT102", "error", "net.b")]
    assert found.evidence["placed"] == "module"
    assert found.message == (
        "the backward of net.b, or of the code of net, made 1 NaN of 4 from finite gradients"
    )


def test_a_bad_gradient_between_two_modules_blames_the_code_of_their_parent():
    records = [
        module("net", cls="Net"), *FORWARD,
        arrived(10, 1, ok(10), "net"), arrived(11, 3, ok(11), "net.b"),
        arrived(12, 2, nan(12, grad_of=2), "net.a"), made(13, nan(13), "net.a"), optimizer(),
    ]  # fmt: skip
    (found,) = find(records, "TT102")
    assert brief([found]) == [("TT102", "error", "net")]
    assert found.evidence["between"] == ["net.a", "net.b"]
    assert "between the exit of net.a and the entry of net.b" in found.message


def test_a_bad_parameter_gradient_blames_its_module():
    records = [*FORWARD, arrived(10, 3, ok(10), "net.b"), BAD, optimizer()]
    (found,) = find(records, "TT102")
    assert (found.module, found.param, found.seq) == ("net.b", "weight", 30)
    assert found.message.startswith("the backward of net.b made")


def test_a_gradient_that_reaches_no_parameter_is_a_note_at_the_end():
    records = [*FORWARD, node(), optimizer()]
    assert find(records, "TT102") == []
    assert brief(find([*records, closing()], "TT102")) == [("TT102", "note", "sqrt")]


def test_a_step_that_a_scaler_skipped_is_one_note():
    found = []
    scale = Action(step=0, seq=6, action="scale", detail={"scale": 65536.0})
    records = [*FORWARD, scale, node(), BAD, optimizer(grad_norm="NaN", skipped=True), closing()]
    found = find(records, "TT102")
    assert brief(found) == [("TT102", "note", "sqrt")]
    assert "scale 65536.0" in found[0].message


@pytest.mark.parametrize(
    ("counts", "said"), [({"posinf": 1}, "while it settles"), ({"nan": 1}, "may not help")]
)
def test_a_lower_scale_helps_against_infinity(counts, said):
    scale = Action(step=0, seq=6, action="scale", detail={"scale": 65536.0})
    made = grads(7, 1, [10], [11], [ok(10), ok(11, **counts)], op="sqrt")
    records = [*FORWARD, scale, made, BAD, optimizer(grad_norm="NaN", skipped=True), closing()]
    (found,) = find(records, "TT102")
    assert said in found.message


def test_under_a_scaler_only_a_step_that_was_taken_is_an_error():
    scale = Action(step=0, seq=6, action="scale", detail={"scale": 65536.0})
    taken = [*FORWARD, scale, node(), BAD, optimizer(grad_norm="NaN")]
    assert find(taken, "TT102") == []
    assert brief(find([*taken, closing()], "TT102")) == [("TT102", "error", "sqrt")]
    no_optimizer = [*FORWARD, scale, node(), BAD, closing()]
    assert brief(find(no_optimizer, "TT102")) == [("TT102", "note", "sqrt")]


def test_what_a_forward_finding_explains_is_only_counted():
    records = [
        op(1, "log", [1], [2], [ok(1), nan(2)]), loss(2, "NaN", 2),
        grads(3, 1, [10], [11], [ok(10), nan(11)], op="log"), BAD, optimizer(grad_norm="NaN"),
        closing(),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT101"]


def test_a_gradient_that_only_the_optimizer_saw_is_told_at_the_end():
    records = [optimizer(grad_norm="NaN"), param(1001, "a.weight", ok(1), grad=nan(2)), closing()]
    (found,) = find(records, "TT102")
    assert (found.param, found.evidence["placed"]) == ("a.weight", "parameter only")


def test_a_gradient_that_nothing_seen_has_made_may_be_another_ranks():
    records = [
        loss(1, 1.0), optimizer(5, grad_norm="NaN"),
        param(6, "a.weight", ok(1), grad=nan(2), update_norm="NaN"), closing(),
    ]  # fmt: skip
    (alone,) = find(records)
    assert "rank" not in f"{alone.explanation} {alone.fix}"
    (found,) = find([make_header(world_size=2), *records])
    assert found.evidence["placed"] == "parameter only"
    assert (
        found.explanation == f"{alone.explanation}; or it is another rank's, averaged in with "
        "those of this one"
    )
    assert found.fix.startswith("read the logs of the other ranks first")
    assert found.fix.endswith(alone.fix)


def accumulated(*steps):
    """Micro-batches under a scaler, of which the last brings the update: each with bad ones."""
    for number, taken in enumerate(steps):
        scale = Action(step=number, seq=6, action="scale", detail={"scale": 65536.0})
        records = [*FORWARD, scale, node(), BAD]
        if taken is not None:
            records.append(optimizer(grad_norm="NaN", skipped=not taken))
        yield from (msgspec.structs.replace(record, step=number) for record in records)
        yield closing(number)


def test_a_micro_batch_under_a_scaler_waits_for_its_verdict_and_is_one_note_with_it():
    (found,) = find(accumulated(None, None, False), "TT102")
    assert (found.step, found.severity) == (0, "note")
    assert found.message.endswith("; the scaler has not decided yet")
    assert brief(find(accumulated(None, None, True), "TT102"))[-1] == ("TT102", "error", "sqrt")


def test_a_micro_batch_under_a_scaler_whose_parameters_are_not_reached_says_so():
    scale = Action(step=0, seq=6, action="scale", detail={"scale": 65536.0})
    (found,) = find([*FORWARD, scale, node(), closing()], "TT102")
    assert found.message.endswith("; no parameter is reached")


class Distance(nn.Module):
    """Its root has an infinite slope at 0; it has a parameter, whose gradient is finite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * x / (x.pow(2).sum(-1, keepdim=True).sqrt() + 1e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_without_a_replay_a_gradient_is_not_placed_before_a_module_that_may_have_made_it(inside):
    """What a module hands back to the code around it nobody sees."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), Distance(), nn.Linear(4, 1)

        def forward(self, x):
            h = self.a(x)
            h = h * torch.tensor([[1.0], [0.0]]) if inside else (h * 0).abs().sqrt() + 1
            return self.b(self.norm(h))

    def program():
        net = Net()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            sgd.zero_grad()
            net(torch.rand(2, 4)).mean().backward()
            sgd.step()

    (found,) = find_live(program, "TT102", narrow=False)
    assert "between the exit of a and the entry of norm, or of norm itself, made" in found.message
    assert "the named op" not in found.fix


@pytest.mark.parametrize("options", [{"narrow": False}, {"modules": ["m*"]}])
def test_without_a_replay_the_module_that_took_a_tensor_is_not_blamed_alone(options):
    """The code around a module may have taken the same tensor, and its ops are not seen."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            h = self.a(x)
            return (h * 0).square().sum(-1).sqrt() + self.b(h)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = Middle()

        def forward(self, x):
            return self.m(x)

    def program():
        net = Net()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            sgd.zero_grad()
            net(torch.rand(2, 4)).mean().backward()
            sgd.step()

    (found,) = find_live(program, "TT102", **options)
    assert (found.module, found.op, found.evidence["placed"]) == ("m.b", None, "module")
    assert found.message.startswith("the backward of m.b, or of the code of m, made")


def test_an_op_that_is_seen_to_hand_back_finite_gradients_has_made_no_others():
    records = [
        call(1, "net.a", [1], [2], [ok(1), ok(2)]), op(4, "sqrt", [4], [5], [ok(4), ok(5)]),
        loss(5, 1.0, 5), node(bad_out=False), arrived(12, 1, nan(12, grad_of=2), "net.a"),
        made(13, nan(13), "net.a"), optimizer(),
    ]  # fmt: skip
    (found,) = find(records, "TT102")
    assert "between the exit of net.a and the entry of sqrt made 1 NaN" in found.message


class Selective(nn.Module):
    """Recomputes a part without modules, whose root has an infinite slope at 0."""

    def __init__(self, gated, part=None):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 1)
        self.gate = nn.Linear(4, 1) if gated else None
        self.part = part or (lambda h: h.relu() + (h * 0).square().sum(-1, keepdim=True).sqrt())

    def forward(self, x):
        h = self.up(x)
        y = self.down(checkpoint(self.part, h, use_reentrant=True))
        return y if self.gate is None else y * self.gate(h).sigmoid()


def step_of(net):
    def program():
        model = net()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            sgd.zero_grad()
            model(torch.randn(3, 4)).square().mean().backward()
            sgd.step()

    return program


@pytest.mark.parametrize("gated", [True, False])
def test_what_took_a_tensor_without_grad_or_handed_back_finite_gradients_is_not_blamed(gated):
    """At op level the ops that a reentrant checkpoint computes once more are not seen."""
    (found,) = find_live(step_of(lambda: Selective(gated)), "TT102", level="op")
    assert (found.module, found.op) == ("up", None)
    assert "the backward of up, or of what took its output unseen, made" in found.message
    assert 'level="op"' not in found.fix


def test_a_module_that_a_reentrant_checkpoint_computes_once_more_is_blamed():
    class Part(nn.Module):
        def forward(self, h):
            return h + (h * 0).square().sum(-1, keepdim=True).sqrt()

    program = step_of(lambda: Selective(False, Part()))
    (found,) = find_live(program, "TT102", narrow=False)
    assert (found.module, found.evidence["placed"]) == ("part", "module")
    assert 'level="op"' in found.fix


def norm(h):
    norm = torch.linalg.vector_norm(h - h.detach(), ord=0.5, dim=1)  # its slope uses what it made
    return h.pow(3) + norm[:, None]


def angle(h):
    z = torch.stack([h * 0, h * 0], -1)
    return h.pow(3) + torch.atan2(z[..., 1], z[..., 0])  # its slope uses what it was given


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize(("part", "op", "said"), [
    (norm, "norm", "the backward of norm, or of what took its output unseen, made"),
    (angle, "atan2", "the backward of atan2 made"),
])  # fmt: skip
def test_of_the_slope_of_a_slope_the_op_is_blamed_that_has_one(level, part, op, said):
    """Of the two that made a tensor and took it, one is a view."""

    def program():
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            x = torch.randn(6, 4, requires_grad=True)
            (force,) = torch.autograd.grad(part(net(x)).mean(), x, create_graph=True)
            sgd.zero_grad()
            force.square().mean().backward()
            sgd.step()

    (found,) = find_live(program, "TT102", level=level)
    assert (found.op, said in found.message) == (op, True)
    assert "# its slope uses" in found.location.code


def test_of_another_thread_it_is_not_said_that_finite_gradients_went_in():
    """Its loss is not seen, here the logarithm of 0."""

    def program():
        net = nn.Linear(4, 3)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)

        def train():
            (net(torch.randn(6, 4)).softmax(-1) * 0).log().mean().backward()
            sgd.step()

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    (found,) = find_live(program, "TT102")
    assert "finite gradients went in" not in found.explanation
    assert "a thread that did not enter the block" in found.explanation
