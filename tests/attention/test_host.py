"""Methods inside a Hugging Face model: exactness, padding, caches, clean-up and refusals."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicCache, StaticCache

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod

pytestmark = pytest.mark.filterwarnings("ignore:.*left nothing out")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
EVERYTHING = {"k": 1000, "block_size": 16}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Large initial weights make attention matter, so that a wrong mask changes the logits visibly.
    return LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, 111), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("method", ["dense", "block_topk"])
def test_full_selection_equals_the_model_alone(model, tokens, method):
    expected = model(tokens).logits
    with attach(model, method, **(EVERYTHING if method == "block_topk" else {})) as attached:
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert attached.density() == 1.0
    assert attached.densities().shape == (2, 9)


def test_a_sparse_selection_changes_the_logits(model, tokens):
    expected = model(tokens).logits
    with attach(model, "streaming_llm", sink=16, window=16, block_size=16) as method:
        assert (model(tokens).logits - expected).abs().max() > 0.01
    assert method.density() == pytest.approx(13 / 28)  # 7 diagonal and 6 further sink blocks of 28


def test_greedy_decoding_of_32_tokens(model, tokens):
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    with attach(model, BlockTopK(**EVERYTHING)) as method:
        ours = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    assert torch.equal(ours, expected)
    assert method.density("decode") == 1.0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_the_model_alone(model, tokens, side):
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 30) if side == "left" else slice(81, 111)] = 0
    expected = model(tokens, attention_mask=mask).logits
    with attach(model, "block_topk", **EVERYTHING):
        ours = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_greedy_decoding_with_left_padding(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(tokens, **settings)
    with attach(model, "block_topk", **EVERYTHING):
        assert torch.equal(model.generate(tokens, **settings), expected)


def test_a_padded_sequence_is_sparse_as_it_is_alone(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with attach(model, "block_topk", k=3, block_size=16) as padded:
        ours = model(tokens, attention_mask=mask, position_ids=positions).logits
    with attach(model, "block_topk", k=3, block_size=16) as alone:
        expected = [model(tokens[:1, 30:]).logits[0], model(tokens[1:]).logits[0]]
    torch.testing.assert_close(ours[0, 30:], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.densities(), alone.densities())


@pytest.mark.parametrize("chunks", [(64, 47), (50, 33, 28), (110, 1)])
def test_chunked_prefill_equals_the_model_alone(model, tokens, chunks):
    expected = model(tokens).logits
    cache, outputs = DynamicCache(config=model.config), []
    with attach(model, "block_topk", **EVERYTHING) as method:
        for chunk in tokens.split(chunks, dim=1):
            outputs.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert method.density() == 1.0


def test_chunks_of_whole_blocks_are_sparse_like_one_prefill(model, tokens):
    settings = {"sink": 16, "window": 32, "block_size": 16}
    cache, outputs = DynamicCache(config=model.config), []
    with attach(model, "streaming_llm", **settings):
        expected = model(tokens).logits
        for chunk in tokens.split((48, 63), dim=1):
            outputs.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_gradients_flow_through_an_attached_model(model, tokens):
    with torch.enable_grad(), attach(model, "block_topk", k=2, block_size=16):
        model(tokens).logits.square().mean().backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    model.zero_grad()


def test_the_model_is_restored_also_after_an_exception(model, tokens):
    before = model.config._attn_implementation
    expected = model(tokens).logits
    with pytest.raises(IndexError), attach(model, "streaming_llm", window=16, block_size=16):
        model(tokens + 1000)  # tokens beyond the vocabulary
    assert model.config._attn_implementation == before
    assert torch.equal(model(tokens).logits, expected)
    left = [n for i in (AttentionInterface, AttentionMaskInterface) for n in i._global_mapping]
    assert not [name for name in left if name.startswith("reattend")]


def test_the_inner_attachment_counts_when_nested(model, tokens):
    with attach(model, StreamingLLM(window=16, block_size=16)) as outer:
        with attach(model, AttentionMethod()) as inner:
            model(tokens)
        with pytest.raises(ValueError, match="no prefill"):
            outer.density()
        assert inner.density() == 1.0
        model(tokens)
    assert outer.density() < 1


def test_two_models_can_be_attached_at_once(model, tokens):
    torch.manual_seed(5)
    other = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with (
        attach(model, "dense") as first,
        attach(other, "streaming_llm", window=16, block_size=16) as second,
    ):
        model(tokens)
        other(tokens)
    assert first.density() == 1.0
    assert second.density() < 1


def test_without_a_model_the_method_is_only_built():
    with attach(None, "block_topk", k=3) as method:
        assert isinstance(method, BlockTopK)
        assert method.k == 3


def test_sliding_window_layers_keep_the_models_own_attention(tokens):
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Qwen2Config(
        **SHAPE,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=0,
        layer_types=kinds,
    )
    model = Qwen2ForCausalLM(config).eval()
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    expected = model(tokens, attention_mask=mask).logits
    with attach(model, "block_topk", **EVERYTHING) as method:
        ours = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert method.densities().shape == (1, 9)


def test_a_sliding_window_in_every_layer_is_refused(tokens):
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=20)).eval()
    with (
        attach(model, "block_topk", k=2, block_size=16),
        pytest.raises(NotImplementedError, match=r"every layer .* sliding window \(20 tokens\)"),
    ):
        model(tokens)


def test_wrong_methods_and_settings_are_refused(model):
    cases = [
        (ValueError, "unknown attention method 'nope'; known: ", ("nope",), {}),
        (TypeError, "block_topk has no setting kk; it has: k, sink", ("block_topk",), {"kk": 3}),
        (ValueError, "k must be an integer of at least 1, got 0", ("block_topk",), {"k": 0}),
        (TypeError, "not with a method built already", (BlockTopK(k=3),), {"k": 4}),
    ]
    for error, message, method, settings in cases:
        with pytest.raises(error, match=message), attach(model, *method, **settings):
            pass
    with (
        pytest.raises(ValueError, match="needs a transformers model"),
        attach(torch.nn.Linear(2, 2), "dense"),
    ):
        pass


def test_what_no_method_can_honour_is_refused(model, tokens):
    packed = torch.cat([torch.arange(50), torch.arange(61)])[None].expand(2, -1)
    custom = torch.ones(2, 1, 111, 111, dtype=torch.bool).tril()
    static = StaticCache(config=model.config, max_cache_len=200)
    cases = [
        ("packed sequences", {"position_ids": packed, "use_cache": False}),
        ("custom masks", {"attention_mask": custom}),
        ("static cache", {"past_key_values": static}),
        ("output_attentions", {"output_attentions": True}),
    ]
    with attach(model, "dense"):
        for message, settings in cases:
            with pytest.raises(NotImplementedError, match=message):
                model(tokens, **settings)


def test_attention_dropout_is_refused(tokens):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1)).train()
    with attach(model, "dense"), pytest.raises(NotImplementedError, match="dropout"):
        model(tokens)
