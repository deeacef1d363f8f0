from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tensortrace.records import Action
from tests.checks import closing, find
from tests.checks.traced import find_live

CODE = "TT412"
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def update(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def keep_best(keep):
    """Train, keep with `keep` what is best so far, train on and go back to it."""

    def program():
        model = network()
        optimizer = adam(model)
        update(model, optimizer)
        best = keep(model)
        update(model, optimizer, steps=5)
        model.load_state_dict(best)

    return program


def test_best_weights_that_were_never_copied_are_not_restored():
    (found,) = find_live(keep_best(lambda model: model.state_dict()), CODE)
    assert (found.severity, found.value, found.limit) == ("warning", 5, 1)
    assert "all 9 tensors of the state dict" in found.message
    assert "nothing was restored" in found.message
    assert "moved them in 5 steps" in found.message
    assert "copy.deepcopy(model.state_dict())" in found.fix
    assert found.location.code == "model.load_state_dict(best)"


@pytest.mark.parametrize(
    "keep",
    [
        lambda model: model.state_dict().copy(),
        lambda model: dict(model.state_dict()),
        lambda model: copy.copy(model.state_dict()),
        lambda model: {name: value.cpu() for name, value in model.state_dict().items()},
        lambda model: OrderedDict(reversed(model.state_dict().items())),
    ],
)
def test_copy_of_the_dict_is_none_of_its_tensors(keep):
    assert len(find_live(keep_best(keep), CODE)) == 1


@pytest.mark.parametrize(
    "keep",
    [
        lambda model: copy.deepcopy(model.state_dict()),
        lambda model: {name: value.clone() for name, value in model.state_dict().items()},
        lambda model: copy.deepcopy(model).state_dict(),
        lambda model: {**copy.deepcopy(model.state_dict()), "0.bias": model.state_dict()["0.bias"]},
    ],
)
def test_copies_are_restored(keep):
    assert find_live(keep_best(keep), CODE) == []


def learn_q(copies):
    def program():
        policy = network()
        target = copy.deepcopy(policy) if copies else policy
        optimizer = adam(policy)
        for _ in range(3):
            update(policy, optimizer)
            target.load_state_dict(policy.state_dict())

    return program


def test_target_that_is_the_policy_itself_is_told_at_the_second_time():
    (found,) = find_live(learn_q(copies=False), CODE)
    assert (found.severity, found.value, found.limit) == ("warning", 2, 2)
    assert "nothing was copied" in found.message
    assert "copy.deepcopy(policy_net)" in found.fix
    assert found.location.code == "target.load_state_dict(policy.state_dict())"
    assert find_live(learn_q(copies=True), CODE) == []


def swap(keep):
    """Evaluate with averaged weights in between."""

    def program():
        model, average = network(), network()
        update(model, adam(model))
        kept = keep(model)
        model.load_state_dict(average.state_dict())
        model.load_state_dict(kept)

    return program


def test_weights_that_others_were_loaded_over_are_lost():
    (found,) = find_live(swap(lambda model: model.state_dict()), CODE)
    assert "another state was loaded into them" in found.message
    assert "steps" not in found.message
    assert find_live(swap(lambda model: copy.deepcopy(model.state_dict())), CODE) == []


def test_load_before_training_and_one_load_after_it_do_no_harm():
    def program():
        model = network()
        optimizer = adam(model)
        for _ in range(3):
            model.load_state_dict(model.state_dict())
        update(model, optimizer)
        model.load_state_dict(model.state_dict())

    assert find_live(program, CODE) == []


def test_state_that_is_the_models_in_part():
    def program():
        model, pretrained = network(), network()
        optimizer = adam(model)
        for _ in range(3):
            update(model, optimizer)
            state = model.state_dict()
            state.update({"0.weight": pretrained.state_dict()["0.weight"]})
            model.load_state_dict(state)

    assert find_live(program, CODE) == []


def test_state_that_is_written_in_place_before_it_is_loaded():
    """Weights that are kept small, noise, what torch.distributed.checkpoint reads."""

    def program():
        model = network()
        optimizer = adam(model)
        for _ in range(3):
            update(model, optimizer)
            state = model.state_dict()
            state["0.weight"].clamp_(-0.1, 0.1)
            model.load_state_dict(state)

    assert find_live(program, CODE) == []


def test_weights_of_two_layers_that_change_places():
    def program():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = adam(model)
        for _ in range(3):
            update(model, optimizer)
            state = model.state_dict()
            state["0.weight"], state["1.weight"] = state["1.weight"], state["0.weight"]
            model.load_state_dict(state)

    assert find_live(program, CODE) == []


def test_best_of_many_is_given_to_all_and_is_one_of_them():
    def program():
        models = [network() for _ in range(3)]
        optimizers = [adam(model) for model in models]
        for _ in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                update(model, optimizer)
            for model in models:
                model.load_state_dict(models[0].state_dict())

    assert find_live(program, CODE) == []


def test_frozen_part_that_nobody_has_moved():
    def program():
        model = network()
        model[0].requires_grad_(False)
        optimizer = adam(model)
        state = model[0].state_dict()
        update(model, optimizer)
        model[0].load_state_dict(state)

    assert find_live(program, CODE) == []


def test_rounds_of_federated_averaging_that_write_into_the_models_own_state():
    def program():
        server = network()
        state = server.state_dict()
        for _ in range(3):
            clients = [copy.deepcopy(server) for _ in range(2)]
            for client in clients:
                update(client, adam(client))
            for name, value in state.items():
                value.copy_(sum(client.state_dict()[name] for client in clients) / len(clients))
            server.load_state_dict(state)

    assert find_live(program, CODE) == []


def test_reptile_moves_towards_what_the_inner_loop_has_found():
    def program():
        model = network()
        optimizer = adam(model)
        for _ in range(3):
            before = copy.deepcopy(model.state_dict())
            update(model, optimizer)
            after = model.state_dict()
            model.load_state_dict({n: before[n] + (after[n] - before[n]) * 0.1 for n in before})

    assert find_live(program, CODE) == []


@pytest.mark.parametrize("assign", [False, True])
def test_tied_weights_are_restored_from_a_copy(assign):
    def program(keep):
        def run():
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model[1].weight = model[0].weight
            optimizer = adam(model)
            state = keep(model.state_dict())
            update(model, optimizer)
            model.load_state_dict(state, assign=assign)

        return run

    assert find_live(program(copy.deepcopy), CODE) == []
    assert len(find_live(program(lambda state: state), CODE)) == 1


def test_average_of_torch_and_wrappers_of_a_model():
    def program():
        model = nn.Sequential(network())
        wrapped = nn.DataParallel(model)
        optimizer = adam(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            best = copy.deepcopy(wrapped.module.state_dict())
            update(model, optimizer)
            average.update_parameters(model)
            wrapped.module.load_state_dict(best)
            model.load_state_dict(average.module.state_dict())

    assert find_live(program, CODE) == []


def loads(*details, updates=None):
    for step, detail in enumerate(details):
        base = {"optimizers": [0], "matched": 4, "missing": 0, "unexpected": 0}
        update = step if updates is None else updates[step]
        yield Action(step=step, seq=0, update=update, action="load_state_dict", of="Net",
                     detail={**base, **detail})  # fmt: skip
        yield closing(step)


def own(updates=0, **detail):
    return {"own": 4, "updates": updates, "reloaded": False, **detail}


def test_one_step_is_the_limit_and_a_setting():
    assert [f.value for f in find(loads(own(1)), CODE)] == [1]
    assert find(loads(own(0)), CODE) == []
    assert find(loads(own(1)), CODE, least=2) == []
    assert len(find(loads(own(2)), CODE, least=2)) == 1
    assert len(find(loads(own(0, reloaded=True)), CODE)) == 1


@pytest.mark.parametrize(
    "detail", [{"own": 3}, {"matched": 5}, {"unexpected": 1}, {"own": 0, "matched": 0}]
)
def test_less_than_all_is_no_fault(detail):
    assert find(loads(own(5, **detail)), CODE) == []


def test_state_that_was_not_seen_when_it_was_taken_is_no_fault():
    assert find(loads({"own": 4}, {"own": 4}), CODE) == []


def test_module_loaded_from_itself_twice_with_updates_between():
    assert len(find(loads(own(), own()), CODE)) == 1
    assert find(loads(own(), own(), updates=[3, 3]), CODE) == []
    assert find(loads(own(), own()), CODE, sustain=3) == []
    assert find(loads(own(), {}, own()), CODE) == []
    assert find(loads(own(optimizers=[]), own(optimizers=[])), CODE) == []


def test_other_actions_and_no_records_say_nothing():
    assert find([Action(step=0, seq=0, action="fetch"), closing()], CODE) == []
    assert find([], CODE) == []
