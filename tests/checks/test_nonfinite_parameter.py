from __future__ import annotations

from tests.checks import brief, call, closing, find, loss, nan, ok, op, optimizer, param


def test_a_parameter_that_is_bad_before_the_step_is_an_error():
    records = [
        optimizer(), param(1001, "a.weight", ok(1)), param(1002, "b.weight", nan(2)),
        param(1003, "b.bias", nan(3)), closing(),
    ]  # fmt: skip
    (found,) = find(records, "TT104")
    assert brief([found]) == [("TT104", "error", "b")]
    assert found.param == "b.weight"
    assert "1 NaN of 4 before this step, and 1 more" in found.message
    assert found.evidence["parameters"] == ["b.weight", "b.bias"]


def test_an_update_that_is_bad_although_the_gradient_is_not_is_an_error():
    taken = param(1001, "a.weight", ok(1), grad=ok(2), update_norm="NaN")
    (found,) = find([optimizer(), taken, closing()], "TT104")
    assert "was written NaN or infinity by this optimizer step" in found.message


def test_finite_parameters_are_silent():
    huge = ok(1, max=3e38, norm=3e38)
    records = [optimizer(), param(1001, "a.weight", huge, update_norm=1e30), closing()]
    assert find(records, "TT104") == []


def test_a_learned_mask_of_minus_infinity_is_a_note():
    records = [optimizer(), param(1001, "a.mask", ok(1, neginf=3)), closing()]
    assert brief(find(records, "TT104")) == [("TT104", "note", "a")]


def test_what_a_bad_loss_does_to_the_parameters_is_only_counted():
    records = [
        op(1, "log", [1], [2], [ok(1), nan(2)]), loss(2, "NaN", 2), optimizer(grad_norm="NaN"),
        param(1001, "a.weight", ok(3), grad=nan(4), update_norm="NaN"), closing(),
        loss(1, "NaN", step=1), optimizer(step=1, grad_norm="NaN"),
        param(1001, "a.weight", nan(3), step=1, grad=nan(4), update_norm="NaN"), closing(1),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT101"]


def test_weights_that_came_in_bad_are_told_beside_the_module_that_shows_them():
    records = [
        call(1, "fc", [1], [2], [ok(1), nan(2)]), loss(2, "NaN", 2), optimizer(grad_norm="NaN"),
        param(1001, "fc.weight", nan(3), grad=nan(4), update_norm="NaN"), closing(),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT101", "TT104"]


def test_after_a_bad_update_all_follows_from_it():
    records = [
        optimizer(), param(1001, "fc.weight", ok(1), grad=ok(2), update_norm="NaN"), closing(),
        call(1, "fc", [1], [2], [ok(1), nan(2)], step=1), loss(2, "NaN", 2, step=1),
        optimizer(step=1, grad_norm="NaN"), closing(1),
    ]  # fmt: skip
    assert [f.code for f in find(records)] == ["TT104"]
