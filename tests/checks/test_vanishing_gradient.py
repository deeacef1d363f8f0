from __future__ import annotations

import pytest

from tests.checks import brief, closing, find, loss, module, optimizer, row


def profile(values, steps=range(6), cls="Linear", shape=(4, 4)):
    names = [f"stack.{i}" for i in range(len(values))]
    for name in names:
        yield module(name, "weight", cls=cls, shape=shape)
    for step in steps:
        columns = row(param_grad_rms=dict(zip(names, values, strict=True)))
        yield closing(step, grad_norm=1.0, loss=1.0, modules=columns)


def geometric(ratio, depth=7):
    return [ratio ** ((depth - 1 - i) / (depth - 1)) for i in range(depth)]


def test_names_the_layers_and_shows_the_profile_after_four_steps():
    (found,) = find(profile([10.0 ** (i - 9) for i in range(10)]), "TT202")
    assert brief([found]) == [("TT202", "warning", "stack.0")]
    assert found.step == 3
    assert found.evidence["profile"][0] == ["stack.0", 1e-9]
    assert found.evidence["profile"][-1] == ["stack.9", 1.0]
    assert "from 1 at stack.9 to 1e-09 at stack.0 over 10 layers" in found.message


def test_the_limit_is_the_ratio_of_first_to_last():
    assert len(find(profile(geometric(0.99e-3)), "TT202")) == 1
    assert find(profile(geometric(1.01e-3)), "TT202") == []
    assert len(find(profile(geometric(1.01e-3)), "TT202", ratio=0.01)) == 1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_uniformly_small_gradients_are_silent_and_scale_does_not_matter(scale):
    assert find(profile([scale] * 10), "TT202") == []
    assert len(find(profile([scale * g for g in geometric(1e-6)]), "TT202")) == 1


def test_three_of_six_steps_are_not_enough_and_four_are():
    bad, good = geometric(1e-6), geometric(0.5)

    def run(pattern):
        for step, is_bad in enumerate(pattern):
            yield from profile(bad if is_bad else good, [step])

    assert find(run([1, 0, 1, 0, 1, 0]), "TT202") == []
    (found,) = find(run([1, 0, 1, 0, 1, 1]), "TT202")
    assert found.step == 5
    assert find(run([1, 1, 1, 0, 0, 0, 1]), "TT202") == []


def test_two_parts_on_different_scales_are_silent():
    assert find(profile([1e-6] * 5 + [1.0] * 5), "TT202") == []
    assert find(profile([1e-6, 1e-3, 1e-6, 1e-3, 1e-6, 1.0]), "TT202") == []


@pytest.mark.parametrize(("frozen", "told"), [("before", 1), ("between", 0), ("after", 1)])
def test_adapters_of_frozen_layers_are_no_chain(frozen, told):
    layers = list(profile(geometric(1e-6)))
    place = {"before": 0, "between": 3, "after": 7}[frozen]
    layers.insert(place, module("frozen", "weight", grad=False))
    assert len(find(layers, "TT202")) == told


def test_few_layers_and_norms_are_not_looked_at():
    assert find(profile(geometric(1e-6, depth=4)), "TT202") == []
    assert len(find(profile(geometric(1e-6, depth=5)), "TT202")) == 1
    assert find(profile(geometric(1e-6), cls="LayerNorm", shape=(4,)), "TT202") == []


def test_frozen_and_zero_layers_are_left_out():
    zero_init = [0.0, None, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert find(profile(zero_init), "TT202") == []


def two_networks(critic, generator, *, losses=2, optimizers=2):
    """A turn of a GAN: each network has its backward, and an optimizer that holds it."""
    paths = {f"{net}.{i}": 0 if net == "critic" else optimizers - 1
             for net, rms in (("generator", generator), ("critic", critic))
             for i in range(len(rms))}  # fmt: skip
    for path in paths:
        yield module(path, "weight")
    for step in range(6):
        for n in range(losses):
            yield loss(n, 1.0, step=step)
        for n in range(optimizers):
            held = [f"{path}.weight" for path, i in paths.items() if i == n] if step == 0 else None
            yield optimizer(10 + n, step=step, index=n, parameters=held)
        rms = dict(zip(paths, [*generator, *critic], strict=True))
        yield closing(step, grad_norm=1.0, loss=1.0, modules=row(param_grad_rms=rms))


def test_networks_with_a_loss_and_an_optimizer_each_are_no_chain():
    small, large = [1e-4, 1e-3], [1e-2, 1e-1, 1.0]
    assert find(two_networks(large, small), "TT202") == []
    # One loss goes through both, or one optimizer steps both.
    assert len(find(two_networks(large, small, losses=1), "TT202")) == 1
    assert len(find(two_networks(large, small, optimizers=1), "TT202")) == 1
    (found,) = find(two_networks(geometric(1e-6), small), "TT202")
    assert found.module == "critic.0"
