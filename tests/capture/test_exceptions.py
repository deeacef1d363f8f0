"""Programs that raise, each with the sentence that a user reads about it."""

from __future__ import annotations

import bdb
import gc
import math
import re
import sys
import traceback
import unittest
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis.errors import UnsatisfiedAssumption
from torch import nn
from torch.nn.parallel.scatter_gather import gather
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tensortrace import trace
from tensortrace.engine import Engine
from tensortrace.log import decode, encode
from tensortrace.records import Action, Call, End, Finding, Module, Optimizer, Step
from tensortrace.text import finding_text
from tests.capture import Net, Recorded


def raised(program: Callable[[], Any], **options: Any) -> tuple[Recorded, Exception]:
    """Run a program that raises inside a block."""
    records = Recorded()
    with (
        pytest.raises(Exception) as error,
        trace(out=records.append, **{"every": 1, **options}),
    ):
        program()
    assert records.actions("tracer_error") == []
    return records, error.value


def explained(program: Callable[[], Any], **options: Any) -> Finding:
    """The one finding about the exception that a program raises."""
    records, _ = raised(program, **options)
    (finding,) = records.of(Finding, code="TT801")
    assert finding.severity == "error"
    return finding


class Classifier(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        features = self.body(x)
        return self.head(features)


# ---- shapes


def test_matmul_names_the_dim_the_weight_and_the_variable() -> None:
    model = Classifier()
    finding = explained(lambda: model(torch.ones(32, 2, 64)))
    assert finding.message == (
        "mat1 is [32, 128], weight of `head` wants [*, 64]: the last dim of `features` (128) must "
        "equal in_features (64)"
    )
    assert finding.module == "head"
    assert finding.location is not None
    assert finding.location.code == "return self.head(features)"
    assert finding.fix == "nn.Linear(128, 10), or give `head` a tensor whose last dim is 64"


def test_a_linear_layer_that_wants_a_flat_image_is_told_to_flatten() -> None:
    images, layer = torch.ones(4, 2, 32), nn.Linear(64, 10)
    assert explained(lambda: layer(images)).fix == "images.flatten(1)  # [4, 64]"


def test_a_product_names_both_operands_and_what_would_fit() -> None:
    x, w = torch.ones(2, 3), torch.ones(5, 3)
    finding = explained(lambda: x @ w)
    assert "`x` is [2, 3], `w` is [5, 3]: the last dim of `x` (3)" in finding.message
    assert "the first dim of `w` (5)" in finding.message
    assert finding.fix == "x @ w.T"
    assert finding.op == "matmul"


def test_attention_without_a_transpose_is_told_to_transpose() -> None:
    q, k = torch.ones(2, 8, 16, 32), torch.ones(2, 8, 16, 32)
    finding = explained(lambda: q @ k)
    assert "the last dim of `q` (32) must equal the last but one of `k` (16)" in finding.message
    assert finding.fix == "q @ k.transpose(-2, -1)"


def test_a_transposed_operand_has_the_shape_that_the_line_gives_it() -> None:
    class Attention(nn.Module):
        def forward(self, q, k):
            return q @ k.transpose(1, 2)

    model, q, k = Attention(), torch.ones(2, 4, 8), torch.ones(2, 8, 5)
    finding = explained(lambda: model(q, k))
    assert "`q` is [2, 4, 8], `k.transpose(1, 2)` is [2, 5, 8]" in finding.message
    assert (finding.module, finding.op) == ("", "matmul")


def test_broadcast_names_the_dim_and_the_missing_one() -> None:
    logits, scale = torch.ones(8, 10), torch.ones(8)
    finding = explained(lambda: logits + scale)
    assert finding.message == (
        "`logits` is [8, 10], `scale` is [8]: they do not broadcast, dim 1 is 10 in `logits` and 8 "
        "in `scale`"
    )
    assert finding.fix == "scale[..., None]  # [8, 1]"


def test_an_operand_that_is_a_call_gets_its_shape_from_the_record_of_the_op() -> None:
    x = torch.ones(8, 10)
    message = explained(lambda: x.exp() * x.sum(dim=1)).message
    assert "`x.exp()` is [8, 10], `x.sum(dim=1)` is [8]" in message


def test_a_convolution_says_how_many_channels_it_wants() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    finding = explained(lambda: model(torch.ones(2, 1, 8, 8)))
    assert "`0` wants 3 channels: dim 1 is 1, in_channels is 3" in finding.message
    images = torch.ones(2, 8, 8, 3)
    assert explained(lambda: model(images)).fix.startswith("images.permute(0, 3, 1, 2)")


def test_a_norm_and_a_recurrent_layer_say_how_many_features_they_want() -> None:
    x = torch.ones(4, 16)
    assert "wants 8: dim 1 is 16" in explained(lambda: nn.BatchNorm1d(8)(x)).message
    assert "wants [8]: the last dim is 16" in explained(lambda: nn.LayerNorm(8)(x)).message
    assert "wants 8: the last dim is 16" in explained(lambda: nn.LSTM(8, 2)(x)).message


def test_a_norm_of_one_value_says_what_it_is_over_and_what_to_do() -> None:
    model, x = nn.Sequential(nn.Identity(), nn.BatchNorm1d(48)), torch.ones(1, 48)
    finding = explained(lambda: model(x))
    assert finding.message == (
        "`1` normalises over the batch, and [1, 48] has one value for each channel"
    )
    assert finding.module == "1"
    assert "drop_last=True" in (finding.fix or "")
    layer, image = nn.InstanceNorm2d(3), torch.ones(2, 3, 1, 1)
    assert "over its positions, and [2, 3, 1, 1] has one" in explained(lambda: layer(image)).message


def test_view_and_cat_say_what_does_not_fit() -> None:
    x, parts = torch.ones(2, 3), [torch.ones(2, 3), torch.ones(2, 4)]
    finding = explained(lambda: x.view(4, -1))
    assert "`x` is [2, 3], 6 elements: they cannot be arranged as [4, -1]" in finding.message
    assert "`parts[1]` is [2, 4]" in explained(lambda: torch.cat(parts)).message
    assert "`parts[1]` is [2, 4]" in explained(lambda: torch.stack(parts)).message


# ---- devices and dtypes


def test_devices_say_which_operand_is_where() -> None:
    x, y = torch.ones(3), torch.ones(3, device="meta")
    finding = explained(lambda: x + y)
    assert "`x` is on cpu, `y` is on meta" in finding.message
    assert finding.fix == "x.to('meta')"
    model, batch = nn.Sequential(nn.Linear(4, 2, device="meta")), torch.ones(3, 4)
    assert "`0.weight` is on meta" in explained(lambda: model(batch)).message


def test_dtypes_say_which_operand_is_what() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.ones(3, 4, dtype=torch.float64)
    finding = explained(lambda: model[0](x))
    assert "`x` is f64, `0.weight` is f32" in finding.message or "weight of" in finding.message
    assert finding.fix == "x.to(torch.float32)"
    half = torch.ones(4, 2, dtype=torch.float16)
    assert "`half` is f16" in explained(lambda: x.float() @ half).message


def test_targets_and_ids_of_the_wrong_dtype_are_told_what_to_be() -> None:
    logits, y, ids = torch.ones(3, 4), torch.ones(3, dtype=torch.int32), torch.ones(3)
    finding = explained(lambda: F.cross_entropy(logits, y))
    assert "`y` is i32: the class indices of cross_entropy must be i64" in finding.message
    assert finding.fix == "y.long()"
    assert "`ids` is f32: indices" in explained(lambda: nn.Embedding(4, 2)(ids)).message
    p, label = torch.rand(3), torch.tensor([0, 1, 1])
    assert explained(lambda: F.binary_cross_entropy(p, label)).fix == "label.to(torch.float32)"


# ---- indices and targets


def test_class_index_says_the_value_and_the_allowed_range() -> None:
    logits, y, criterion = torch.ones(3, 10), torch.tensor([0, 12, 2]), nn.CrossEntropyLoss()
    finding = explained(lambda: criterion(logits, y))
    assert finding.message == (
        "`y` holds 12 (values 0 to 12), `logits` [3, 10] has 10 classes: allowed are 0 to 9"
    )
    assert finding.op == "cross_entropy"
    count = torch.tensor([1, 10, 2])
    assert explained(lambda: criterion(logits, count)).fix.startswith("count - 1")
    pad = torch.tensor([1, -1, 2])
    assert "ignore_index=-1" in explained(lambda: criterion(logits, pad)).fix
    void = torch.tensor([1, 255, 2])
    assert "ignore_index=255" in explained(lambda: criterion(logits, void)).fix


def test_what_is_no_probability_is_told_with_its_range() -> None:
    logits, y = torch.tensor([[-1.5], [2.0]]), torch.tensor([[0.0], [1.0]])
    finding = explained(lambda: nn.BCELoss()(logits, y))
    assert finding.message.startswith("`logits` holds values from -1.5 to 2: ")
    assert "BCEWithLogitsLoss" in finding.fix
    p, mask = logits.sigmoid(), y * 255
    finding = explained(lambda: nn.functional.binary_cross_entropy(p, mask))
    assert finding.message.startswith("`mask` holds values from 0 to 255: ")
    assert "mask / 255" in finding.fix
    lost = p / 0 * 0
    finding = explained(lambda: nn.functional.binary_cross_entropy(lost, y))
    assert finding.message.startswith("`lost` holds 2 NaN: ")
    assert finding.fix == "look for what makes lost NaN, before the loss takes it"


def test_embedding_index_says_the_value_and_the_allowed_range() -> None:
    model, ids = nn.Sequential(nn.Embedding(10, 3)), torch.tensor([[1, 12]])
    finding = explained(lambda: model(ids))
    assert "holds 12 (values 1 to 12), `0` has 10 rows: allowed are 0 to 9" in finding.message
    assert "nn.Embedding(13, ...)" in finding.fix
    unknown = torch.tensor([[1, -1]])
    fix = explained(lambda: model(unknown)).fix
    assert fix.startswith("unknown.masked_fill(unknown < 0, 10) and nn.Embedding(11, ...)")


def test_other_indices_say_their_range_too() -> None:
    x, index = torch.ones(3, 4), torch.tensor([[5]])
    assert "`index` holds 5: allowed are 0 to 3" in explained(lambda: x.gather(1, index)).message
    assert "allowed are 0 to 2" in explained(lambda: x[torch.tensor([1, 5])]).message
    labels = torch.tensor([1, 5])
    assert "`labels` holds 5" in explained(lambda: F.one_hot(labels, 3)).message


def test_target_of_the_wrong_shape_is_told_the_right_one() -> None:
    logits, y = torch.ones(3, 10), torch.zeros(3, 1, dtype=torch.long)
    finding = explained(lambda: F.cross_entropy(logits, y))
    assert "`y` is [3, 1], `logits` is [3, 10]" in finding.message
    assert "wants class indices of shape [3]" in finding.message
    assert finding.fix == "y.squeeze(1)  # [3]"
    onehot = torch.zeros(3, 10, dtype=torch.long)
    assert "onehot.argmax(1)" in explained(lambda: F.cross_entropy(logits, onehot)).fix
    p, t = torch.ones(3, 1), torch.ones(3)
    finding = explained(lambda: F.binary_cross_entropy_with_logits(p, t))
    assert finding.fix == "t.view_as(p)"
    assert "shape [3]" in explained(lambda: F.cross_entropy(logits, y[:2, 0])).message


# ---- backward


def test_backward_on_many_numbers_is_told_to_reduce() -> None:
    w = torch.ones(3, requires_grad=True)

    def program() -> None:
        loss = w * 2
        loss.backward()

    finding = explained(program)
    assert "`loss` is [3]: backward() starts from one number, and this has 3" in finding.message
    assert finding.fix.startswith("loss.mean().backward()")
    assert finding.phase == "backward"


def test_second_backward_names_the_line_of_the_first() -> None:
    model = Net()

    def program() -> None:
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        loss.backward()

    finding = explained(program)
    assert "this is backward() on the same loss" in finding.message
    first, second = finding.chain
    assert first.location is not None
    assert second.location is not None
    assert second.location.line == first.location.line + 1
    assert f":{first.location.line}" in finding.message


def test_a_loss_made_before_the_loop_is_told_to_be_made_in_it() -> None:
    model = Net()

    def program() -> None:
        loss = model(torch.ones(2, 4)).square().mean()
        for _ in range(3):
            loss.backward()

    assert explained(program).fix.startswith("make the loss anew in the loop")


def test_a_loss_made_before_the_trace_is_told_to_be_made_in_the_loop() -> None:
    loss = Net()(torch.ones(2, 4)).square().mean()

    def program() -> None:
        for _ in range(3):
            loss.backward()

    finding = explained(program)
    assert "this is backward() on the same loss" in finding.message
    assert finding.fix.startswith("make the loss anew in the loop")


def test_a_loss_made_before_a_loop_over_batches_is_told_to_be_made_in_it() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program() -> None:
        loss = model(torch.ones(2, 4)).square().mean()
        for _ in DataLoader(torch.ones(8, 4), batch_size=2):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    finding = explained(program)
    assert "on the loss of that step: nothing was computed since" in finding.message
    assert "make the loss anew in the loop" in finding.fix


def test_an_output_made_before_the_loop_is_told_to_be_made_in_it() -> None:
    model = Net()

    def program() -> None:
        out = model(torch.ones(2, 4))
        for _ in range(3):
            loss = out.square().mean()
            loss.backward()

    finding = explained(program)
    assert "a loss that shares a part of its graph" in finding.message
    assert finding.fix.startswith("call the model in the loop")


def test_losses_of_one_output_are_told_to_be_summed_also_in_a_loop() -> None:
    model = Net()

    def program() -> None:
        out = model(torch.ones(2, 4))
        for loss in [out.square().mean(), out.abs().mean()]:
            loss.backward()

    assert explained(program).fix.startswith("(loss_a + loss_b).backward()")


UPDATES = {
    "w = w - lr * w.grad\n        w.grad.zero_()": "with torch.no_grad(): w -= lr * w.grad  #",
    "w = w - lr * w.grad": "with torch.no_grad(): w -= lr * w.grad  #",
    "w = w - w.grad * lr": "with torch.no_grad(): w -= w.grad * lr  #",
    "w = w + (-lr) * w.grad": "with torch.no_grad(): w += -lr * w.grad  #",
    "w = w - lr * w.grad - 0.0": "w = w.detach().requires_grad_() where it is made",
    "v = w - lr * w.grad; w = v": "w = w.detach().requires_grad_() where it is made",
    "w = w - lr * w.grad; w.grad.zero_()": "w = w.detach().requires_grad_() where it is made",
}


@pytest.mark.parametrize("update", UPDATES)
def test_the_gradient_of_what_an_op_returned_is_told_by_how_it_came_to_be(
    update: str, tmp_path: Path
) -> None:
    source = f"""
def train(w, x, lr):
    for _ in range(3):
        (x @ w).square().mean().backward()
        {update}
"""
    file = tmp_path / "loop.py"
    file.write_text(source)
    scope: dict[str, Any] = {}
    exec(compile(source, str(file), "exec"), scope)
    weight, data = torch.ones(4, 1, requires_grad=True), torch.ones(2, 4)
    with pytest.warns(UserWarning, match="not a leaf"):
        finding = explained(lambda: scope["train"](weight, data, 0.1))
    assert "`w.grad` is None: `w` [4, 1] is what" in finding.message
    assert "and no leaf" in finding.message
    assert finding.fix.startswith(UPDATES[update])


def test_a_leaf_made_of_one_that_requires_grad_is_told_to_be_detached() -> None:
    def program() -> None:
        w = torch.ones(4, 1, requires_grad=True) * 0.1
        (torch.ones(2, 4) @ w).sum().backward()
        w = w - 0.1 * w.grad

    with pytest.warns(UserWarning, match="not a leaf"):
        finding = explained(program)
    assert "is what `mul` returned" in finding.message
    assert "detach().requires_grad_()" in finding.fix


def test_a_leaf_that_no_backward_has_reached_is_told_as_it_is() -> None:
    def program() -> None:
        w, kept = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True) * 1
        kept.retain_grad()
        w.sum().backward()
        kept - 0.1 * kept.grad

    assert explained(program).message.startswith("TypeError: unsupported operand")


def test_an_update_by_hand_without_a_graph_is_told_to_be_made_in_place() -> None:
    def program() -> None:
        w = torch.ones(4, 1, requires_grad=True)
        for _ in range(2):
            (torch.ones(2, 4) @ w).square().mean().backward()
            with torch.no_grad():
                w = w - 0.1 * w.grad

    finding = explained(program)
    assert "`sub` ran with gradients off" in finding.message
    assert finding.fix.endswith("write it in place: w -= ...")


def test_a_graph_of_an_earlier_step_is_told_to_be_detached() -> None:
    cell = nn.RNNCell(2, 3)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)

    def program() -> None:
        hidden = torch.zeros(1, 3)
        for _ in range(2):
            hidden = cell(torch.ones(1, 2), hidden)
            hidden.sum().backward()
            optimizer.step()

    finding = explained(program)
    assert "backward() of an earlier step" in finding.message
    assert "detach()" in finding.fix


def test_a_leaf_changed_in_place_is_named() -> None:
    def program() -> None:
        w = torch.ones(3, requires_grad=True)
        w -= 0.1

    assert "`w` [3] requires grad and is a leaf" in explained(program).message


def test_a_value_written_over_names_both_lines() -> None:
    def program() -> None:
        x = torch.ones(3, requires_grad=True)
        h = x.tanh()
        h.add_(1)
        h.sum().backward()

    finding = explained(program)
    made, writer = finding.chain
    assert (made.op, writer.op) == ("tanh", "add_")
    assert made.location is not None
    assert writer.location is not None
    assert writer.location.line == made.location.line + 1
    assert f"by `add_` at test_exceptions.py:{writer.location.line};" in finding.message
    assert "the backward of `tanh`" in finding.message


def test_a_value_written_over_inside_a_module_is_bracketed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.head = nn.Tanh(), nn.Linear(4, 1)

        def forward(self, x):
            h = self.act(x * 2)
            h += 1
            return self.head(h)

    model, x = Model(), torch.ones(2, 4, requires_grad=True)
    finding = explained(lambda: model(x).sum().backward())
    assert [link.op for link in finding.chain] == ["act", "head"]
    assert "changed in place by something before `head`" in finding.message


class Weighted(nn.Module):
    """Weights its inputs by what ReLUs make of parameters, the first of which it divides."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(count, 2, 3))
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(count))
        self.same = nn.Identity()

    def forward(self, x):
        made = [self.relus[0](self.w[0])]
        for relu, w in zip(list(self.relus)[1:], self.w[1:], strict=True):
            made.append(self.same(relu(w)))
        made[0] /= made[0].sum()
        for w in made:
            x = x * w
        return x


def lines_of(words: str) -> list[int]:
    """The numbers of the lines of this file that have these words, but for this test's."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return [i for i, line in enumerate(lines, 1) if words in line and '"' not in line]


def test_a_value_written_over_that_no_other_call_took_names_what_made_it() -> None:
    model, x = Weighted(1), torch.ones(2, 3)
    found = explained(lambda: model(x).sum().backward())
    (line,) = lines_of("made = [self.relus[0]")
    assert f"made by `relus.0` at test_exceptions.py:{line} was changed in place" in found.message
    assert [link.op for link in found.chain] == ["relus.0"]
    assert 'With level="op" the line is named' in (found.fix or "")
    (writer,) = lines_of("made[0] /= made")
    named = explained(lambda: model(x).sum().backward(), level="op").message
    assert f"by `div_` at test_exceptions.py:{writer}" in named


def test_what_was_differentiated_to_the_end_was_not_written_over() -> None:
    found = explained(lambda: Weighted(2)(torch.ones(2, 3)).sum().backward())
    (line,) = lines_of("made = [self.relus[0]")
    assert f"made by `relus.0` at test_exceptions.py:{line} was changed" in found.message


def test_a_value_that_another_op_has_kept_is_told_without_what_made_it() -> None:
    """Torch names the node that wrote over it, which is no call here; another has that node."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.relu = nn.Parameter(torch.ones(2, 3)), nn.ReLU()

        def forward(self):
            a, b = self.w * 1, self.relu(self.w * 2)
            out = a * b
            a.relu_()
            return out

    message = explained(lambda: Model()().sum().backward()).message
    assert message == "a tensor [2, 3] made by relu was changed in place before this backward()"


def test_a_parameter_that_is_transposed_in_a_module_is_still_the_optimizers() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3))

        def forward(self):
            return self.w.t()

    first, second = Transposed(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)

    def program() -> None:
        loss = (second(torch.ones(2, 3)) @ first()).square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        loss.backward()

    assert "changed by SGD.step()" in explained(program).message


def test_op_level_names_the_op_that_wrote_over_a_value_inside_a_module() -> None:
    class Model(nn.Module):
        def forward(self, x):
            h = x.sigmoid()
            h *= 2
            return h

    model, x = Model(), torch.ones(2, 4, requires_grad=True)
    finding = explained(lambda: model(x).sum().backward(), level="op")
    assert [(link.op or "").strip("_") for link in finding.chain] == ["sigmoid", "mul"]
    assert "the backward of `sigmoid`" in finding.message


def test_a_module_that_writes_in_place_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.ReLU(inplace=True))
    message = explained(lambda: model(torch.ones(2, 3)).sum().backward()).message
    assert "changed in place by `2` at" in message


def test_an_optimizer_between_forward_and_backward_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program() -> None:
        out = model(torch.ones(2, 3))
        out.sum().backward(retain_graph=True)
        optimizer.step()
        out.square().sum().backward()

    assert "changed by SGD.step()" in explained(program).message


def test_a_loss_without_a_graph_says_where_it_was_lost() -> None:
    model, x = Net(), torch.ones(2, 4)

    def without() -> None:
        with torch.no_grad():
            out = model(x)
        out.sum().backward()

    def rounded() -> None:
        loss = (model(x).argmax(dim=1) * 1.0).mean()
        loss.backward()

    def frozen() -> None:
        still = nn.Linear(4, 2).requires_grad_(False)
        still(x).sum().backward()

    def once() -> None:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf).sum(), leaf)
        slope.square().sum().backward()

    assert "torch.autograd.grad returned at test_exceptions.py" in explained(once).message
    assert "create_graph=True" in (explained(once).fix or "")

    def remade() -> None:
        torch.tensor(model(x).sum().item()).backward()

    assert "ran with gradients off" in explained(without).message
    assert "`argmax` at" in explained(rounded).message
    assert "none of the 2 parameters" in explained(frozen).message
    assert "torch.tensor(...)" in explained(remade).message


class Checkpointed(nn.Module):
    """A body that is trained, on a frozen embedding."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4).requires_grad_(False)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False)
        self.how = how

    def forward(self, ids):
        x = self.table(ids)
        if self.how:
            x = x + checkpoint(self.body, x, **self.how)
        else:
            with torch.no_grad():
                x = x + self.body(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("how", [{"use_reentrant": True}, {}])
def test_a_module_inside_another_that_ran_with_gradients_off_is_named(how: Any) -> None:
    model = Checkpointed(**how)
    found = explained(lambda: model(torch.arange(9)).sum().backward())
    assert re.fullmatch(
        r"the loss does not require grad: `body` ran with gradients off at .*\.py:\d+",
        found.message,
    )
    assert found.fix.startswith("call it outside torch.no_grad() and inference_mode(); if torch")
    assert "use_reentrant=False, or an input that requires grad" in found.fix


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_line_that_calls_a_reentrant_checkpoint_is_told_what_that_wants() -> None:
    def program() -> None:
        x = checkpoint(nn.Linear(4, 2), torch.ones(2, 4), use_reentrant=True)
        x.sum().backward()

    found = explained(program)
    assert "ran with gradients off at test_exceptions.py" in found.message
    assert found.explanation.startswith("a reentrant checkpoint runs what it is given")
    assert found.fix.startswith("checkpoint(..., use_reentrant=False), or an input that requires")


def test_gradients_that_are_off_are_no_checkpoint_where_an_input_requires_grad() -> None:
    model, x = Net(), torch.ones(2, 4, requires_grad=True)

    def program() -> None:
        with torch.no_grad():
            out = model(x)
        out.sum().backward()

    assert explained(program).fix == "call it outside torch.no_grad() and inference_mode()"


def test_a_teacher_without_gradients_is_not_to_blame_for_a_loss_that_is_detached() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                wanted = self.teacher(x)
            return (self.student(x) - wanted).square().mean().detach()

    model = Pair()
    found = explained(lambda: model(torch.ones(2, 4)).backward())
    assert "cut off by detach()" in found.message


# ---- the rest


def test_out_of_memory_tells_what_holds_it_and_what_has_grown() -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            h = self.proj(x)
            if x.shape[1] > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return h

    model = Hungry()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program() -> None:
        for length in (8, 512):
            model(torch.ones(2, length, 4)).sum().backward()
            optimizer.step()

    finding = explained(program)
    assert "no memory left for 20.00 GiB" in finding.message
    assert "from [2, 8, 4] to [2, 512, 4] since the step before" in finding.message
    assert "parameters 80 B" in finding.explanation
    assert "`proj` [2, 512, 4] 16 KiB" in finding.explanation


def test_state_dict_with_another_prefix_is_told_how_to_rename() -> None:
    model = Net()
    saved = {f"module.{key}": value for key, value in model.state_dict().items()}
    finding = explained(lambda: model.load_state_dict(saved))
    assert "`module.net.0.weight` in the file is `net.0.weight` in the model" in finding.message
    assert "k.removeprefix('module.')" in finding.fix


def test_a_prefix_that_fits_the_first_key_alone_is_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = {"f.0.weight": 0, "f.2.weight": 0, "f.2.bias": 0, "head.bias": 0}
    finding = explained(lambda: model.load_state_dict(state))
    assert finding.message.startswith("the state dict does not fit: 4 keys are missing and 4 un")


def test_state_dict_of_other_shapes_names_the_first() -> None:
    state = Net(5).state_dict()
    finding = explained(lambda: Net(4).load_state_dict(state))
    assert "`net.0.weight` is [8, 5] in the state dict and [8, 4]" in finding.message
    finding = explained(lambda: Net().load_state_dict({}))
    assert "4 keys are missing and 0 unexpected" in finding.message


def test_a_python_number_from_a_replica_is_told_to_be_a_tensor() -> None:
    finding = explained(lambda: gather([1.0, 2.0], "cpu"))
    assert "DataParallel cannot gather" in finding.message


def test_any_other_exception_is_told_with_the_tensors_of_its_line() -> None:
    x = torch.ones(3, requires_grad=True)
    finding = explained(lambda: x.numpy())  # noqa: PLW0108 the line is what is looked at
    assert finding.message.startswith("RuntimeError: Can't call numpy()")
    assert "in `x.numpy()`: `x` [3] f32" in finding.explanation

    def program() -> None:
        raise ValueError

    assert explained(program).message == "ValueError"


# ---- what is collected, and what is left alone


def test_the_exception_is_the_users_own_unchanged() -> None:
    error = ValueError("mine")

    def program() -> None:
        raise error

    _, caught = raised(program)
    assert caught is error
    assert error.args == ("mine",)
    assert getattr(error, "__notes__", []) == []
    assert error.__cause__ is None
    assert error.__context__ is None
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names == ["raised", "program"]


def test_an_exception_caught_inside_is_no_finding() -> None:
    records = Recorded()
    with trace(out=records.append, every=1):
        with pytest.raises(RuntimeError):
            Net()(torch.ones(2, 5))
        Net()(torch.ones(2, 4))
    assert records.of(Finding) == []
    assert records.actions("exception") == []
    assert records.modules(module="net.0")[0].exception == "RuntimeError"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_being_told_to_stop_is_no_finding(kind: type[BaseException]) -> None:
    records = Recorded()
    with pytest.raises(kind), trace(out=records.append, every=1):
        raise kind
    assert records.of(Finding) == []


class TrialPruned(Exception):  # noqa: N818 - its name is what is looked at
    """As optuna has it."""


class Dropped(unittest.SkipTest):
    """A test framework's own."""


@pytest.mark.parametrize(
    "kind", [bdb.BdbQuit, unittest.SkipTest, Dropped, UnsatisfiedAssumption, TrialPruned]
)
def test_going_no_further_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(TrialPruned, "__module__", "optuna.exceptions")
    records, _ = raised(lambda: throw(kind()))
    assert records.of(Finding) == []
    (end,) = records.of(End)
    assert end.why == ("interrupt" if kind is bdb.BdbQuit else "exception")
    assert end.failure is not None
    assert end.failure.type == kind.__name__


@pytest.mark.parametrize("kind", [TrialPruned, RuntimeError])
def test_another_exception_by_such_a_name_is_a_finding(kind: type[Exception]) -> None:
    assert explained(lambda: throw(kind("mine"))).message == f"{kind.__name__}: mine"


def test_a_class_that_does_not_say_its_module_is_a_finding() -> None:
    class Silent(type):
        @property
        def __module__(cls) -> str:
            raise RuntimeError("no")

    class OddError(ValueError, metaclass=Silent):
        pass

    assert explained(lambda: throw(OddError("mine"))).message == "OddError: mine"


def throw(error: Exception) -> None:
    raise error


def test_stop_on_raises_no_second_error_and_none_later() -> None:
    seen = []
    tracer = trace(out=Recorded().append, every=1, stop_on=lambda f: seen.append(f.code) or True)

    @tracer
    def step(width: int) -> Any:
        return Net()(torch.ones(2, width))

    with pytest.raises(RuntimeError, match="mat1"):
        step(5)
    step(4)
    tracer.close()
    assert seen == ["TT801"]


def test_a_decorated_function_explains_each_exception_once() -> None:
    records = Recorded()
    model = Net()
    tracer = trace(out=records.append, every=1)

    @tracer
    def step(width: int) -> Any:
        return model(torch.ones(2, width))

    for width in (4, 5, 4, 5):
        try:
            step(width)
        except RuntimeError as error:
            assert "mat1" in str(error)
    tracer.close()
    (finding,) = records.of(Finding, code="TT801")
    assert finding.step == 1
    assert sum(sum(step.repeats.values()) for step in records.of(Step)) == 1


def test_an_exception_that_leaves_twice_is_recorded_once() -> None:
    records = Recorded()
    error = ValueError("mine")
    tracer = trace(out=records.append, every=1)

    @tracer
    def fail() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            fail()
    tracer.close()
    assert len(records.actions("exception")) == 1


def test_another_exception_at_the_same_address_is_another() -> None:
    records = Recorded()
    tracer = trace(out=records.append, every=1)
    numbers = []

    @tracer
    def fail() -> None:
        raise ValueError("mine")

    for _ in range(20):
        try:
            fail()
        except ValueError as error:
            numbers.append(id(error))
    tracer.close()
    assert len(set(numbers)) < 20  # else nothing is tested
    assert len(records.actions("exception")) == 20


def test_it_is_told_once_on_stderr(capsys: Any) -> None:
    finding = explained(lambda: Net()(torch.ones(2, 5)))
    err = capsys.readouterr().err
    assert err.count("TT801") == 1
    assert finding_text(finding).splitlines()[0] in err


def test_the_record_comes_before_the_step_closes_and_the_run_ends() -> None:
    records, _ = raised(lambda: Net()(torch.ones(2, 5)))
    kinds = [type(r) for r in records if isinstance(r, (Action, Finding, Step, End))]
    assert kinds == [Action, Finding, Step, End]
    (call,) = records.modules(module="net.0")
    assert call.exception == "RuntimeError"
    (end,) = records.of(End)
    assert end.why == "exception"
    assert end.findings["error"] == 1


def test_an_error_between_steps_is_explained_without_a_step_of_its_own() -> None:
    model, optimizer = Net(), torch.optim.SGD([torch.zeros(1)], lr=0.1)

    def program() -> None:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        raise KeyError("lr")

    records, _ = raised(program)
    assert [f.message for f in records.of(Finding)] == ["KeyError: 'lr'"]
    assert len(records.steps()) == 1


def test_facts_are_the_shapes_and_names_of_the_line() -> None:
    model = Classifier()
    records, _ = raised(lambda: model(torch.ones(3, 65)))
    (action,) = records.actions("exception")
    detail = action.detail
    assert action.of == "Linear"
    assert (detail["type"], detail["module"], detail["phase"]) == (
        "RuntimeError",
        "head",
        "forward",
    )
    assert [line.strip() for _, line in detail["lines"]][:2] == [
        "features = self.body(x)", "return self.head(features)",
    ]  # fmt: skip
    (features,) = [one for one in detail["operands"] if one["name"] == "features"]
    assert (features["shape"], features["dtype"], features["device"]) == ([3, 65], "float32", "cpu")
    assert [p["shape"] for p in detail["parameters"]] == [[10, 64], [10]]
    assert detail["settings"] == {"in_features": 64, "out_features": 10}
    assert detail["entered"][0]["as"] == "features"


def test_no_code_of_the_users_is_called_to_read_the_operands() -> None:
    called = []

    class Config:
        @property
        def width(self) -> int:
            called.append("property")
            return 3

        def __getattr__(self, name: str) -> Any:
            called.append(name)
            raise AttributeError(name)

        def __getitem__(self, key: int) -> Any:
            called.append("item")
            return torch.ones(2)

    config, x = Config(), torch.ones(2, 3)

    def program() -> None:
        x.view(config.width, config[0].numel(), 7)

    _, _ = raised(program)
    assert called == ["property", "item"]  # the program's own, once


def test_no_tensor_of_the_program_is_kept_alive() -> None:
    class Model(nn.Module):
        def forward(self, x):
            h = torch.ones(2, 3)
            refs.append(weakref.ref(h))
            return h @ x

    refs: list[Any] = []

    def outer() -> None:
        kept = torch.ones(4, 5)
        refs.append(weakref.ref(kept))
        try:
            with trace(out=Recorded().append, every=1):
                Model()(kept)
        except RuntimeError:
            pass
        del kept
        gc.collect()
        # The frame of the block is still alive here: what it has deleted must be gone.
        assert [ref() for ref in refs] == [None, None]

    outer()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="locals() is a snapshot of its own")
def test_a_dict_of_locals_that_the_program_holds_is_left_alone() -> None:
    def program() -> None:
        a = torch.ones(2)
        mine = locals()
        try:
            with trace(out=Recorded().append, every=1):
                a @ torch.ones(3)
        except RuntimeError:
            pass
        assert mine["a"] is a

    program()


def test_nothing_is_measured_once_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(tensor: Any) -> None:
        pytest.fail("a statistic was taken")

    monkeypatch.setattr("tensortrace.capture.exceptions.summarize", touch)
    labels = torch.tensor([1, 2])

    def lost(y: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered, index out of bounds")

    finding = explained(lambda: lost(labels))
    assert "a kernel on the GPU stopped" in finding.message
    assert "CUDA_LAUNCH_BLOCKING=1" in finding.fix


def test_a_long_message_and_many_operands_stay_small() -> None:
    tensors = [torch.ones(1)] * 500

    def fail(*args: Any) -> None:
        raise ValueError("x" * 100_000)

    records, _ = raised(lambda: fail(tensors, *tensors))
    (action,) = records.actions("exception")
    assert len(encode(action)) < 16_000


def test_an_exception_whose_text_cannot_be_read_is_explained_too() -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise ValueError

    def program() -> None:
        raise OddError

    assert "its message cannot be read" in explained(program).message


def test_our_own_failure_is_a_line_in_the_log_and_never_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tensortrace.capture.exceptions._entries", broken)
    records = Recorded()
    with pytest.raises(ValueError, match="mine"), trace(out=records.append, every=1):
        raise ValueError("mine")
    (fault,) = records.actions("tracer_error")
    assert fault.detail["where"] == "exceptions"


def test_what_fails_at_the_end_of_a_run_is_not_the_users_either(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tensortrace.capture.source.SourceLines.locate_traceback", broken)
    records = Recorded()
    with pytest.raises(ValueError, match="mine"), trace(out=records.append, every=1):
        raise ValueError("mine")
    faults = records.actions("tracer_error")
    assert {fault.detail["where"] for fault in faults} == {"exceptions"}
    (end,) = records.of(End)
    assert (end.why, end.failure) == ("exception", None)


@pytest.mark.parametrize("every", [1, 1000])
def test_the_saved_log_gives_the_same_finding(tmp_path: Path, every: int) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def program() -> None:
        for width in (4, 4, 5):
            model(torch.ones(2, width)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    records, _ = raised(program, every=every)
    engine = Engine()
    again = [f for r in map(decode, map(encode, records)) for f in engine.feed(r)]
    assert engine.problems == []
    assert again == records.of(Finding)
    assert [f.code for f in again] == ["TT801"]
    assert len(records.of(Call, step=1)) > 0  # the step before is full
    assert records.of(Module)
    assert records.of(Optimizer)


@pytest.mark.parametrize("joint", [False, True], ids=["a discriminator", "two heads of one body"])
@pytest.mark.parametrize("turn", [0, 30])
def test_a_graph_that_a_loss_of_its_own_optimizer_has_freed_is_detached(
    joint: bool, turn: int
) -> None:
    class Judge(nn.Sequential):
        pass

    make, judge = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), Judge(nn.Linear(6, 1))
    first = torch.optim.SGD([*judge.parameters(), *(make.parameters() if joint else ())], 0.1)
    second = torch.optim.SGD(make.parameters(), 0.1)

    def program() -> None:
        for i in range(turn + 1):
            real, fake = torch.randn(8, 6), make(torch.randn(8, 4))
            first.zero_grad()
            taken = fake if i == turn else fake.detach()
            (judge(taken) - judge(real)).mean().backward()
            first.step()
            second.zero_grad()
            judge(fake).mean().backward()
            second.step()

    finding = explained(program)
    assert finding.step == turn
    assert ("(loss_a + loss_b)" in finding.fix) is joint
    if not joint:
        assert "detach what `Sequential` made where `Judge` takes it" in finding.fix


def of_distribution() -> None:
    scale = nn.Parameter(torch.tensor([1.0, -0.5]))
    torch.distributions.Normal(torch.zeros(2), scale, validate_args=True)


def of_a_complex_loss() -> None:
    loss = (torch.ones(2, dtype=torch.complex64, requires_grad=True) ** 2).sum()
    loss.backward()


def of_a_copy() -> None:
    x = torch.ones(2, 4)
    leaf = x.clone().requires_grad_()
    u = Net()(x).sum()
    torch.autograd.grad(u, leaf, torch.ones_like(u), create_graph=True)


def of_data() -> None:
    x = torch.ones(2, 4)
    u = Net()(x).sum()
    torch.autograd.grad(u, x)


@pytest.mark.parametrize(("program", "words", "fix"), [
    (lambda: torch.linalg.cholesky(-1000 * torch.eye(3)), "positive-definite",
     "A + 1e-3 * torch.eye(n), more if that is too little; float64"),
    (lambda: torch.linalg.solve(torch.zeros(3, 3), torch.ones(3)), "singular",
     "A + 1e-6 * torch.eye(n), more if that is too little, or torch.linalg.lstsq / pinv"),
    (of_distribution, "scale of Normal holds -0.5: it must satisfy GreaterThan(lower_bound=0.0)",
     "F.softplus(scale) + 1e-6, or scale.exp()"),
    (of_a_complex_loss, "`loss` is complex", "e.abs().square().mean()"),
    (of_a_copy, "`leaf` [2, 4] was not used to compute", "pass the same tensor"),
    (of_data, "`x` [2, 4] does not require grad", "x.requires_grad_(True) before"),
])  # fmt: skip
def test_a_value_that_is_refused_has_a_repair(program: Any, words: str, fix: str) -> None:
    finding = explained(program)
    assert words in finding.message
    assert fix in (finding.fix or "")


def test_a_decomposition_of_nan_is_blamed_on_what_made_it() -> None:
    def program() -> None:
        with torch.no_grad():
            model = nn.Linear(3, 3)
            model.weight.fill_(math.nan)
        x = model(torch.eye(3))
        torch.linalg.cholesky(x)

    records, _ = raised(program)
    (found,) = [f for f in records.of(Finding) if f.code == "TT801"]
    assert "torch.eye" not in (found.fix or "")


def test_a_mask_over_the_range_of_float16_names_the_number_and_the_tensor() -> None:
    def program() -> None:
        scores = torch.zeros(2, 2).half()
        scores.masked_fill(torch.eye(2) > 0, -1e8)

    found = explained(program)
    limit = "-1.0e+08 does not fit in f16 (largest 65504), and `scores` is [2, 2] of that"
    assert found.message == limit
    assert (found.fix or "").startswith("torch.finfo(scores.dtype).min for that number")
    torch.zeros(2, 2).half().masked_fill(torch.eye(2) > 0, torch.finfo(torch.half).min)


@pytest.mark.parametrize(("twice", "when"), [
    (False, "in an earlier step"), (True, "at test_exceptions.py:"),
])  # fmt: skip
def test_a_scaler_that_is_not_updated_is_told_to_be(twice: bool, when: str) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def program() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(3, 2)).sum()).backward()
            scaler.unscale_(optimizer)
            if twice:
                scaler.unscale_(optimizer)

    found = explained(program)
    assert found.message.startswith(f"scaler.unscale_() ran {when}")
    assert "and scaler.update() has not since" in found.message
    assert (found.fix or "").startswith("scaler.update() at the end of each turn")


@pytest.mark.parametrize(("shape", "first", "words", "fix"), [
    ((2, 16, 6), True, "that of a batch of 16, and this one is of 3", "zeros(2, x.size(0), 6); if"),
    ((2, 16, 6), False, "that of a batch of 16, and this one is of 3", "zeros(2, x.size(1), 6); i"),
    ((1, 3, 6), True, "[1, 3, 6], and has to be [2, 3, 6]", "torch.zeros(2, 3, 6)"),
    ((2, 3, 5), True, "[2, 3, 5], and has to be [2, 3, 6]", "torch.zeros(2, 3, 6)"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_hidden_state_of_another_shape_is_told_what_to_be(
    kind: Any, shape: tuple[int, ...], first: bool, words: str, fix: str
) -> None:
    def program() -> None:
        recurrent = kind(4, 6, num_layers=2, batch_first=first)
        state = torch.zeros(shape)
        x = torch.ones(3, 7, 4) if first else torch.ones(7, 3, 4)
        recurrent(x, state if kind is nn.GRU else (state, state))

    found = explained(program)
    assert words in found.message
    assert fix in (found.fix or "")


@pytest.mark.parametrize(("other", "fix"), [
    ((1, 4, 4), '.convert("RGB")'), ((3, 5, 4), "resize, crop or pad them"),
])  # fmt: skip
def test_samples_of_two_shapes_are_the_datasets(other: tuple[int, ...], fix: str) -> None:
    data = [torch.zeros(3, 4, 4), torch.zeros(other)]

    def program() -> None:
        for batch in DataLoader(data, batch_size=2):  # type: ignore[arg-type]
            print(batch)

    found = explained(program)
    assert found.message.startswith(
        "the samples of the dataset differ in shape: [3, 4, 4] at place"
    )
    assert fix in (found.fix or "")
    # Before Python 3.11 instructions have no columns, and the head of a loop is not found.
    if sys.version_info >= (3, 11):
        assert found.evidence["expression"].endswith("batch_size=2):")
    stacked = explained(lambda: torch.stack(data)).message
    assert "cannot be joined" in stacked
