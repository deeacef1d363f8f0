"""Models of transformers and timm with random weights: the same bits traced, nothing found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.neutral import (
    EVERY,
    assert_neutral,
    assert_seen,
    assert_silent,
    descend,
    one_thread,
)

pytestmark = [
    pytest.mark.slow,
    # What these packages warn of while they are imported and built is none of our business.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("torchvision"),
]
WORDS = 40


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def fit(model: nn.Module, **batch: Any) -> list[Any]:
    """Learn one batch by heart, as the examples of transformers train."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return descend(model, lambda i: model(**batch).loss, optimizer)


def tokens(length: int = 8) -> Tensor:
    return torch.randint(4, WORDS, (4, length))


def bert() -> list[Any]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = 0
    model = BertForSequenceClassification(config)
    return fit(model, input_ids=tokens(), attention_mask=mask, labels=torch.tensor([0, 1, 1, 0]))


def gpt2() -> list[Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=16,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ids = tokens()
    return fit(GPT2LMHeadModel(config), input_ids=ids, labels=ids)


def llama() -> list[Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    ids = tokens()
    return fit(LlamaForCausalLM(config), input_ids=ids, labels=ids)


def t5() -> list[Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return fit(T5ForConditionalGeneration(config), input_ids=tokens(), labels=tokens(5))


def vit() -> list[Any]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=2,
    )  # fmt: skip
    labels = torch.tensor([0, 1, 1, 0])
    return fit(
        ViTForImageClassification(config), pixel_values=torch.randn(4, 3, 16, 16), labels=labels
    )


def whisper() -> list[Any]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=WORDS, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=16, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    return fit(model, input_features=torch.randn(4, 8, 32), labels=tokens())


def mixtral() -> list[Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=16, output_router_logits=True,
    )  # fmt: skip
    ids = tokens()
    return fit(MixtralForCausalLM(config), input_ids=ids, labels=ids)


def timm_model(name: str) -> list[Any]:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=4).train()
    height = model.default_cfg["input_size"][-1]
    images, labels = torch.randn(8, 3, height, height), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return descend(model, lambda i: nn.functional.cross_entropy(model(images), labels), optimizer)


def check(program: Callable[[], list[Any]], every: Any) -> None:
    records = assert_neutral(program, every=every)
    assert_seen(records)
    assert_silent(records)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize(
    "program", [bert, gpt2, llama, t5, vit, whisper, mixtral], ids=lambda program: program.__name__
)
def test_a_transformers_model_trains_the_same_traced(
    program: Callable[[], list[Any]], every: Any
) -> None:
    pytest.importorskip("transformers")
    check(program, every)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_timm_model_trains_the_same_traced(name: str, every: Any) -> None:
    pytest.importorskip("timm")
    check(lambda: timm_model(name), every)
