from __future__ import annotations

from tests.checks import brief, closing, find, module, optimizer, row


def norms(values, losses=None, **columns):
    for step, norm in enumerate(values):
        yield optimizer(step=step)
        value = losses[step] if losses else 1.0
        yield closing(step, grad_norm=norm, loss=value, **columns)


def test_a_norm_far_above_its_median_three_steps_running_is_told_at_the_third():
    (found,) = find(norms([1.0] * 10 + [50.0] * 5), "TT201")
    assert (found.step, found.value, found.limit) == (12, 50.0, 20.0)
    assert (
        "gradient norm 50 is 50x the median 1 of the 10 steps before (limit 20x)" in found.message
    )


def test_at_the_threshold_it_is_silent_and_just_above_it_speaks():
    assert find(norms([1.0] * 10 + [20.0] * 5), "TT201") == []
    assert len(find(norms([1.0] * 10 + [20.01] * 5), "TT201")) == 1
    assert find(norms([1.0] * 10 + [50.0] * 2 + [1.0] * 5), "TT201") == []
    assert find(norms([1.0] * 4 + [50.0] * 3), "TT201", least=5) == []
    assert len(find(norms([1.0] * 5 + [50.0] * 3), "TT201", least=5)) == 1


def test_scale_does_not_matter():
    (small,) = find(norms([1e-9] * 10 + [5e-8] * 3), "TT201")
    (large,) = find(norms([1e9] * 10 + [5e10] * 3), "TT201")
    assert small.step == large.step == 12


def test_a_plateau_that_is_left_while_the_loss_falls_is_silent():
    falling = [2.3] * 10 + [2.2, 2.0, 1.5, 1.0, 0.8]
    assert find(norms([0.01] * 10 + [1.0] * 5, falling), "TT201") == []


def test_what_has_converged_may_jump_far_below_where_it_began():
    converged = [1.0] * 20 + [1e-4] * 40
    assert find(norms([*converged, 0.09, 0.09, 0.09]), "TT201") == []
    assert len(find(norms([*converged, 0.11, 0.11, 0.11]), "TT201")) == 1
    assert len(find(norms([*converged, 0.09, 0.09, 0.09]), "TT201", converged=0.01)) == 1


def test_first_steps_that_are_large_and_norms_that_are_not_finite_are_silent():
    assert find(norms([500.0, 100.0, 20.0] + [1.0] * 20), "TT201") == []
    assert find(norms([1.0] * 10 + ["NaN", "Infinity", None] * 3), "TT201") == []


def test_a_norm_that_the_window_has_had_before_is_silent():
    assert find(norms([60.0] + [1.0] * 10 + [60.0] * 5), "TT201") == []
    assert len(find(norms([60.0] + [1.0] * 10 + [60.1] * 5), "TT201")) == 1
    assert len(find(norms([60.0] + [1.0] * 20 + [60.0] * 5), "TT201")) == 1


def test_a_policy_whose_gradient_flickers_around_nothing_is_silent():
    """Measured: steps 178 to 200 of REINFORCE, whose first norms were 3 to 18."""
    policy = [0.2271, 3.1442, 14.088, 0.0744, 0.0374, 0.0037, 4.4444, 0.2229, 1.1745, 0.0011,
              0.2192, 0.0088, 0.1498, 1.6031, 1.1958, 5.0358, 4.9095, 0.0118, 6.1019, 5.9715,
              4.7719, 15.363, 0.2613]  # fmt: skip
    assert find(norms(policy), "TT201") == []


def test_two_optimizers_in_turn_are_two_series():
    def gan():
        for step in range(60):
            yield optimizer(step=step, index=int(step % 6 == 5))
            yield closing(step, grad_norm=100.0 if step % 6 == 5 else 0.01, loss=1.0)

    assert find(gan(), "TT201") == []


def test_the_module_that_grew_most_is_named():
    calm = [optimizer(step=s) for s in range(1)]
    for s in range(10):
        calm.append(
            closing(s, grad_norm=1.0, modules=row(param_grad_rms={"rnn": 1.0, "head": 1.0}))
        )
    for s in range(10, 13):
        wild = row(param_grad_rms={"rnn": 90.0, "head": 2.0})
        calm.append(closing(s, grad_norm=90.0, modules=wild))
    (found,) = find(calm, "TT201")
    assert brief([found]) == [("TT201", "warning", "rnn")]
    assert found.evidence["profile"] == [["rnn", 90.0], ["head", 2.0]]
    assert found.message.endswith("; most of all in rnn (90x)")


def test_a_module_that_has_not_grown_is_not_blamed_in_the_message():
    """As after a spike that the modules' own medians hold and the total's does not."""
    calm = [closing(s, grad_norm=1.0, modules=row(param_grad_rms={"a": 90.0})) for s in range(10)]
    wild = [
        closing(s, grad_norm=9e7, modules=row(param_grad_rms={"a": 90.0})) for s in range(10, 13)
    ]
    (found,) = find([optimizer(), *calm, *wild], "TT201")
    assert "gradient norm 9.0e+07 is 9.0e+07x the median 1 of" in found.message
    assert "most of all" not in found.message


def profile(values, steps, cls="Linear"):
    names = [f"stack.{i}" for i in range(len(values))]
    for name in names:
        yield module(name, "weight", cls=cls)
    for step in range(steps):
        columns = row(param_grad_rms=dict(zip(names, values, strict=True)))
        yield closing(step, grad_norm=1.0, loss=1.0, modules=columns)


def test_growth_toward_the_input_is_told_with_its_profile():
    values = [10.0 ** (6 - i) for i in range(7)]
    (found,) = find(profile(values, 5), "TT201")
    assert (found.step, found.module) == (2, "stack.0")
    assert found.evidence["profile"][0] == ["stack.0", 1e6]
    assert "over 7 layers (limit 1000x)" in found.message


def test_growth_by_one_jump_or_within_the_limit_is_silent():
    assert find(profile([1e6, 1.0, 0.9, 0.8, 0.7, 0.6], 5), "TT201") == []
    assert find(profile([10.0**3, 10**2.4, 10**1.8, 10**1.2, 10**0.6, 1.0], 5), "TT201") == []
    assert len(find(profile([1001.0, 10**2.4, 10**1.8, 10**1.2, 10**0.6, 1.0], 5), "TT201")) == 1
