from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from tests.checks import brief, closing, find, module, optimizer, row
from tests.checks.traced import find_live


def steps(count=10, *, held=("a.weight",), rms=1.0, ratio=0.01, lr=(0.1,), **changes):
    for path in "ab":
        yield module(path, "weight", grad=changes.get("grad", True),
                     training=changes.get("training", True))  # fmt: skip
    for step in range(count):
        rates = lr(step) if callable(lr) else list(lr)
        yield optimizer(step=step, lr=rates, parameters=list(held) if not step else None,
                        skipped=changes.get("skipped", False))  # fmt: skip
        columns = row(param_grad_rms={"a": 1.0, "b": rms}, update_ratio={"a": 0.01, "b": ratio})
        yield closing(step, modules=columns)


BOTH = ("a.weight", "b.weight")


def test_parameters_in_no_optimizer_are_told_after_four_steps():
    (found,) = find(steps(), "TT401")
    assert brief([found]) == [("TT401", "warning", "b")]
    assert (found.step, found.param) == (3, "b.weight")
    assert "1 parameter has a gradient and is in no optimizer that steps" in found.message


def test_three_steps_are_not_enough_and_the_number_is_a_setting():
    assert find(steps(3), "TT401") == []
    assert len(find(steps(3), "TT401", updates=3)) == 1


def test_parameters_that_are_held_and_do_not_move_are_told():
    (found,) = find(steps(held=BOTH, ratio=0.0), "TT401")
    assert "is held by an optimizer with lr > 0 and does not change" in found.message
    assert found.param == "b.weight"
    assert "bfloat16" in found.fix


def test_a_bias_beside_weights_that_do_not_move_is_not_named():
    def run():
        bias = module("", "bias", shape=(4,)).parameters
        for layer in (module(path, "weight") for path in "ab"):
            yield structs.replace(layer, parameters=[*layer.parameters, *bias])
        held = ["a.weight", "a.bias", "b.weight", "b.bias"]
        for step in range(4):
            yield optimizer(step=step, parameters=held if not step else None)
            columns = row(param_grad_rms={"a": 1.0, "b": 1.0}, update_ratio={"a": 0.01, "b": 0.0})
            yield closing(step, modules=columns)

    (found,) = find(run(), "TT401")
    assert found.evidence["parameters"] == ["b.weight"]


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.out = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x, condition):
        return self.out(torch.tanh(self.a(x) + self.c(condition)))


@pytest.mark.parametrize("steps", [6, 40])
def test_a_weight_whose_gradient_is_zero_beside_a_bias_that_has_one_is_not_told(steps):
    model = Conditioned()
    adam = torch.optim.Adam(model.parameters())

    def program():
        for _ in range(steps):
            x = torch.randn(16, 4)
            adam.zero_grad()
            F.mse_loss(model(x, torch.zeros(16, 3)), x.sum(1, keepdim=True)).backward()
            adam.step()

    assert find_live(program, "TT401") == []


def test_layers_that_no_gradient_reaches_are_told_as_that():
    layers = []
    for _ in range(12):
        layers += [nn.Linear(16, 16), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def program():
        for _ in range(5):
            sgd.zero_grad()
            F.cross_entropy(model(torch.randn(8, 16)), torch.randint(4, (8,))).backward()
            sgd.step()

    assert [f.code for f in find_live(program, "TT401")] == ["TT401"]
    assert [f.code for f in find_live(program, "TT202", "TT401")] == ["TT202"]


def test_a_healthy_run_is_silent():
    assert find(steps(held=BOTH), "TT401") == []
    assert find(steps(held=BOTH, ratio=None), "TT401") == []


def test_an_optimizer_that_has_converged_is_silent():
    def lbfgs(moving):
        yield from (module(path, "weight") for path in "ab")
        for step in range(20):
            yield optimizer(step=step, parameters=list(BOTH) if not step else None)
            ratio = 0.01 if step < moving else 0.0
            columns = row(
                param_grad_rms={"a": 1.0, "b": 1.0}, update_ratio={"a": ratio, "b": ratio}
            )
            yield closing(step, modules=columns)

    assert find(lbfgs(moving=5), "TT401") == []
    assert len(find(lbfgs(moving=0), "TT401")) == 1


def test_a_layer_that_a_decaying_learning_rate_no_longer_moves_is_silent():
    """Its updates fall below the rounding of its weights before those of others do."""

    def run():
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        adam = torch.optim.Adam(net.parameters(), lr=1e-2)
        decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.8)
        x = torch.randn(16, 2)
        for _ in range(120):
            adam.zero_grad()
            F.mse_loss(net(x), x.sum(1, keepdim=True)).backward()
            adam.step()
            decay.step()

    assert find_live(run, "TT401") == []


def test_the_optimizer_and_the_layer_are_shown():
    def run():
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        adam = torch.optim.Adam(net[2].parameters())
        for _ in range(6):
            adam.zero_grad()
            net(torch.randn(16, 8)).square().mean().backward()
            adam.step()

    (found,) = find_live(run, "TT401")
    assert found.module == "0"
    assert "adam.step()" in found.location.code
    (layer,) = found.chain
    assert layer.op == "0"


def test_what_nobody_means_to_train_is_silent():
    assert find(steps(grad=False), "TT401") == []
    assert find(steps(rms=None), "TT401") == []  # target network, teacher
    assert find(steps(training=False), "TT401") == []
    assert find(steps(held=BOTH, ratio=0.0, skipped=True), "TT401") == []


def test_two_optimizers_hold_together():
    def gan():
        yield from (module(path, "weight") for path in "ab")
        for step in range(20):
            mine = step % 2
            held = [f"{'ab'[mine]}.weight"] if step < 2 else None
            yield optimizer(step=step, index=mine, parameters=held)
            moved = {"a": 0.0 if mine else 0.1, "b": 0.1 if mine else 0.0}
            columns = row(param_grad_rms={"a": 1.0, "b": 1.0}, update_ratio=moved)
            yield closing(step, modules=columns)

    assert find(gan(), "TT401") == []


def test_a_rate_of_zero_is_told_after_more_than_twenty_steps_and_a_warm_up_is_not():
    still = steps(21, held=BOTH, ratio=0.0, lr=(0.0,))
    (found,) = find(still, "TT401")
    assert (found.step, found.value, found.limit) == (20, 21, 20)
    assert find(steps(20, held=BOTH, ratio=0.0, lr=(0.0,)), "TT401") == []
    warm_up = steps(30, held=BOTH, lr=lambda s: [s * 0.01])
    assert find(warm_up, "TT401") == []
    frozen_group = steps(30, held=BOTH, ratio=0.0, lr=(0.1, 0.0))
    assert find(frozen_group, "TT401") == []


def test_what_lbfgs_has_fitted_in_its_first_step_is_silent():
    def run():
        x = torch.randn(64, 3)
        y = x @ torch.randn(3, 1)
        net = nn.Linear(3, 1)
        lbfgs = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            loss = F.mse_loss(net(x), y + 0.1)
            loss.backward()
            return loss

        for _ in range(12):
            lbfgs.step(closure)

    assert find_live(run, "TT401") == []


def by_hand(layer):
    layer.kernel = layer._parameters.pop("weight")
    layer.forward = lambda x: F.linear(x, layer.kernel, layer.bias)


@pytest.mark.parametrize("rename", [
    lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    nn.utils.spectral_norm,
    by_hand,
], ids=["pruned", "spectral norm", "by hand"])  # fmt: skip
@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("at", [8, 30, 205])
def test_a_parameter_that_is_renamed_is_held_as_before(rename, validated, at):
    """`weight` becomes `weight_orig`: the module's record is written anew, in training too."""

    def run():
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        for i in range(at + 30):
            if i == at and validated:
                net.eval()
                with torch.no_grad():
                    net(torch.randn(8, 8))
                net.train()
            if i == at:
                rename(net[0])
            adam.zero_grad()
            F.cross_entropy(net(torch.randn(8, 8)), torch.randint(3, (8,))).backward()
            adam.step()

    assert find_live(run, "TT401") == []


@pytest.mark.parametrize("way", ["copy_", "data", "load"])
def test_weights_that_the_loop_copies_from_what_an_optimizer_holds_move(way):
    def program():
        model, master = nn.Linear(4, 3), nn.Linear(4, 3)
        optimizer = torch.optim.SGD(master.parameters(), 0.1)
        for _ in range(8):
            model.zero_grad()
            model(torch.rand(8, 4)).square().mean().backward()
            for p, q in zip(model.parameters(), master.parameters(), strict=True):
                q.grad = p.grad.clone()
            optimizer.step()
            if way == "load":
                model.load_state_dict(master.state_dict())
                continue
            with torch.no_grad():
                for p, q in zip(model.parameters(), master.parameters(), strict=True):
                    (p.data if way == "data" else p).copy_(q)

    assert find_live(program, "TT401") == []


def test_copies_that_are_made_anew_for_each_task_are_no_part_of_the_model():
    """First-order meta-learning: what a copy learns in its task is thrown away."""

    def program():
        model = nn.Linear(1, 8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(8):
            optimizer.zero_grad()
            for _ in range(2):
                learner = copy.deepcopy(model)
                learner(torch.rand(4, 1)).square().mean().backward()
                for p, q in zip(model.parameters(), learner.parameters(), strict=True):
                    p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
            optimizer.step()

    assert find_live(program, "TT401") == []


def test_weights_that_were_loaded_once_are_told_of_after_that():
    def program():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
        for step in range(12):
            optimizer.zero_grad()
            model(torch.rand(8, 4)).square().mean().backward()
            optimizer.step()
            if step == 2:
                model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})

    (found,) = find_live(program, "TT401")
    assert found.param == "0.weight"


def cleared(step_of=lambda optimizer, i: None, first=False, turns=104):
    """A loop that clears the gradients of each backward, and maybe steps."""

    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        for i in range(turns):
            if first:
                sgd.zero_grad()
            model(torch.rand(8, 4)).square().mean().backward()
            step_of(sgd, i)
            if not first:
                sgd.zero_grad()

    return program


@pytest.mark.parametrize("first", [False, True])
def test_an_optimizer_that_only_clears_gradients_is_told_of(first):
    (found,) = find_live(cleared(first=first), "TT401")
    assert (found.severity, found.value, found.limit) == ("warning", 100, 100)
    assert "backward()" in found.location.code
    assert "optimizer.step()" in found.fix


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "step_of",
    [
        lambda sgd, i: sgd.step(),
        lambda sgd, i: sgd.step() if i % 90 == 89 else None,
        lambda sgd, i: [p.data.sub_(p.grad) for g in sgd.param_groups for p in g["params"]],
    ],
    ids=["step", "seldom", "by hand"],
)
def test_an_optimizer_that_steps_or_whose_weights_move_is_silent(step_of, first):
    assert find_live(cleared(step_of, first), "TT401") == []


def test_gradients_of_as_many_tasks_are_silent():
    assert find_live(cleared(turns=100), "TT401") == []


@pytest.mark.parametrize("first", [False, True])
def test_a_scheduler_that_steps_instead_of_the_optimizer_is_told_of_soon(first):
    def decay(sgd, _):
        sgd.param_groups[0]["lr"] *= 0.99

    (found,) = find_live(cleared(decay, first, turns=26), "TT401")
    assert (found.value, found.limit, found.severity) == (21, 20, "warning")
    assert find_live(cleared(decay, first, turns=20), "TT401") == []


def test_a_learning_rate_that_was_set_once_before_gradients_are_taken_is_silent():
    def once(sgd, i):
        if i == 3:
            sgd.param_groups[0]["lr"] = 0.01

    assert find_live(cleared(once, turns=60), "TT401") == []


def test_a_scheduler_beside_an_optimizer_that_steps_is_silent():
    def both(sgd, _):
        sgd.step()
        sgd.param_groups[0]["lr"] *= 0.99

    assert find_live(cleared(both, turns=60), "TT401") == []


def repeated(batches=1, turns=30, step_of=lambda sgd, i: None, first=True, **how):
    """The same batches in the same order, again and again, as where all data are one batch."""

    def program():
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(how.get("drops", 0.0)))
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        data = torch.rand(batches, 8, 4)
        for i in range(turns):
            if first:
                sgd.zero_grad()
            logits = model(data[i % batches])
            F.cross_entropy(logits, torch.arange(8) % 3).backward()
            step_of(sgd, i)
            if not first:
                sgd.zero_grad()

    return program


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("batches", [1, 5])
def test_the_same_gradients_again_and_again_are_told_of_soon(first, batches):
    (found,) = find_live(repeated(batches, first=first), "TT401")
    assert (found.value, found.limit, found.severity) == (19 + batches + first, 20, "note")
    assert "optimizer.step()" in found.fix


def test_after_a_hundred_it_is_a_warning():
    found = find_live(repeated(turns=120), "TT401")
    assert [(f.value, f.severity) for f in found] == [(21, "note"), (100, "warning")]


def test_an_optimizer_that_waits_beside_one_that_steps_is_silent():
    """The weights of an architecture are learnt from the sixth epoch on."""

    def program():
        net, choice = nn.Linear(4, 3), nn.Parameter(torch.zeros(3))
        sgd, adam = torch.optim.SGD(net.parameters(), 0.1), torch.optim.Adam([choice])
        kept = copy.deepcopy(net.state_dict())
        data = torch.rand(8, 4)
        for _ in range(40):
            sgd.zero_grad()
            adam.zero_grad()
            F.cross_entropy(net(data) * choice.exp(), torch.arange(8) % 3).backward()
            sgd.step()
            net.load_state_dict(kept)  # so that the gradients are those of the turn before

    assert find_live(program, "TT401") == []


@pytest.mark.parametrize("begins", [10, 200])
def test_an_optimizer_that_has_yet_to_step_is_a_note_and_a_warning_after_a_hundred(begins):
    def program():
        actor, critic = nn.Linear(4, 3), nn.Linear(4, 3)
        waits, steps = torch.optim.Adam(actor.parameters()), torch.optim.SGD(critic.parameters())
        for i in range(120):
            x = torch.rand(8, 4)
            waits.zero_grad()
            steps.zero_grad()
            (actor(x) - critic(x)).square().mean().backward()
            steps.step()
            if i >= begins:
                waits.step()

    note, *more = find_live(program, "TT401")
    assert (note.severity, note.step, note.evidence) == (
        "note", 3, {"parameters": ["weight", "bias"]}
    )  # fmt: skip
    assert "held by an optimizer that has never stepped" in note.message
    assert [(f.severity, f.value) for f in more] == ([("warning", 100)] if begins > 100 else [])


@pytest.mark.parametrize("how", [
    {"step_of": lambda sgd, i: sgd.step()},
    {"step_of": lambda sgd, i: sgd.step() if i == 15 else None},
    {"step_of": lambda sgd, i: sgd.param_groups[0]["params"][0].data.mul_(0.9)},
    {"batches": 60, "turns": 60}, {"batches": 60, "turns": 75}, {"turns": 20}, {"drops": 0.5},
], ids=["steps", "late", "by hand", "tasks", "twice", "few", "drops"])  # fmt: skip
def test_gradients_that_are_other_ones_or_few_are_silent(how):
    assert find_live(repeated(**how), "TT401") == []


def epochs(count=4, shuffle=True, step_of=lambda model, sgd: None, **how):
    """Training without a step, on eight batches that come in another order in each epoch."""

    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        loader = DataLoader(torch.rand(64, 4), batch_size=8, shuffle=shuffle)
        for _ in range(count):
            if "anew" in how:
                loader = DataLoader(torch.rand(64, 4), batch_size=8, shuffle=shuffle)
            for x in how.get("one_by_one", lambda loader: loader)(loader):
                sgd.zero_grad()
                model(x).square().mean().backward()
            step_of(model, sgd)

    return program


def test_batches_that_are_shuffled_and_come_again_are_told_of_soon():
    (found,) = find_live(epochs(), "TT401")
    assert (found.value, found.limit, found.severity) == (20, 20, "note")
    assert "backward()" in found.location.code


def test_batches_that_a_comprehension_fetches_are_those_of_its_loader():
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), 0.1)

        def learn(x):
            sgd.zero_grad()
            model(x).square().mean().backward()

        loader = DataLoader(torch.rand(64, 4), batch_size=8, shuffle=True)
        for _ in range(4):
            [learn(x) for x in loader]

    (found,) = find_live(program, "TT401")
    assert found.severity == "note"


@pytest.mark.parametrize("how", [
    {"count": 2}, {"anew": True}, {"step_of": lambda model, sgd: sgd.step()},
    {"step_of": lambda model, _: model.load_state_dict(nn.Linear(4, 3).state_dict())},
    {"one_by_one": lambda loader: [next(iter(loader))]},
], ids=["once", "tasks", "steps", "checkpoints", "few"])  # fmt: skip
def test_gradients_of_each_batch_for_their_own_sake_are_silent(how):
    assert find_live(epochs(**{"count": 8, **how}), "TT401") == []


def test_a_validation_beside_the_gradients_of_tasks_is_no_epoch_of_theirs():
    def program():
        model = nn.Linear(4, 3)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        loader = DataLoader(torch.rand(16, 4), batch_size=8, shuffle=True)
        for _ in range(40):
            sgd.zero_grad()
            model(torch.rand(8, 4)).square().mean().backward()
            with torch.no_grad():
                for x in loader:
                    model(x)

    assert find_live(program, "TT401") == []


def test_samples_of_one_loss_have_gradients_of_their_own():
    """A classifier that starts at zero guesses: each sample costs the same."""

    def program():
        model = nn.Linear(4, 3)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(60):
            sgd.zero_grad()
            F.cross_entropy(model(torch.rand(1, 4)), torch.tensor([1])).backward()

    assert find_live(program, "TT401") == []


def test_an_optimizer_without_gradients_is_not_told_to_step():
    def program():
        model, other = nn.Linear(4, 3), nn.Linear(3, 2)
        sgd, unused = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, other))
        for _ in range(110):
            sgd.zero_grad()
            unused.zero_grad()
            model(torch.rand(8, 4)).square().mean().backward()
            sgd.step()

    assert find_live(program, "TT401") == []


@pytest.mark.parametrize("fetched", [False, True])
def test_weights_that_the_loop_moves_by_a_gradient_that_it_took_are_in_no_optimizer(fetched):
    """A policy that is moved along a natural gradient, beside a value that an optimizer moves."""

    def program():
        policy, value = nn.Linear(4, 3), nn.Linear(4, 1)
        sgd = torch.optim.SGD(value.parameters(), 0.1)
        data = torch.rand(8, 8, 4)
        for x in DataLoader(data, batch_size=None) if fetched else data:
            sgd.zero_grad()
            value(x).square().mean().backward()
            sgd.step()
            grads = torch.autograd.grad(policy(x).square().mean(), list(policy.parameters()))
            with torch.no_grad():
                for p, grad in zip(policy.parameters(), grads, strict=True):
                    p.sub_(0.1 * grad)

    assert find_live(program, "TT401") == []


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_is_held_by_whatever_name_it_is_called(bias):
    """The head of a masked language model: its bias is its own, its weight the embedding's."""

    def run(left_out=()):
        net = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=bias))
        net[2].weight = net[0].weight
        held = [p for name, p in net.named_parameters() if name not in left_out]
        adam = torch.optim.Adam(held, lr=1e-2)
        for _ in range(8):
            x = torch.randint(20, (8, 5))
            adam.zero_grad()
            F.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
            adam.step()

    assert find_live(run, "TT401") == []
    (found,) = find_live(lambda: run(["1.weight"]), "TT401")
    assert "1.weight" in found.message
    assert "2.weight" not in found.message


def test_a_gradient_that_the_optimizer_rounds_away_is_a_note():
    """Of two heads the second has hardly a target yet."""

    def run():
        body, first, second = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        sgd = torch.optim.SGD([*body.parameters(), *first.parameters(), *second.parameters()], 0.01)
        for _ in range(8):
            x = torch.randn(16, 8)
            features = torch.tanh(body(x))
            main = F.mse_loss(first(features), x[:, :4])
            rare = F.mse_loss(second(features), x[:, 4:])
            sgd.zero_grad()
            (main + 1e-10 * rare).backward()
            sgd.step()

    (found,) = find_live(run, "TT401")
    assert (found.severity, found.step) == ("note", 3)
    assert "rounds away" in found.message
    assert "restores" not in found.fix
