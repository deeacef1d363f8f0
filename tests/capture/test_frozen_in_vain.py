from __future__ import annotations

import pytest
from torch import nn

from tensortrace.capture.frozen_in_vain import frozen_in_vain
from tensortrace.capture.gradients import own_parameters


@pytest.mark.parametrize(
    ("name", "meant"),
    [("require_grad", True), ("requires_grads", True), ("require_gradient", True),
     ("required_grad", True), ("requires_graph", False), ("retain_grad", False),
     ("trainable", False)],
)  # fmt: skip
@pytest.mark.parametrize("value", [False, True, None, 0])
def test_an_attribute_that_is_false_was_meant_to_freeze(name, meant, value):
    module = nn.Linear(2, 2)
    setattr(module, name, value)
    setattr(module.bias, name, value)
    expected = [name, f"bias.{name}"] if meant and value is False else []
    assert frozen_in_vain(module, own_parameters(module)) == expected


def test_of_a_parameter_it_is_what_torch_knows():
    module = nn.Linear(2, 2, bias=False)
    module.weight.requires_grad = False
    assert frozen_in_vain(module, own_parameters(module)) == []
    module.requires_grad = False
    assert frozen_in_vain(module, own_parameters(module)) == ["requires_grad"]
