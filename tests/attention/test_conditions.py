"""What people do with attached models: beams, rejected tokens, several caches, copies, half precision.

The rule: the same as the method gives each sequence alone, or one error that says what happened.
"""

import copy
import pickle
import warnings
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicCache

from reattend.attention.baselines.quest import Pages, Quest
from reattend.attention.host import _OPEN, attach
from reattend.attention.kv_selection import Combined, join_rows, matching_rows
from reattend.attention.registry import build_method
from reattend.long_context.act import ACT
from reattend.long_context.moa import Plan, Rule
from reattend.long_context.recycled_attention import RecycledAttention
from reattend.long_context.seer_attention import AttentionGates

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*left nothing out", "ignore:.gradient_checkpointing_enable. is deprecated"
)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
SNAP = {"capacity": 8, "window": 4, "kernel": 3, "recent": 2, "sink": 1}
SPANS = (Rule(4, 0.25), Rule(-4, 0.5), Rule(8, 0.0))
METHODS = {
    "moa": {"plan": Plan((SPANS, SPANS[::-1]), block_size=4), "length": 30},
    "quest": {"budget": 8, "page": 2},
    "snapkv": SNAP,
    "ada_snapkv": SNAP,
    "h2o": {"budget": 8},
    "recycled_attention": {"budget": 8, "stride": 4},
    "hip_decoding": {"k": 8, "window": 4, "sink": 2, "dense_layers": 0, "refresh": 3},
    "streaming_cache": {"budget": 8},
    "oracle_cache": {"budget": 8},
}
GREEDY = {"do_sample": False, "pad_token_id": 0}
EVERY = pytest.mark.parametrize("name", METHODS)


def llama(**other):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | other))).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tokens(rows, length, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model, prompt, **call):
    """A cache that holds the prompt."""
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache, use_cache=True, **call)
    return cache


def step(model, token, cache, **call):
    return model(token, past_key_values=cache, use_cache=True, **call).logits[:, -1]


def alone(model, name, prompt, continuation, **settings):
    """Logits behind the last token of a continuation that is read token by token."""
    with attach(model, name, **(settings or METHODS[name])):
        cache = read(model, prompt)
        for token in continuation.split(1, dim=1):
            logits = step(model, token, cache)
    return logits


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


# One state for each cache


@EVERY
def test_the_score_of_a_beam_is_that_of_its_sequence_alone(model, name):
    prompt = tokens(2, 30)
    prompt[0, :9] = 0
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    with attach(model, name, **METHODS[name]):
        result = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=12,
            num_beams=3,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    for row, start in ((0, 9), (1, 0)):
        score = 0.0
        with attach(model, name, **METHODS[name]):
            cache = DynamicCache(config=model.config)
            logits = step(model, prompt[row : row + 1, start:], cache)
            for token in result.sequences[row, 30:]:
                score += logits.log_softmax(-1)[0, token].item()
                logits = step(model, token.view(1, 1), cache)
        assert result.sequences_scores[row].item() == pytest.approx(score, abs=2e-3)


@EVERY
def test_prompts_read_in_turn_and_conversations_that_go_on(model, name):
    first, second, more = tokens(1, 30, 1), tokens(1, 41, 2), tokens(1, 12, 3)
    with attach(model, name, **METHODS[name]):
        one, other = read(model, first), read(model, second)
        for token in more.split(1, dim=1):
            of_first, of_second = step(model, token, one), step(model, token, other)
    close(of_first, alone(model, name, first, more))
    close(of_second, alone(model, name, second, more))


@EVERY
def test_rows_of_a_cache_may_be_reordered_repeated_and_left_out(model, name):
    prompt, more, last = tokens(3, 30), tokens(3, 7, 2), tokens(4, 3, 3)
    order = torch.tensor([2, 0, 0, 2])
    with attach(model, name, **METHODS[name]):
        cache = read(model, prompt)
        for token in more.split(1, dim=1):
            step(model, token, cache)
        cache.reorder_cache(order)
        for token in last.split(1, dim=1):
            logits = step(model, token, cache)
    for row, source in enumerate(order.tolist()):
        continuation = torch.cat([more[source], last[row]])[None]
        close(logits[row : row + 1], alone(model, name, prompt[[source]], continuation))


@EVERY
def test_padding_that_leaves_with_its_row(model, name):
    prompt, more = tokens(2, 30), tokens(2, 9, 2)
    mask = torch.ones(2, 39, dtype=torch.long)
    mask[0, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with attach(model, name, **METHODS[name]):
        cache = read(model, prompt, attention_mask=mask[:, :30], position_ids=positions[:, :30])
        for n in range(5):
            padded = {
                "attention_mask": mask[:, : 31 + n],
                "position_ids": positions[:, 30 + n : 31 + n],
            }
            step(model, more[:, n : n + 1], cache, **padded)
        cache.batch_select_indices(torch.tensor([1]))
        for n in range(5, 9):
            logits = step(model, more[1:, n : n + 1], cache)
    close(logits, alone(model, name, prompt[1:], more[1:]))


@EVERY
def test_a_copied_cache_answers_another_question(model, name):
    """Several questions on one prompt that was read once, also token by token."""
    prompt = tokens(1, 30)
    with attach(model, name, **METHODS[name]):
        cache = read(model, prompt)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        answers = []
        for seed, own in zip((2, 3), copies, strict=True):
            for token in tokens(1, 6, seed).split(1, dim=1):
                logits = step(model, token, own)
            answers.append(logits)
    for seed, answer in zip((2, 3), answers, strict=True):
        close(answer, alone(model, name, prompt, tokens(1, 6, seed)))


@EVERY
def test_the_latest_tokens_of_a_prompt_may_be_rejected(model, name):
    """Assisted decoding reads candidates with the prompt and takes some of them back."""
    prompt, wrong, more = tokens(1, 30), tokens(1, 5, 4), tokens(1, 6, 2)
    with attach(model, name, **METHODS[name]):
        cache = read(model, torch.cat([prompt, wrong], dim=1))
        cache.crop(-5)
        for token in more.split(1, dim=1):
            logits = step(model, token, cache)
    close(logits, alone(model, name, prompt, more))


@EVERY
def test_decoded_tokens_that_are_cut_off_are_forgotten_or_refused(model, name):
    prompt, wrong, more = tokens(1, 30), tokens(1, 5, 4), tokens(1, 6, 2)
    with attach(model, name, **METHODS[name]):
        cache = read(model, prompt)
        for token in wrong.split(1, dim=1):
            step(model, token, cache)
        cache.crop(-5)
        if name in ("h2o", "recycled_attention", "hip_decoding"):
            with pytest.raises(ValueError, match=r"cut back to 30 entries.*read the prompt again"):
                step(model, more[:, :1], cache)
            return
        for token in more.split(1, dim=1):
            logits = step(model, token, cache)
    close(logits, alone(model, name, prompt, more))


@EVERY
def test_entries_that_the_method_did_not_see_are_refused(model, name):
    prompt = tokens(1, 30)
    method = build_method(name, **METHODS[name])
    with attach(model, method):
        cache = read(model, prompt)
    step(model, prompt[:, :1], cache)
    with attach(model, method), pytest.raises(ValueError, match="added without it"):
        step(model, prompt[:, :1], cache)


@EVERY
def test_what_is_remembered_goes_with_its_cache(model, name):
    with attach(model, name, **METHODS[name]) as method:
        cache = read(model, tokens(1, 30))
        assert len(method._memories) == 1
        del cache
        model(tokens(1, 30))  # a cache that nobody keeps
        assert len(method._memories) == 0


def test_an_undisturbed_cache_is_recognised_without_reading_it(model, monkeypatch):
    def compared(*_):
        raise AssertionError("keys were compared")

    monkeypatch.setattr("reattend.attention.kv_selection.matching_rows", compared)
    with attach(model, "quest", **METHODS["quest"]):
        prompt = tokens(2, 30)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, **GREEDY)


def test_assisted_decoding_sees_the_bounds_of_the_real_cache(model):
    class Fresh(Quest):
        def choose(self, query, key, state, *, scale):
            return super().choose(query, key, Pages.of(key, self.page), scale=scale)

    for seed in range(3):
        prompt = tokens(1, 30, seed)
        generated = []
        for method in (Quest(budget=8, page=2), Fresh(budget=8, page=2)):
            with attach(model, method):
                generated.append(
                    model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        prompt_lookup_num_tokens=3,
                        max_new_tokens=20,
                        **GREEDY,
                    )
                )
        assert torch.equal(*generated)


def test_matching_rows_and_joining_states():
    known = torch.randn(3, 2, 5, 4)
    assert matching_rows(known[[2, 0], :, :4], known) == [2, 0]
    assert matching_rows(known, known) == [0, 1, 2]
    other = known.clone()
    other[1, 1, 2, 3] += 1  # not the last entry
    assert matching_rows(other, known) is None
    assert matching_rows(torch.randn(3, 2, 6, 4), known) is None
    pages = [Pages.of(row, 2) for row in known.split(1)]
    assert torch.equal(join_rows(pages).largest, Pages.of(known, 2).largest)
    for wrong in ([3, 4], [torch.zeros(1, 2), torch.zeros(1, 3)], [None, torch.zeros(1)]):
        with pytest.raises(ValueError, match="read their prompts together"):
            join_rows(wrong)


# Other models


def test_a_model_of_the_same_configuration_is_left_alone():
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    a, b = (LlamaForCausalLM(config).eval() for _ in range(2))
    prompt = tokens(2, 60)
    before = b(prompt).logits
    with attach(a, "streaming_llm", sink=16, window=16, block_size=16) as method:
        assert torch.equal(b(prompt).logits, before)
        assert not method.has_recorded("prefill")
        assert config._attn_implementation == "sdpa"
        a.config.use_cache = False  # a change of settings is the model's own
    assert a.config is config
    assert config.use_cache is False


def test_a_copy_made_inside_the_block_is_a_plain_model(model):
    prompt = tokens(2, 60)
    before = model(prompt).logits
    with attach(model, "streaming_llm", sink=16, window=16, block_size=16) as method:
        other = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model.config))
        assert torch.equal(other(prompt).logits, before)
        assert not method.has_recorded("prefill")
    assert torch.equal(other(prompt).logits, before)
    assert torch.equal(model(prompt).logits, before)
    assert type(other.config) is type(again) is LlamaConfig
    assert other.config is other.model.layers[0].self_attn.config


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_attachments_close_in_any_order(model, order):
    prompt = tokens(1, 60)
    before = model(prompt).logits
    methods = [build_method("streaming_llm", window=16, block_size=16) for _ in range(3)]
    blocks = [attach(*pair) for pair in zip((model, model.model, model), methods, strict=True)]
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        stack.pop_all()
    open_ones = list(range(3))
    for number in order:
        blocks[number].__exit__(None, None, None)
        open_ones.remove(number)
        for method in methods:
            method.clear()
        model(prompt)
        last = open_ones[-1] if open_ones else None
        assert [method.has_recorded("prefill") for method in methods] == [
            number == last for number in range(3)
        ]
    assert torch.equal(model(prompt).logits, before)
    assert type(model.config) is LlamaConfig
    assert not len(_OPEN)
    assert not any(m._forward_pre_hooks for m in model.modules())


# Rows, lengths


@EVERY
def test_a_row_that_is_all_padding(model, name):
    prompt = tokens(2, 30)
    mask = torch.ones_like(prompt)
    mask[0] = 0
    call = {"max_new_tokens": 8, **GREEDY}
    with attach(model, name, **METHODS[name]):
        ours = model.generate(prompt, attention_mask=mask, **call)
        expected = model.generate(prompt[1:], attention_mask=mask[1:], **call)
    assert torch.equal(ours[1:], expected)


@EVERY
@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_of_one_token(model, name, length):
    prompt = tokens(2, length)
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, **GREEDY}
    own = model.generate(prompt, **call)
    with attach(model, name, **METHODS[name]):  # up to eight entries all of them are read
        assert torch.equal(model.generate(prompt, **call), own)


def test_a_batch_of_very_different_lengths(model):
    prompt = tokens(3, 90)
    mask = torch.ones_like(prompt)
    mask[0, :89], mask[1, :61] = 0, 0
    settings = {"k": 2, "block_size": 8}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with attach(model, "block_topk", **settings):
        ours = model(prompt, attention_mask=mask, position_ids=positions).logits
        for row, start in enumerate((89, 61, 0)):
            close(ours[row, start:], model(prompt[row : row + 1, start:]).logits[0])


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", *METHODS])
def test_scores_beyond_the_largest_half(name, dtype):
    """Raw scores of 75,000, scaled ones of 9,400: the softmax is sharp, not NaN."""
    shape = {"generator": torch.Generator().manual_seed(0)}
    key, value = (torch.randn(1, 1, 48, 64, **shape).to(dtype) for _ in range(2))
    query = torch.zeros(1, 2, 1, 64, dtype=dtype)
    query[..., 0] = 300
    key[..., 0] = 250 + torch.arange(48).to(dtype) / 8
    full = {"capacity": 100, "window": 4, "recent": 2} if "snap" in name else {"budget": 100}
    full = {"k": 100, "dense_layers": 0} if name == "hip_decoding" else full
    full = {"plan": Plan(((Rule(0, 1.0),),))} if name == "moa" else full
    method = build_method(name, **({} if name == "dense" else full))
    method.begin_decoding(query, key[:, :, :47], scale=1 / 8, layer=0)
    ours = method.decode(query, key, value, scale=1 / 8, layer=0)
    assert ours.dtype == dtype
    wide = (x.float() for x in (query, key, value))
    expected = F.scaled_dot_product_attention(*wide, scale=1 / 8, enable_gqa=True)
    torch.testing.assert_close(ours.float(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EVERY
def test_the_choice_in_half_precision_is_that_of_float32(name, dtype):
    """The same numbers, chosen among in float32: no sum stops growing, no tie is made."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 700, 16, generator=generator).to(dtype) for heads in (4, 2, 2)
    )
    settings = {"plan": Plan((SPANS[:2],))} if name == "moa" else METHODS[name]
    states = []
    for kind in (dtype, torch.float32):
        method = build_method(name, **settings)
        method.begin_decoding(query.to(kind), key[:, :, :690].to(kind), scale=0.25, layer=0)
        for n in range(690, 699):
            part = (x.to(kind) for x in (query[:, :, [n]], key[:, :, : n + 1]))
            method.decode(*part, value[:, :, : n + 1].to(kind), scale=0.25, layer=0)
        last = query[:, :, [699]].to(kind), key.to(kind)
        states.append(method.choose(*last, method.states(0)[0], scale=0.25))
    assert torch.equal(*states)


def test_received_attention_in_bfloat16_keeps_growing():
    """A sink that 4,000 queries attend to: bfloat16 sums would stop at 256."""
    query = torch.zeros(1, 1, 4000, 8, dtype=torch.bfloat16)
    key = torch.zeros(1, 1, 4000, 8, dtype=torch.bfloat16)
    query[..., 0], key[:, :, 0, 0] = 8, 8
    state = build_method("h2o", budget=4).begin(query, key, scale=1.0)
    assert state.received[0, 0, 0].item() == pytest.approx(4000, rel=1e-3)


# Budgets


@pytest.mark.parametrize(
    ("name", "share", "number", "keys"),
    [
        ("snapkv", {**SNAP, "capacity": 0.25}, {**SNAP, "capacity": 15}, 60),
        ("ada_snapkv", {**SNAP, "capacity": 0.25}, {**SNAP, "capacity": 15}, 60),
        ("h2o", {"budget": 0.25}, {"budget": 15}, 60),
        ("recycled_attention", {"budget": 0.25, "stride": 4}, {"budget": 15, "stride": 4}, 60),
        ("streaming_cache", {"budget": 0.25}, {"budget": 15}, 60),
        ("block_topk", {"k": 0.5, "block_size": 4}, {"k": 8, "block_size": 4}, 64),
        ("oracle_topk", {"k": 0.5, "block_size": 4}, {"k": 8, "block_size": 4}, 64),
        (
            "vertical_slash",
            {"verticals": 0.5, "slashes": 0.25, "block_size": 4},
            {"verticals": 8, "slashes": 4, "block_size": 4},
            64,
        ),
        (
            "streaming_llm",
            {"sink": 4, "window": 0.25, "block_size": 4},
            {"sink": 4, "window": 16, "block_size": 4},
            64,
        ),
        (
            "vertical_slash_tokens",
            {"lines": 0.5, "local": 4, "last_queries": 8},
            {"lines": 32, "local": 4, "last_queries": 8},
            64,
        ),
    ],
)
def test_a_budget_as_a_share_of_the_prompt(model, name, share, number, keys):
    prompt, more = tokens(1, keys), tokens(1, 6, 2)
    close(alone(model, name, prompt, more, **share), alone(model, name, prompt, more, **number))
    with attach(model, "dense"):
        cache = read(model, prompt)
        for token in more.split(1, dim=1):
            dense = step(model, token, cache)
    assert (dense - alone(model, name, prompt, more, **share)).abs().max() > 0.01


def test_shares_of_the_cache_as_it_stands():
    method = build_method("quest", budget=0.25, page=2)
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 41, 8)
    chosen = method.choose(query, key, method.begin(query, key, scale=1.0), scale=1.0)
    assert chosen.sum() == 10 + 1  # a quarter of 41 in whole pages, and the current page
    chosen = build_method("oracle_cache", budget=0.25).choose(query, key, None, scale=1.0)
    assert chosen.sum() == 10


@pytest.mark.parametrize("wrong", [0.0, 1.5, -0.1, float("nan")])
def test_wrong_shares(wrong):
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\] as a share, or be an int"):
        build_method("h2o", budget=wrong)


def test_prompt_and_new_tokens_by_different_methods_with_beams(model):
    prompt = tokens(1, 64)
    both = Combined(
        build_method("block_topk", k=3, block_size=8), build_method("quest", **METHODS["quest"])
    )
    with attach(model, both):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=2, max_new_tokens=5, **GREEDY
        )
    assert both.density("prefill") < 0.8
    assert both.density("decode") < 0.5


# Refusals and warnings


def test_returned_weights_are_refused_from_the_configuration_too():
    model = llama(attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(NotImplementedError, match="output_attentions"), attach(model, "dense"):
        pass
    model.config.output_attentions = False
    with attach(model, "dense"), pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_soft_capped_scores_are_refused_in_every_kind_of_layer():
    torch.manual_seed(0)
    shape = {k: v for k, v in SHAPE.items() if k != "hidden_size"}
    for kinds in (["full_attention"] * 2, ["sliding_attention"] * 2):
        config = Gemma2Config(
            **shape, hidden_size=72, head_dim=8, layer_types=kinds, sliding_window=16
        )
        model = Gemma2ForCausalLM(config).eval()
        with attach(model, "dense"), pytest.raises(NotImplementedError, match="softcap"):
            model(tokens(1, 20))


def test_reentrant_checkpointing_is_refused_and_the_other_kind_gives_the_gradient():
    model, prompt = llama(), tokens(1, 60)
    settings = {"k": 2, "block_size": 16}

    def gradient(reentrant=None):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.enable_grad(), attach(model, "block_topk", **settings):
            model.train()(prompt).logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected = gradient()
    close(gradient(reentrant=False), expected)
    with pytest.raises(NotImplementedError, match="use_reentrant"):
        gradient(reentrant=True)


def test_interleaved_rotary_embeddings_are_refused_by_the_gates():
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**SHAPE)).eval()
    gates = AttentionGates(layers=2, query_heads=9, key_heads=3, dim=8, block_size=16)
    with (
        pytest.raises(ValueError, match="undo the rotary embedding"),
        attach(model, "seer_attention", gates=gates, density=0.5),
    ):
        pass
    with pytest.raises(ValueError, match="undo the rotary embedding"):
        AttentionGates.for_model(model)


def test_gates_take_the_frequencies_of_the_model_they_are_attached_to(model):
    gates = AttentionGates.for_model(model, block_size=16, std=1.0)
    settings = {"gates": gates, "density": 0.4}
    with attach(model, "seer_attention", **settings):
        ours = model(tokens(1, 100)).logits
    given = model.model.rotary_emb.inv_freq
    with attach(model, "seer_attention", inv_freq=given, rotary_scaling=1.0, **settings):
        assert torch.equal(model(tokens(1, 100)).logits, ours)
    with (
        pytest.raises(ValueError, match="undo the rotary"),
        attach(model, "seer_attention", inv_freq=2 * given, **settings),
    ):
        pass


def test_a_prompt_too_short_for_the_settings_warns_once(model):
    prompt = tokens(1, 60)
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, **GREEDY}
    with pytest.warns(UserWarning, match="prefill") as caught, attach(model, "flexprefill"):
        [model.generate(prompt, **call) for _ in range(2)]
    assert len(caught) == 1
    assert "FlexPrefill left nothing out in prefill" in str(caught[0].message)
    assert "at least 1025 tokens, the longest one had 60" in str(caught[0].message)
    expected = r"Quest left nothing out in decode.* at least 1040 tokens"
    with pytest.warns(UserWarning, match=expected), attach(model, "quest"):
        model.generate(prompt, **call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (RecycledAttention(budget=8), ACT(), "dense"):
            with attach(model, method):
                model.generate(prompt, **call)


LEAST = [
    ("streaming_llm", {"sink": 8, "window": 20, "block_size": 8}),
    ("vertical_slash", {"verticals": 2, "slashes": 4, "block_size": 8}),
    ("block_topk", {"k": 3, "block_size": 8}),
    ("oracle_topk", {"k": 3, "block_size": 8}),
    ("flexprefill", {"gamma": 0.05, "min_budget": 24, "block_size": 8, "tau": 0.0}),
    ("vertical_slash_tokens", {"lines": 20, "local": 4, "last_queries": 8}),
    ("hip_attention", {"k": 8, "block_q": 8, "window": 8, "sink": 2, "dense_layers": 0}),
    ("quest", {"budget": 20, "page": 4}),
    ("snapkv", {**SNAP, "capacity": 20}),
    ("h2o", {"budget": 20}),
    ("hip_decoding", {"k": 8, "window": 8, "sink": 2, "dense_layers": 0}),
    ("streaming_cache", {"budget": 20}),
    ("oracle_cache", {"budget": 20}),
    ("recycled_attention", {"budget": 20}),
]


@pytest.mark.parametrize(("name", "settings"), LEAST, ids=[name for name, _ in LEAST])
def test_saves_from_is_the_length_from_which_something_is_left_out(model, name, settings):
    method = build_method(name, **settings)
    phase = "decode" if method.saves_from("decode") else "prefill"
    enough = method.saves_from(phase)

    def least_density(length):
        found = []
        for seed in range(6):
            with warnings.catch_warnings(), attach(model, method):
                warnings.simplefilter("ignore")
                method.clear()
                cache = read(model, tokens(1, length, seed))
                step(model, tokens(1, 1), cache)
                found.append(method.density(phase))
        return min(found)

    assert least_density(enough - 1) == 1.0
    # A last block of one token is hardly ever the one to stay.
    assert min(map(least_density, range(enough, enough + 8))) < 1.0


def test_a_model_of_several_parts():
    """The masks come from a part's configuration, which is reached through the whole model's."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    text = {k: v for k, v in SHAPE.items() if k != "hidden_size"} | {"hidden_size": 72}
    pictures = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "head_dim": 8, "sliding_window": 16, "layer_types": kinds},
        vision_config={**pictures, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=2,
        boi_token_index=1,
        eoi_token_index=0,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    prompt = tokens(2, 40)
    expected = model(prompt).logits
    with attach(model, "block_topk", k=2, block_size=8) as method:
        sparse = model(prompt).logits
    with attach(model, "dense"):
        close(model(prompt).logits, expected)
    assert method.densities().shape == (1, 9)
    assert (sparse - expected).abs().max() > 0.1
    assert model.config is config
    assert type(model.config.text_config) is Gemma3TextConfig
