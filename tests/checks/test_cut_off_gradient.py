from __future__ import annotations

from tests.checks import brief, call, closing, find, module, optimizer, row

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


def test_seven_steps_are_not_enough():
    assert find(steps(CUT, 7), "TT203") == []
    assert len(find(steps(CUT, 7), "TT203", sustain=7)) == 1


def test_exactly_zero_is_cut_off_and_tiny_is_not():
    (found,) = find(steps({"a": 0.0, "c": 1.0}, no_grad=0), "TT203")
    assert "gradient exactly 0" in found.message
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
