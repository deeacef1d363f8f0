from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tensortrace.capture.copied import copied

TOKENS = torch.tensor([[1, 2, 3], [3, 0, 2]])


@pytest.fixture
def table():
    return torch.randn(4, 4, requires_grad=True)


def loss_of(hidden, targets=TOKENS):
    return F.cross_entropy(hidden.reshape(-1, 4), targets.reshape(-1))


def numbers(loss):
    return {name: value.item() for name, value in copied(loss).items()}


pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"),
    reason="this torch does not tell what unpacks a saved tensor",
)


def test_targets_are_compared_with_what_was_embedded(table):
    assert numbers(loss_of(F.embedding(TOKENS, table))) == {"copied": 1}
    assert numbers(loss_of(F.embedding(TOKENS, table), TOKENS.flip(1))) == {"copied": 0}
    assert numbers(loss_of(F.embedding(TOKENS, table), TOKENS.where(TOKENS > 1, -100))) == {
        "copied": 0
    }


def test_one_of_several_embeddings_is_enough(table):
    places = F.embedding(torch.arange(3).expand(2, 3), table)
    assert numbers(loss_of(places + F.embedding(TOKENS, table))) == {"copied": 1}
    assert numbers(loss_of(places)) == {"copied": 0}


@pytest.mark.parametrize(
    "shift", [lambda x: x.roll(1, 1), lambda x: F.pad(x, (0, 0, 1, -1)), lambda x: x.flip(1)]
)
def test_no_path_leads_through_what_shifts(table, shift):
    assert copied(loss_of(shift(F.embedding(TOKENS, table)))) == {}


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        (torch.ones(3, 3).triu(1).bool(), 1),
        (torch.ones(2, 1, 3, 3).triu(1).bool(), 1),
        # Nor what is far behind, as in local attention.
        (torch.ones(3, 3).triu(1).bool() | torch.ones(3, 3).tril(-2).bool(), 1),
        (torch.ones(3, 3).tril(-1).bool(), 0),
        (torch.ones(3, 3).triu().bool(), 0),
        (torch.zeros(3, 3).bool(), 0),
    ],
)
def test_softmax_of_scores_tells_whether_they_are_causal(table, hidden, expected):
    x = F.embedding(TOKENS, table)
    scores = (x @ x.mT).masked_fill(hidden, -1e9).reshape(-1, 3, 3)[:2]
    assert numbers(loss_of(x + scores.softmax(-1) @ x)) == {"copied": 1, "causal": expected}


def test_softmax_of_another_shape_is_of_something_else(table):
    x = F.embedding(TOKENS, table)
    assert numbers(loss_of(x + x.softmax(-1))) == {"copied": 1}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"is_causal": True}, 1),
        ({"attn_mask": torch.ones(3, 3).tril().bool()}, 1),
        ({"attn_mask": torch.full((3, 3), -torch.inf).triu(1)}, 1),
        ({"attn_mask": torch.eye(3)}, 0),
    ],
)
def test_attention_of_torch_tells_however_it_is_computed(table, options, expected, drop):
    x = F.embedding(TOKENS, table).unsqueeze(1)
    attended = F.scaled_dot_product_attention(x, x, x, dropout_p=drop, **options)
    assert numbers(loss_of(x + attended)) == {"copied": 1, "causal": expected}


def test_what_a_hook_unpacks_is_left_alone(table):
    def unpack(saved):
        raise AssertionError("it was unpacked")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        hidden = F.embedding(TOKENS, table)
    assert copied(loss_of(hidden)) == {}
    hidden = F.embedding(TOKENS, table)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = loss_of(hidden)
    assert copied(loss) == {}


def test_graph_that_is_gone_and_other_losses(table):
    loss = loss_of(F.embedding(TOKENS, table))
    loss.backward()
    assert copied(loss) == {}
    assert copied(table.square().mean()) == {}
    assert copied(torch.zeros(())) == {}
