"""A decoder with and without its causal mask: who depends on whom, and padding on either side. Vectors of texts."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from reattend.trunks.decoders import attention_bias, decoder_states, pool_tokens

SHAPE = {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


def decoder(kind="llama", attention="sdpa", seed=0):
    torch.manual_seed(seed)
    config, model = {"llama": (LlamaConfig, LlamaModel), "qwen2": (Qwen2Config, Qwen2Model)}[kind]
    made = model(config(**SHAPE, initializer_range=0.3, attn_implementation=attention))
    return made.double().eval()


KINDS = [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa")]


@pytest.mark.parametrize(("kind", "attention"), KINDS)
def test_the_first_token_reads_the_last_one_without_the_mask_alone(kind, attention):
    model = decoder(kind, attention)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    other = ids.clone()
    other[0, -1] = 9
    mask = torch.ones(1, 5, dtype=torch.bool)
    causal, free = (
        [decoder_states(model, x, mask, causal=c)[0, 0] for x in (ids, other)]
        for c in (True, False)
    )
    assert torch.equal(*causal)
    assert (free[0] - free[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_with_the_mask_it_is_the_model_itself(kind):
    model = decoder(kind)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    mask = torch.ones(1, 7, dtype=torch.bool)
    own = model(ids).last_hidden_state
    torch.testing.assert_close(decoder_states(model, ids, mask, causal=True), own)


@pytest.mark.parametrize(("kind", "attention"), KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, attention, causal, side):
    model = decoder(kind, attention)
    ids = torch.tensor([[3, 1, 4, 1]])
    alone = decoder_states(model, ids, torch.ones(1, 4, dtype=torch.bool), causal=causal)
    padding = torch.tensor([[7, 7, 8]])
    real, fill = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    order = [(padding, fill), (ids, real)] if side == "left" else [(ids, real), (padding, fill)]
    padded_ids, mask = (torch.cat(parts, 1) for parts in zip(*order, strict=True))
    found = decoder_states(model, padded_ids, mask, causal=causal)
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask], alone[0], rtol=0, atol=1e-10)


def test_masks_agree_on_one_token_and_differ_on_two():
    model = decoder()
    for length, agree in ((1, True), (2, False)):
        ids, mask = torch.tensor([[5, 6]])[:, :length], torch.ones(1, length, dtype=torch.bool)
        both = [decoder_states(model, ids, mask, causal=c) for c in (True, False)]
        assert torch.allclose(*both, atol=1e-12) == agree


def test_the_bias_by_hand():
    mask = torch.tensor([[False, True, True]])
    least = torch.finfo(torch.float32).min
    free = attention_bias(mask, causal=False)[0, 0]
    causal = attention_bias(mask, causal=True)[0, 0]
    assert free.tolist() == [[0, 0, 0], [least, 0, 0], [least, 0, 0]]
    assert causal.tolist() == [[0, least, least], [least, 0, least], [least, 0, 0]]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("poison", [1e9, -1e9, float("inf")])
def test_pooling_reads_real_tokens_alone(poison, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    lengths = [5, 1, 3, 4]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = states.masked_fill(~mask[..., None], poison)
    rows = [s[:n] for s, n in zip(states, lengths, strict=True)]
    expected = {
        "max": torch.stack([row.amax(0) for row in rows]),
        "mean": torch.stack([row.mean(0) for row in rows]),
        "last": torch.stack([row[-1] for row in rows]),
    }
    for how, wanted in expected.items():
        if how == "mean" and math.isinf(poison):
            continue  # 0 times infinity: real encoders give finite states for padding
        torch.testing.assert_close(pool_tokens(padded, mask, how), wanted, rtol=1e-9, atol=1e-6)


def test_pooling_a_maximum_of_negative_states_is_not_zero():
    states = torch.tensor([[[-3.0], [-1.0], [0.0]]])
    assert pool_tokens(states, torch.tensor([[True, True, False]]), "max").item() == -1.0


def test_pooling_skips_tokens_that_are_masked_in_front_and_behind():
    states = torch.arange(5.0)[None, :, None]
    mask = torch.tensor([[False, True, False, True, False]])
    pooled = [pool_tokens(states, mask, how).item() for how in ("max", "mean", "last")]
    assert pooled == [3.0, 2.0, 3.0]


def test_pooling_refuses():
    with pytest.raises(ValueError, match="without any real token"):
        pool_tokens(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool), "max")
    with pytest.raises(ValueError, match="max, mean, last"):
        pool_tokens(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), "first")
