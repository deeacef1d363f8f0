from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensortrace.records import Action, Location
from tests.checks import brief, closing, find, optimizer
from tests.checks.traced import find_live
from tests.healthy.adversarial import Generator, critic
from tests.healthy.data import images, sentences
from tests.healthy.language import LanguageModel, next_word_loss


def language_model(clear):
    def program():
        model = LanguageModel()
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        adam.zero_grad()
        for _ in range(6):
            next_word_loss(model, sentences()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            clear(model, adam)

    return program


def test_language_model_without_zero_grad_is_an_error_after_three_steps():
    (found,) = find_live(language_model(lambda model, adam: None), "TT206")
    assert brief([found]) == [("TT206", "error", None)]
    assert (found.step, found.value, found.limit) == (3, 3, 3)
    assert "in 3 steps running of optimizer 0, AdamW (limit 3)" in found.message
    assert "nothing cleared those of embed.weight and " in found.message
    assert found.param == "embed.weight"
    (stepped,) = found.chain
    assert stepped.op == "AdamW.step"
    assert "adam.step()" in stepped.location.code
    assert "backward()" in found.location.code


def clear_by_hand(model, adam):
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize(
    "clear",
    [
        lambda model, adam: adam.zero_grad(),
        lambda model, adam: adam.zero_grad(set_to_none=False),
        lambda model, adam: model.zero_grad(),
        clear_by_hand,
    ],
    ids=["optimizer", "in place", "module", "by hand"],
)
def test_each_way_to_clear_gradients_is_silent(clear):
    assert find_live(language_model(clear), "TT206") == []


def accumulation(per_step):
    def program():
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for i in range(20):
            x, y = images(8)
            (F.cross_entropy(model(x), y) / 4).backward()
            if i % 4 == 3:
                sgd.step()
            if i % 4 == 3 and per_step:
                sgd.zero_grad()

    return program


def test_accumulation_is_no_fault_and_without_zero_grad_it_is_one():
    assert find_live(accumulation(per_step=True), "TT206") == []
    (found,) = find_live(accumulation(per_step=False), "TT206")
    assert found.update == 4


def gan(forgets, *, by_module=False):
    def program():
        generator, judge = Generator(), critic()
        g_opt = torch.optim.Adam(generator.parameters(), lr=1e-3)
        d_opt = torch.optim.Adam(judge.parameters(), lr=1e-3)
        for _ in range(6):
            fake = generator(torch.randn(8, 8))
            (judge if by_module else d_opt).zero_grad()
            F.softplus(judge(fake.detach()) - judge(images(8)[0])).mean().backward()
            d_opt.step()
            if not forgets:
                (generator if by_module else g_opt).zero_grad()
            F.softplus(-judge(fake)).mean().backward()
            g_opt.step()

    return program


@pytest.mark.parametrize("by_module", [False, True])
def test_gan_that_clears_only_one_of_its_two_networks(by_module):
    (found,) = find_live(gan(forgets=True, by_module=by_module), "TT206")
    assert found.evidence["optimizer"] == 1
    assert find_live(gan(forgets=False, by_module=by_module), "TT206") == []


@pytest.mark.parametrize("frozen", [False, True])
def test_the_backward_that_reached_the_optimizer_is_named_and_not_the_first(frozen):
    def program():
        actor, value = nn.Linear(4, 2), nn.Linear(4, 1)
        first, second = (torch.optim.Adam(m.parameters(), lr=1e-3) for m in (actor, value))
        for _ in range(6):
            x = torch.randn(8, 4)
            value.requires_grad_(not frozen)
            score = value(x) if frozen else value(x).detach()
            first.zero_grad()
            (actor(x) * score).mean().backward()
            first.step()
            value.requires_grad_(True)
            for target in (x.sum(1), x[:, 0]):
                error = value(x).squeeze(1) - target
                error.square().mean().backward()
            second.step()

    (found,) = find_live(program, "TT206")
    assert (found.evidence["optimizer"], found.severity) == (1, "error")
    assert found.location.code == "error.square().mean().backward()"


def test_a_loss_that_finds_the_gradients_written_is_not_named():
    (found,) = find(two_losses(6), "TT206")
    assert found.location.line == 2


def two_losses(count):
    """The gradients are as the step before left them until the third loss of each step."""
    for step in range(count):
        for line, fate in enumerate(["kept", "kept", "changed"], start=1):
            detail = {"gradients": {"0": fate}} if step else {}
            where = Location("a.py", line, "f")
            yield Action(step=step, seq=line, action="loss", detail=detail, location=where)
        yield optimizer(10, step=step)
        yield closing(step)


def steps(count, fates, *, clears=()):
    """Each step: backward, which finds the gradients as `fates` says, then the optimizer."""
    for step in range(count):
        fate = fates(step)
        detail = {"gradients": {"0": fate}} if fate else {}
        if step in clears:
            yield Action(step=step, seq=1, action="zero_grad", optimizer=0)
        yield Action(step=step, seq=2, action="loss", detail=detail)
        yield optimizer(10, step=step)
        yield closing(step)


def kept(step):
    return "kept" if step else None


def test_two_steps_are_not_enough_and_the_number_is_a_setting():
    assert find(steps(3, kept), "TT206") == []
    assert len(find(steps(3, kept), "TT206", sustain=2)) == 1


def test_gradients_that_were_cleared_before_make_it_a_warning():
    late = list(steps(9, lambda step: "kept" if step > 3 else None))
    assert [f.severity for f in find(late, "TT206")] == ["warning"]


def test_one_clear_in_three_steps_is_silent():
    assert find(steps(12, lambda s: "kept" if s % 3 else "changed"), "TT206") == []
    assert find(steps(12, kept, clears=range(0, 12, 3)), "TT206") == []


def test_a_first_backward_that_is_thrown_away_is_silent():
    def records():
        for step in range(8):
            detail = {"gradients": {"0": "kept"}} if step else {}
            yield Action(step=step, seq=1, action="loss", detail=detail)
            yield Action(step=step, seq=2, action="zero_grad", optimizer=0)
            yield Action(step=step, seq=3, action="loss")
            yield optimizer(10, step=step)
            yield closing(step)

    assert find(records(), "TT206") == []


def test_nothing_says_nothing():
    assert find([], "TT206") == []
    assert find([r for s in range(9) for r in (optimizer(step=s), closing(s))], "TT206") == []
    assert find(steps(9, lambda s: None), "TT206") == []


MOVES = {
    "no_grad": lambda w: w.sub_(0.05 * w.grad),
    "data": lambda w: w.data.sub_(0.05 * w.grad.data),
    "set": lambda w: setattr(w, "data", w.data - 0.05 * w.grad),
}
CLEARS = {
    "zero": lambda w: w.grad.zero_(),
    "data": lambda w: w.grad.data.zero_(),
    "none": lambda w: setattr(w, "grad", None),
    "decayed": lambda w: w.grad.mul_(0.9),
}


def moved_by_hand(move, clear, weights=None, rows=3, steps=8):
    """The first chapter of a tutorial: a line is fitted with weights that are mere tensors."""

    def program():
        x = torch.rand(16, rows)
        y = x @ torch.arange(1.0, rows + 1)
        w, b = weights() if weights else (torch.zeros(rows), torch.zeros(1))
        for leaf in (w, b):
            leaf.requires_grad_()
        for step in range(steps):
            (x @ w + b - y).square().mean().backward()
            with torch.no_grad():
                for leaf in (w, b):
                    move(leaf)
                    clear(leaf, step)

    return program


@pytest.mark.parametrize("move", MOVES)
def test_gradients_that_a_loop_never_clears_itself_are_a_warning(move):
    (found,) = find_live(moved_by_hand(MOVES[move], lambda w, step: None), "TT206")
    assert (found.severity, found.step, found.value, found.limit) == ("warning", 3, 3, 3)
    assert "a weight of shape (1,)" in found.message
    assert "backward()" in found.location.code
    assert "w.grad = None" in found.fix


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("clear", CLEARS)
def test_each_way_to_clear_gradients_by_hand_is_silent(move, clear):
    clears = CLEARS[clear]
    assert find_live(moved_by_hand(MOVES[move], lambda w, step: clears(w)), "TT206") == []


def test_gradients_of_modules_that_a_loop_moves_are_named():
    def program(clear):
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        for _ in range(8):
            x = torch.rand(8, 4)
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)
            if clear:
                model.zero_grad()

    (found,) = find_live(lambda: program(clear=False), "TT206")
    assert found.param == "2.bias"
    assert "the loop moves 2.bias" in found.message
    assert find_live(lambda: program(clear=True), "TT206") == []


def test_gradients_that_add_up_between_two_moves_are_silent():
    def every_third(w, step):
        if step % 3 == 2:
            w.sub_(0.05 * w.grad)
            w.grad = None

    assert find_live(moved_by_hand(lambda w: None, every_third, steps=18), "TT206") == []


def test_a_gradient_of_zeros_may_have_been_cleared():
    def program():
        w = torch.ones(3, requires_grad=True)
        for _ in range(8):
            (w * 0).sum().backward()
            w.data.add_(0.1)
            w.grad.data.zero_()

    assert find_live(program, "TT206") == []


def test_what_is_moved_by_an_optimizer_is_not_moved_by_hand():
    def program():
        w, v = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        sgd = torch.optim.SGD([w], 0.1)
        for _ in range(8):
            (w * v).square().sum().backward()
            sgd.step()
            sgd.zero_grad()
            v.data.mul_(0.99)

    assert find_live(program, "TT206") == []


GIVES = {
    "new": lambda q, grad: setattr(q, "grad", grad.float()),
    "in place": lambda q, grad: q.grad.copy_(grad) if q.grad is not None
    else setattr(q, "grad", grad.float()),
}  # fmt: skip


@pytest.mark.parametrize("give", GIVES)
@pytest.mark.parametrize("with_loader", [False, True])
def test_gradients_that_are_given_to_master_weights_are_not_added_to(give, with_loader):
    """A model in bfloat16 whose optimizer holds float32 copies of the weights."""

    def program():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).bfloat16()
        master = [p.detach().float().requires_grad_() for p in model.parameters()]
        adam = torch.optim.Adam(master, 1e-3)
        batches = [torch.randn(16, 8) for _ in range(10)]
        for x in torch.utils.data.DataLoader(batches, batch_size=None) if with_loader else batches:
            model.zero_grad()
            F.cross_entropy(model(x.bfloat16()).float(), x[:, :3].argmax(1)).backward()
            for p, q in zip(model.parameters(), master, strict=True):
                GIVES[give](q, p.grad)
            adam.step()
            with torch.no_grad():
                for p, q in zip(model.parameters(), master, strict=True):
                    p.copy_(q)

    assert find_live(program) == []


def test_gradients_that_autograd_grad_has_made_are_not_added_to():
    """Weights of tasks, as GradNorm learns them."""

    def program():
        model, tasks = nn.Linear(4, 2), torch.ones(2, requires_grad=True)
        sgd, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([tasks], 0.01)
        for _ in range(8):
            losses = model(torch.rand(8, 4)).square().mean(0)
            sgd.zero_grad()
            (tasks.detach() * losses).sum().backward(retain_graph=True)
            norms = tasks * losses.detach()
            (tasks.grad,) = torch.autograd.grad((norms - norms.mean().detach()).abs().sum(), tasks)
            sgd.step()
            other.step()

    assert find_live(program, "TT206") == []


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_are_added_up_with_a_graph_are_told():
    def program():
        model = nn.Linear(4, 2)
        sgd = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(6):
            model(torch.rand(8, 4)).square().mean().backward(create_graph=True)
            sgd.step()

    (found,) = find_live(program, "TT206")
    assert found.severity == "error"
