"""Programs with whole networks: recurrent, attention, checkpointed, trained, from transformers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.programs import backward, batch, grads, linear, program, relu_net, scalar_net


@program()
def lstm_packed():
    lstm = nn.LSTM(3, 4, 2, bidirectional=True)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    output, (h, c) = lstm(packed)
    output.data.sum().backward()
    return [output.data, h, c, *grads(lstm)]


@program()
def gru_cell_loop():
    cell = nn.GRUCell(3, 4)
    h = torch.zeros(2, 4)
    for _ in range(5):
        h = cell(torch.randn(2, 3), h)
    return backward(h, cell)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


@program()
def mha_eval_fastpath():
    model = encoder(dropout=0.0).eval()
    with torch.no_grad():
        return [model(torch.randn(2, 5, 8))]


@program()
def transformer_train():
    model = encoder()
    return backward(model(torch.randn(2, 5, 8)), model)


def checkpointed(use_reentrant):
    blocks = nn.ModuleList(nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh()) for _ in range(3))
    x = y = batch().requires_grad_()
    for block in blocks:
        y = checkpoint(block, y, use_reentrant=use_reentrant)
    return [*backward(y, blocks), x.grad]


@program()
def checkpoint_reentrant():
    return checkpointed(use_reentrant=True)


@program()
def checkpoint_nonreentrant():
    return checkpointed(use_reentrant=False)


@program()
def ckpt_selective():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context, op, *args, **kwargs):
        save = op == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    model = nn.Sequential(linear(), nn.Tanh(), linear())
    x = batch().requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    return [*backward(y, model), x.grad]


@program()
def no_grad_inference():
    model = scalar_net()
    with torch.no_grad():
        first = model(batch())
    with torch.inference_mode():
        second = model(batch())
    return [first, second]


@program()
def autocast_bf16():
    model = nn.Sequential(linear(), nn.LayerNorm(4), nn.Tanh(), linear())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch())
        loss = y.float().sum()
    loss.backward()
    return [y, *grads(model)]


@program()
def gradscaler_cpu():
    model = scalar_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch()).float().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@program()
def optimizer_train():
    model = nn.Sequential(
        linear(), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(4, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        loss = F.cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()] + list(model.buffers())


@program()
def default_device_ctx():
    with torch.device("cpu"):
        model = relu_net()
        return backward(model(batch()), model)


@program(package="transformers")
def hf_bert():
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=50,
        )
    )
    out = model(input_ids=torch.randint(50, (2, 7)))
    out.last_hidden_state.sum().backward()
    return [out.last_hidden_state, out.pooler_output, *grads(model)]


@program(package="transformers")
def hf_gpt2_generate():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=50,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    prompt = torch.randint(2, 50, (1, 5))
    return [model.generate(prompt, max_new_tokens=5, do_sample=True, pad_token_id=1)]
