"""Decoding runs, selective V in one pass against token by token, and maps."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.decoding import decode, read_prompt
from reattend.attention.dense import dense_attention
from reattend.language_modeling.sigma import DiffQKVAttention, SelectiveV
from reattend.studies.recycled import follow
from reattend.studies.sigma import (
    ORDERS,
    SelectiveChunk,
    Way,
    decoded_nats,
    decoding_runs,
    layer_maps,
)
from reattend.trunks.language import Trunk
from reattend.trunks.mixers import TokenShift


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    return torch.randint(31, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", [SelectiveV(keep=5), SelectiveV(keep=0.3, renormalise=False)])
def test_one_pass_is_decoding_token_by_token(model, text, method):
    prompt, given = read_prompt(model, text[:, :17]), text[:, 17:]
    at_once = follow(model, SelectiveChunk(method), prompt, given).nll
    stepwise = decode(model, prompt, method, given=given).log_likelihood
    torch.testing.assert_close(at_once, -stepwise.cpu(), rtol=0, atol=1e-4)
    dense = follow(model, SelectiveChunk(SelectiveV(keep=1.0)), prompt, given).nll
    assert (dense - at_once).abs().max() > 1e-2


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_reads_the_future_or_too_much(order):
    """Values are unit vectors, so that the output says which were read."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 12, 8)
    v = torch.eye(12).expand(1, 2, -1, -1)
    chunk = SelectiveChunk(SelectiveV(keep=0.5, renormalise=False), order)
    read = chunk.prefill(q, k, v, scale=0.5, layer=0)
    _, weights = dense_attention(q, k, v, scale=0.5, causal=True, return_weights=True)
    for i, seen in enumerate(range(8, 13)):
        chosen = read[0, :, i] > 0
        assert (chosen.sum(-1) == round(seen / 2)).all()
        assert not chosen[:, seen:].any()
        torch.testing.assert_close(read[0, :, i], weights[0, :, i] * chosen)
        if order == "latest":
            assert chosen[:, seen - round(seen / 2) : seen].all()
        if order == "largest":
            kept = read[0, :, i].sum(-1)
            torch.testing.assert_close(kept, weights[0, :, i].topk(round(seen / 2)).values.sum(-1))
    renormalised = SelectiveChunk(SelectiveV(keep=0.5), order)
    if order != "random":
        again = renormalised.prefill(q, k, v, scale=0.5, layer=0)
        torch.testing.assert_close(again, read / read.sum(-1, keepdim=True))
        assert renormalised.mass == pytest.approx(chunk.mass)
    assert chunk.mass == [pytest.approx(read.sum(-1).mean().item())]


def test_nats_of_every_way(model, text):
    everything, few = Way(1.0), Way(0.1)
    found = decoded_nats(model, text[0], 17, [everything, few, Way(0.1, "random")])
    assert found[everything][0] == pytest.approx(found[None][0], abs=1e-5)
    assert found[everything][1] == pytest.approx(1.0)
    assert abs(found[few][0] - found[None][0]) > 1e-3
    assert found[Way(0.1, "random")][1] < found[few][1] < 1
    logits = model(text).logits[0, :-1].log_softmax(-1)
    own = -logits.gather(-1, text[0, 1:, None])[17:].mean().item()  # tokens 18 to 39
    assert found[None][0] == pytest.approx(own, abs=1e-4)


def test_all_forms_of_decoding_do_what_they_say():
    runs = decoding_runs(50, (8, 2, 4), 6, 20)
    outputs = {name: run() for name, run in runs.items()}
    assert all(out.shape == (1, 8, 1, 6) for out in outputs.values())
    torch.testing.assert_close(outputs["K replicated"], outputs["DiffQKV"])
    for name in ("grouped", "DiffQKV + AugQ"):
        assert not torch.allclose(outputs[name], outputs["DiffQKV"])


def test_maps_are_those_of_the_layer():
    torch.manual_seed(0)
    layer = lambda width: TokenShift(DiffQKVAttention(width, 2), width, learned=False)  # noqa: E731
    trunk = Trunk(11, 16, [layer, layer]).eval()
    tokens = torch.randint(11, (2, 9))
    first = layer_maps(trunk, tokens, 0)
    assert first.shape == (2, 2, 9, 9)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 2, 9))
    assert not first.triu(1).any()
    block = trunk.blocks[0]
    read = []
    block.mixer.mixer.query.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    trunk(tokens)
    torch.testing.assert_close(first, block.mixer.mixer.weights(read[0]))
    assert not torch.allclose(layer_maps(trunk, tokens, 1), first)
