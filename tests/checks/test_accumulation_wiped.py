from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tensortrace.records import Action, Location
from tests.builders import make_call, make_tensor
from tests.checks import brief, closing, find, optimizer, param
from tests.checks.traced import find_live


def batches(count=24, **how):
    data = TensorDataset(torch.randn(4 * count, 8), torch.randint(3, (4 * count,)))
    return DataLoader(data, batch_size=4, shuffle=True, **how)


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def accumulate(when="first", each=4, epochs=1, count=24, **how):
    """Clear gradients in each batch, and step in every few, or in a way that is right."""

    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled="scaler" in how)
        loader = batches(count)
        for _ in range(epochs):
            for i, (x, y) in enumerate(loader):
                if when == "first":
                    sgd.zero_grad(set_to_none=how.get("none", True))
                elif when == "model":
                    model.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y) / each).backward()
                if (i + how.get("at", 1)) % each == 0:
                    if "clip" in how:
                        scaler.unscale_(sgd)
                        nn.utils.clip_grad_norm_(model.parameters(), how["clip"])
                    scaler.step(sgd)
                    scaler.update()
                    if when == "step":
                        sgd.zero_grad()
                if when == "last":
                    sgd.zero_grad()
            if how.get("validates"):
                with torch.no_grad():
                    for x, _ in batches(3):
                        model(x)

    return program


def test_gradients_that_are_cleared_in_each_batch_are_told_after_three_steps():
    (found,) = find_live(accumulate(), "TT210")
    assert brief([found]) == [("TT210", "warning", None)]
    assert (found.step, found.value, found.limit) == (11, 3, 3)
    assert "of 3 batches one by one" in found.message
    assert "only one batch in 4 counts" in found.message
    assert "sgd.zero_grad" in found.location.code
    assert [link.op for link in found.chain] == ["SGD.step"]


@pytest.mark.parametrize("how", [
    {"when": "last"}, {"when": "model"}, {"none": False}, {"clip": 0.1}, {"scaler": True},
    {"scaler": True, "clip": 0.1}, {"at": 0}, {"each": 3}, {"each": 8, "count": 80},
    {"epochs": 4, "count": 9}, {"epochs": 4, "count": 10, "at": 0, "validates": True},
], ids=str)  # fmt: skip
def test_the_same_fault_in_other_words(how):
    assert len(find_live(accumulate(**how), "TT210")) == 1


def test_a_step_after_the_loop_over_batches_is_the_same_fault():
    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        loader = batches(5)
        for _ in range(4):
            for x, y in loader:
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
            sgd.step()

    (found,) = find_live(program, "TT210")
    assert "only one batch in 5 counts" in found.message


@pytest.mark.parametrize("how", [
    {"when": "step"}, {"when": "step", "clip": 0.1}, {"when": "step", "scaler": True},
    {"when": "step", "epochs": 4, "count": 9, "validates": True}, {"each": 1}, {"each": 2},
], ids=str)  # fmt: skip
def test_accumulation_as_it_should_be_is_silent(how):
    assert find_live(accumulate(**how), "TT210") == []


def train(turn, count=40, epochs=2):
    """A loop over batches: `turn` gets the model, its optimizer, the number, inputs, labels."""

    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(epochs):
            for i, (x, y) in enumerate(batches(count)):
                turn(model, sgd, i, x, y)

    return program


def sharpness(model, sgd, i, x, y):
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    moved = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), moved, alpha=0.05)
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        torch._foreach_sub_(list(model.parameters()), moved, alpha=0.05)
    sgd.step()


def attack(model, sgd, i, x, y):
    for _ in range(4):
        x = x.detach().requires_grad_()
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        x = x + 0.01 * x.grad.sign()
    sgd.zero_grad()
    F.cross_entropy(model(x.detach()), y).backward()
    sgd.step()


def attack_and_accumulate(model, sgd, i, x, y):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    F.cross_entropy(model((x + 0.01 * grad.sign()).detach()), y).backward()
    if (i + 1) % 4 == 0:
        sgd.step()
        sgd.zero_grad()


def leave_out(model, sgd, i, x, y):
    """Two of three batches are bad, and left out."""
    sgd.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    if i % 3:
        sgd.zero_grad()
        return
    sgd.step()


def leave_out_large(model, sgd, i, x, y):
    """Most batches have a gradient above a limit, and are left out."""
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if nn.utils.get_total_norm([p.grad for p in model.parameters()]) < 0.45:
        sgd.step()


def private(model, sgd, i, x, y):
    """The gradient of each batch is clipped, and their sum gets noise."""
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for p in model.parameters():
        p.summed = p.grad.clone() if i % 4 == 0 else p.summed + p.grad
    if (i + 1) % 4 == 0:
        for p in model.parameters():
            p.grad = p.summed / 4 + 0.01 * torch.randn_like(p)
        sgd.step()


def private_in_place(model, sgd, i, x, y):
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.summed = p.grad.clone() if i % 4 == 0 else p.summed.add_(p.grad)
        if (i + 1) % 4 == 0:
            p.grad.copy_(p.summed / 4)
    if (i + 1) % 4 == 0:
        sgd.step()


def saliency(model, sgd, i, x, y):
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sgd.step()
    if i % 4 == 0:
        x.requires_grad_()
        model(x).max().backward()
        model.zero_grad()


def find_rate(model, sgd, i, x, y):
    sgd.param_groups[0]["lr"] = 1e-4 * 1.1**i
    sgd.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sgd.step()


@pytest.mark.parametrize("turn", [
    sharpness, attack, attack_and_accumulate, leave_out, leave_out_large, private,
    private_in_place, saliency, find_rate,
])  # fmt: skip
def test_gradients_that_are_cleared_for_a_reason_are_silent(turn):
    assert find_live(train(turn), "TT210") == []


def test_batches_that_a_scaler_leaves_out_are_silent():
    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
        for x, y in batches(60):
            sgd.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(sgd)
            scaler.update()

    assert find_live(program, "TT210") == []


def test_gradients_of_several_tasks_are_silent():
    """A loader for each task; what conflicts is projected away, and the rest is summed."""

    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        tasks = [iter(batches(20)) for _ in range(4)]
        for _ in range(20):
            grads = []
            for task in tasks:
                x, y = next(task)
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                grads.append([p.grad for p in model.parameters()])
            for i, p in enumerate(model.parameters()):
                p.grad = sum(g[i] for g in grads)
            sgd.step()

    assert find_live(program, "TT210") == []


def test_the_gradient_of_a_memory_beside_that_of_the_batch_is_silent():
    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        memories = [iter(batches(20)) for _ in range(3)]
        for x, y in batches(20):
            for memory in memories:
                old, label = next(memory)
                sgd.zero_grad()
                F.cross_entropy(model(old), label).backward()
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()

    assert find_live(program, "TT210") == []


def test_optimizers_that_take_turns_are_silent():
    def program():
        makes, judges = nn.Linear(8, 8), nn.Linear(8, 1)
        of_makes, of_judges = (torch.optim.Adam(m.parameters()) for m in (makes, judges))
        for i, (x, _) in enumerate(batches(60)):
            of_judges.zero_grad()
            (judges(makes(torch.randn_like(x)).detach()).mean() - judges(x).mean()).backward()
            of_judges.step()
            of_makes.zero_grad()
            (-judges(makes(torch.randn_like(x))).mean()).backward()
            if i % 5 == 4:
                of_makes.step()

    assert find_live(program, "TT210") == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_validation_that_runs_backward_on_the_same_lines_is_silent(size):
    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)

        def run(loader, trains):
            for x, y in loader:
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if trains:
                    sgd.step()

        train, test = batches(size), batches(4)
        for _ in range(8):
            run(train, True)
            run(test, False)

    assert find_live(program, "TT210") == []


def test_the_fisher_information_of_each_task_after_its_training_is_silent():
    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            for x, y in batches(6):
                sgd.zero_grad()
                F.cross_entropy(model(x), y).backward()
                sgd.step()
            for x, y in batches(6):
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()

    assert find_live(program, "TT210") == []


def test_micro_batches_of_no_loader_are_silent():
    def program():
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        for i in range(40):
            sgd.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            if (i + 1) % 4 == 0:
                sgd.step()

    assert find_live(program, "TT210") == []


ORDER = ("fetch", "zero_grad", "loss")
PLACES = {name: Location("a.py", i, "train") for i, name in enumerate(ORDER)}


def turns(*apart, order=ORDER, of=0, begins=(), norm=2.0, clipped=False, **changes):
    """Steps as a log has them: so many turns without a step, then one with it, and again.

    Args:
        begins: the turns after which an epoch begins.
        norm: of the gradient of a weight as the optimizer takes it; backward gave it 2.
    """
    step = 0
    for count in apart:
        for i in range(count + 1):
            for seq, name in enumerate(order):
                index = of if name == "zero_grad" else None
                yield Action(step=step, seq=seq, action=name, optimizer=index,
                             location=PLACES[name])  # fmt: skip
            made = [make_tensor(1, 4, norm=2.0), make_tensor(2, 4, norm=4.0)]
            yield make_call(5, "a", step=step, phase="backward", inputs=[], tensors=made,
                            outputs=[("weight", 1), ("bias", 2)])  # fmt: skip
            if i == count:
                if clipped:
                    yield Action(step=step, seq=6, action="clip")
                yield optimizer(10, step=step, **changes)
                for seq, name, taken in ((11, "a.weight", norm), (12, "a.bias", 2 * norm)):
                    grad = make_tensor(seq, 4, norm=taken)
                    yield param(seq, name, make_tensor(20 + seq, 4), step=step, grad=grad)
            if step in begins:
                yield Action(step=step, seq=30, action="loader")
            yield closing(step)
            step += 1


def test_two_steps_are_not_enough_and_the_numbers_are_settings():
    assert find(turns(2, 2), "TT210") == []
    assert len(find(turns(2, 2, 2), "TT210")) == 1
    assert len(find(turns(2, 2), "TT210", sustain=2)) == 1
    assert find(turns(1, 1, 1, 1), "TT210") == []
    assert len(find(turns(1, 1, 1, 1), "TT210", batches=1)) == 1
    assert find([], "TT210") == []


def test_what_is_not_regular_is_silent_for_good():
    assert find(turns(2, 3, 3, 2, 2, 2, 2, 2), "TT210") == []
    assert len(find(turns(0, 2, 2, 2), "TT210")) == 1


def test_an_epoch_that_begins_may_change_the_number_once():
    assert len(find(turns(2, 2, 1, 2, begins={5}), "TT210")) == 1
    assert find(turns(2, 2, 1, 2), "TT210") == []
    # Where one begins between two batches of a step, that step says nothing.
    assert find(turns(2, 2, 2, 2, begins={1, 4, 7, 10}), "TT210") == []


def test_turns_without_a_loader_or_without_backward_are_silent():
    assert find(turns(2, 2, 2, order=ORDER[1:]), "TT210") == []
    assert find(turns(2, 2, 2, order=ORDER[:2]), "TT210") == []
    assert find(turns(2, 2, 2, of=1), "TT210") == []


def test_a_gradient_that_is_not_what_backward_gave_is_silent():
    assert find(turns(2, 2, 2, norm=1.0), "TT210") == []
    assert len(find(turns(2, 2, 2, norm=1.0, clipped=True), "TT210")) == 1
