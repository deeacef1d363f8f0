"""What is said of the mean over an empty batch, and of a repair of it, is held against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensortrace.causes import Reason, forward
from tests.causes.test_repairs import facts
from tests.checks.traced import find_live

Loss = Callable[..., Tensor]
NONE = torch.zeros(0, 4)
NO_LABEL = torch.zeros(0, dtype=torch.long)
LOSSES: dict[Loss, tuple[Tensor, ...]] = {
    **dict.fromkeys((
        F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss,
        F.multilabel_soft_margin_loss, F.hinge_embedding_loss, F.kl_div), (NONE,)),
    **dict.fromkeys((
        F.triplet_margin_loss, F.triplet_margin_with_distance_loss, F.gaussian_nll_loss,
        F.margin_ranking_loss), (NONE, NONE)),
    F.cosine_embedding_loss: (NONE, torch.zeros(0)),
    F.cross_entropy: (NO_LABEL,), F.nll_loss: (NO_LABEL,),
}  # fmt: skip


def explain(name: str, made: Tensor, *inputs: Tensor) -> Reason:
    return forward.explain(facts(name.replace("_", ""), *inputs, out=made))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss.__name__))
def test_a_loss_of_an_empty_batch_is_a_mean_of_nothing(loss: Loss) -> None:
    x = NONE.clone().requires_grad_()
    others = LOSSES[loss]
    made = loss(x, *others)
    assert made.isnan()
    reason = explain(loss.__name__, made.detach(), x.detach(), *others)
    assert "the mean of nothing is 0 / 0; it got f32 [0, 4]" in reason.why
    assert "over" not in reason.why
    assert reason.fix is not None
    assert "reduction='sum' and divide by max(n, 1)" in reason.fix
    mended = loss(x, *others, reduction="sum") / max(len(x), 1)
    assert mended == 0


def test_weights_of_the_classes_are_no_batch() -> None:
    weight = torch.ones(4)
    made = F.binary_cross_entropy_with_logits(NONE, NONE, pos_weight=weight)
    reason = explain("binary_cross_entropy_with_logits", made, NONE, NONE, weight)
    assert "the mean of nothing is 0 / 0" in reason.why


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
@pytest.mark.parametrize("name", ["mean", "nanmean", "median", "nanmedian", "std", "var", "cov"])
def test_other_reductions_of_nothing_are_told_as_such(name: str) -> None:
    made = getattr(torch, name)(NONE.T)
    reason = explain(name, made, NONE.T)
    assert "nothing is" in reason.why
    assert "it got f32 [4, 0]" in reason.why
    assert "skip an empty batch" in (reason.fix or "")
    assert "correction" not in (reason.fix or "")


@pytest.mark.parametrize("mean", [
    lambda x: x.mean(), lambda x: x.mean(0), lambda x: torch.mean(x, dim=0, keepdim=True),
    lambda x: x.mean((0, 1)), lambda x: x.mean(-3), lambda x: x.mean(axis=0),
])  # fmt: skip
def test_the_repair_of_a_mean_of_nothing_has_its_shape(mean: Callable[[Tensor], Tensor]) -> None:
    x = torch.empty(0, 3, 4)

    def program() -> None:
        weight = torch.ones((), requires_grad=True)
        mean(x * weight).sum().backward()

    (found,) = find_live(program, "TT101")
    assert (found.op, found.fix is not None) == ("mean", True)
    mended = eval((found.fix or "").partition(", or skip")[0], {"x": x})
    assert mended.shape == mean(x).shape
    assert (mended == 0).all()


def test_what_is_not_empty_is_no_mean_of_nothing() -> None:
    large = torch.full((2, 4), 1e30)
    assert "over the range" in explain("mse_loss", F.mse_loss(large, -large), large, -large).why
    # The logarithm of a sum of nothing is no mean; a divisor is no batch.
    for name, made in (("logsumexp", NONE.logsumexp(0)), ("div", large / 0)):
        assert "mean of nothing" not in explain(name, made, NONE, large[:0] + 1, large).why


@pytest.mark.parametrize("level", ["module", "op"])
def test_a_batch_without_a_box_is_told(level: str) -> None:
    def program(*, reduction: str = "mean") -> None:
        model = nn.Linear(3, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for step in range(4):
            n = 0 if step == 2 else 5
            boxes = model(torch.randn(5, 3))[:n]
            loss = F.l1_loss(boxes, torch.rand(n, 4), reduction=reduction)
            optimizer.zero_grad()
            (loss if reduction == "mean" else loss / max(n, 1)).backward()
            optimizer.step()

    (found,) = [f for f in find_live(program, level=level) if f.severity != "note"]
    assert (found.code, found.step, found.op) == ("TT101", 2, "l1_loss")
    assert "the mean of nothing is 0 / 0" in found.explanation
    assert "skip an empty batch" in (found.fix or "")
    mended = find_live(lambda: program(reduction="sum"), level=level)
    assert [f for f in mended if f.severity != "note"] == []


@pytest.mark.parametrize("ignored", [-100, 255])
def test_a_repair_of_labels_that_are_all_ignored_ignores_the_same(ignored: int) -> None:
    x, y = torch.randn(3, 4), torch.full((3,), ignored)
    made = F.cross_entropy(x, y, ignore_index=ignored)
    reason = forward.explain(facts("crossentropy", x, y, out=made, ignore_index=ignored))
    assert f"all 3 targets are {ignored}" in reason.why
    assert reason.fix is not None
    scope = {"F": F, "x": x, "y": y}
    exec(reason.fix, scope)
    assert scope["loss"] == 0
