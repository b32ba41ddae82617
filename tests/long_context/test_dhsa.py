"""Oracles of DHSA."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.blocks import expand_to_tokens
from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.long_context.dhsa import (
    DHSA,
    BoundaryPredictor,
    Teacher,
    attend_to_tokens,
    block_bounds,
    boundary_ratios,
    choose_tokens,
    chunk_edges,
    chunk_of_tokens,
    even_edges,
    focal_loss,
    head_mean_weights,
    key_jumps,
    suppress,
    token_scores,
)

SHAPES = [  # batch, query heads, key heads, queries, keys, block size
    pytest.param(1, 2, 2, 96, 96, 16, id="H2-T96-b16"),
    pytest.param(2, 6, 2, 101, 101, 12, id="H6kv2-T101-b12"),
    pytest.param(1, 4, 4, 45, 103, 16, id="H4-Q45-T103-b16"),
    pytest.param(2, 3, 1, 29, 90, 8, id="H3kv1-Q29-T90-b8"),
]
EACH = pytest.mark.parametrize(("batch", "heads", "key_heads", "queries", "keys", "size"), SHAPES)
SCALE = 0.3
SMALL = {"budget": 40, "local": 16, "sink": 3, "instruction": 0, "chunk": 6, "window": 2}


def tensors(batch, heads, key_heads, queries, keys, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(number, tokens):
        return torch.randn(batch, number, tokens, 16, generator=generator, dtype=dtype)

    return normal(heads, queries), normal(key_heads, keys), normal(key_heads, keys)


def random_weights(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(2, tokens, tokens, generator=generator, dtype=torch.float64)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def token_mask(tokens, size, queries, keys):
    """What each query may read, from the lists of the blocks."""
    listed = F.one_hot(tokens, keys + 1)[..., :keys].any(dim=2)
    place = torch.arange(keys - queries, keys)
    rows = listed[:, place // size - (keys - queries) // size]
    return rows & (torch.arange(keys) <= place[:, None])


# Boundaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 4])
def test_ratios_are_those_of_rectangles_summed_by_hand(window):
    weights = random_weights(37)
    ours, tokens = boundary_ratios(weights, window), 37
    for i in range(tokens):
        if i < 2 * window - 1 or i >= tokens - 2 * window:
            assert (ours[:, i] == -math.inf).all()
            continue
        later = weights[:, i + window + 1 :]
        left = later[:, :, i - window + 1 : i + 1].sum((1, 2))
        right = later[:, :, i + 1 : i + window + 1].sum((1, 2))
        expected = (torch.maximum(left, right) + 1e-6) / (torch.minimum(left, right) + 1e-6)
        torch.testing.assert_close(ours[:, i], expected, atol=0, rtol=1e-9)


@pytest.mark.parametrize("place", [14, 21, 30])
def test_a_planted_change_of_use_has_the_largest_ratio(place):
    weights = torch.ones(1, 50, 50, dtype=torch.float64)
    weights[:, :, place + 1 :] = 0.05
    weights = weights.tril()
    ratios = boundary_ratios(weights / weights.sum(-1, keepdim=True), 4)
    assert ratios[0].argmax() == place
    assert ratios[0, place] == pytest.approx(20, rel=1e-3)


def test_the_predictor_is_the_attention_of_every_window_on_its_own():
    torch.manual_seed(0)
    predictor = BoundaryPredictor(24, heads=4, window=3, hidden=10).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    key = torch.randn(2, 3, 19, 8, dtype=torch.float64)
    joined = torch.stack([torch.cat([*row.unbind(0)], dim=-1) for row in key])
    ours = predictor.scores(key)
    for i in range(19):
        window = torch.zeros(2, 6, 24, dtype=torch.float64)
        for place, token in enumerate(range(i - 2, i + 4)):
            if 0 <= token < 19:
                window[:, place] = joined[:, token]
        attended, _ = predictor.attention(window, window, window)
        hidden = predictor.norm(attended)
        left, right = hidden[:, :3].mean(1), hidden[:, 3:].mean(1)
        cosine = (left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1))
        parts = [left, right, (left - right).abs(), left * right, cosine[:, None]]
        expected = predictor.mlp(torch.cat(parts, dim=-1))[:, 0]
        torch.testing.assert_close(predictor(joined)[:, i], expected, atol=1e-10, rtol=1e-10)
        inside = 2 <= i < 16
        assert torch.equal(ours[:, i].isfinite(), torch.full((2,), inside))
    assert ours[:, 2:16].std() > 0.1


def test_focal_loss_without_focus_is_cross_entropy():
    logits = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = (logits.roll(1, 1) > 0.3).double()
    plain = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(focal_loss(logits, target, gamma=0.0, pos_weight=1.0), plain)
    right = target * logits.sigmoid() + (1 - target) * (1 - logits.sigmoid())
    weight = 1 + 0.3 * target
    expected = -(weight * (1 - right) ** 2 * right.log()).mean()
    torch.testing.assert_close(focal_loss(logits, target), expected)


def test_jumps_are_cosines_of_neighbouring_keys():
    _, key, _ = tensors(2, 4, 2, 20, 20)
    joined = key.transpose(1, 2).flatten(2)
    jumps = key_jumps(key)
    for i in range(19):
        cosine = torch.cosine_similarity(joined[:, i], joined[:, i + 1], dim=-1)
        torch.testing.assert_close(jumps[:, i], 1 - cosine)
    assert (jumps[:, -1] == -math.inf).all()


@pytest.mark.parametrize("window", [0, 1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_suppression_is_that_of_one_position_after_the_other(window, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 30, (3, 71), generator=generator).float()  # with ties
    scores[scores < 4] = -math.inf
    kept = suppress(scores, window)
    for row, mine in zip(scores, kept, strict=True):
        taken = []
        for i in sorted(range(71), key=lambda i: (-row[i].item(), i)):
            if row[i] > -math.inf and all(abs(i - j) > window for j in taken):
                taken.append(i)
        assert mine.nonzero()[:, 0].tolist() == sorted(taken)


@pytest.mark.parametrize("seed", range(3))
def test_edges_rise_from_the_first_key_to_the_last(seed):
    scores = torch.rand(4, 83, generator=torch.Generator().manual_seed(seed))
    scores[:, -1] = -math.inf
    scores[1, 20:] = -math.inf  # so that sequences have different numbers of chunks
    edges = chunk_edges(scores, limit=9, window=3)
    assert (edges[:, 0] == 0).all()
    assert (edges[:, -1] == 83).all()
    steps = edges.diff(dim=1)
    assert ((steps > 0) | (edges[:, 1:] == 83)).all()
    for row, ends in zip(scores, edges, strict=True):
        inner = sorted(set(ends.tolist()) - {0, 83})
        best = row.masked_fill(~suppress(row[None], 3)[0], -math.inf)
        expected = best.topk(min(9, int((best > -math.inf).sum()))).indices + 1
        assert inner == sorted(expected.tolist())  # a boundary lies behind its position


def test_scores_below_the_threshold_are_no_boundaries_and_without_any_chunks_are_even():
    scores = torch.zeros(2, 40)
    scores[0, [7, 21]] = torch.tensor([3.0, 1.0])
    edges = chunk_edges(scores, limit=5, window=2, threshold=1.0)
    assert edges[0].unique().tolist() == [0, 8, 40]
    assert edges[1].unique().tolist() == [0, 8, 16, 24, 32, 40]
    assert torch.equal(chunk_edges(scores, limit=0, window=2), torch.tensor([[0, 40]] * 2))


def test_the_instruction_is_one_chunk():
    scores = torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    scores[:, -20:] += 5
    scores[:, 38] += 9
    for edges in chunk_edges(scores, limit=6, window=2, instruction=20):
        inner = edges.unique().tolist()
        assert inner[-2:] == [40, 60]
        assert 39 not in inner  # suppressed by it


def test_even_chunks():
    assert even_edges(4, 12).tolist() == [0, 3, 6, 9, 12]
    assert even_edges(3, 10).tolist() == [0, 3, 6, 10]
    assert even_edges(9, 4).tolist() == [0, 1, 2, 3, 4]


# Scores -------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("pooling", ["sqrt", "mean"])
def test_scores_are_products_of_pooled_blocks_and_chunks(
    batch, heads, key_heads, queries, keys, size, pooling
):
    query, key, _ = tensors(batch, heads, key_heads, queries, keys, dtype=torch.float64)
    inner = torch.randperm(keys - 1, generator=torch.Generator().manual_seed(1))[:9].sort().values
    edges = torch.cat([torch.tensor([0]), inner + 1, torch.tensor([keys, keys])]).expand(batch, -1)
    ours = token_scores(query, key, edges, block_size=size, pooling=pooling)
    power = 0.5 if pooling == "sqrt" else 0.0
    first = keys - queries
    for row, block in enumerate(range(first // size, math.ceil(keys / size))):
        own = query[:, :, max(block * size - first, 0) : (block + 1) * size - first]
        q = own.mean((1, 2)) * own.shape[2] ** power
        for start, stop in zip(edges[0].tolist(), edges[0, 1:].tolist(), strict=False):
            if start < stop:
                k = key[:, :, start:stop].mean((1, 2)) * (stop - start) ** power
                expected = (q * k).sum(-1)[:, None].expand(-1, stop - start)
                torch.testing.assert_close(ours[:, row, start:stop], expected)


def test_tokens_know_their_chunks():
    edges = torch.tensor([[0, 3, 4, 9, 9], [0, 1, 5, 8, 9]])
    expected = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 2, 2, 2, 3]])
    assert torch.equal(chunk_of_tokens(edges), expected)
    for row, chunks in zip(edges, expected, strict=True):
        assert row[chunks].tolist() == [row[row <= t].max().item() for t in range(9)]


def test_the_noise_of_scores_does_not_depend_on_the_size_of_chunks_under_sqrt():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(400, 1, 84, 16, generator=generator)
    query = torch.randn(1, 1, 84, 16, generator=generator).expand(400, -1, -1, -1)
    edges = torch.tensor([0, 4, 20, 84]).expand(400, -1)
    spread = {}
    for pooling in ("sqrt", "mean"):
        scores = token_scores(query, key, edges, block_size=1, pooling=pooling)[:, :, [0, 4, 20]]
        spread[pooling] = scores.var(dim=0).mean(dim=0)
    assert (spread["sqrt"] / spread["sqrt"][0] - 1).abs().max() < 0.1
    torch.testing.assert_close(
        spread["mean"] * torch.tensor([4.0, 16, 64]), spread["sqrt"], rtol=1e-4, atol=0
    )


def test_equal_chunks_rank_alike_under_both_poolings():
    query, key, _ = tensors(2, 6, 2, 96, 96, dtype=torch.float64)
    edges = even_edges(16, 96).expand(2, -1)
    both = [token_scores(query, key, edges, block_size=8, pooling=p) for p in ("sqrt", "mean")]
    torch.testing.assert_close(both[0], both[1] * math.sqrt(6 * 8))


def test_strict_scores_know_no_key_of_the_block_or_behind():
    query, key, _ = tensors(2, 4, 2, 60, 60, dtype=torch.float64)
    edges = torch.tensor([[0, 5, 31, 40, 60]] * 2)
    changed = key.clone()
    changed[:, :, 24:] += 3
    before = slice(0, 24)  # the fourth block of 8 begins at 24, inside the second chunk
    for strict in (True, False):
        a, b = (token_scores(query, k, edges, block_size=8, strict=strict) for k in (key, changed))
        assert torch.equal(a[:, 3, before], b[:, 3, before]) is strict
    # What is left of the chunk is its mean.
    ours = token_scores(query, key, edges, block_size=8, strict=True)[:, 3, 10]
    q, k = query[:, :, 24:32].mean((1, 2)), key[:, :, 5:24].mean((1, 2))
    torch.testing.assert_close(ours, (q * k).sum(-1) * math.sqrt(8 * 19))


# Selection ----------------------------------------------------------------------------------------


@EACH
def test_every_block_reads_its_budget_and_what_is_forced(
    batch, heads, key_heads, queries, keys, size
):
    generator = torch.Generator().manual_seed(0)
    begin, ends = block_bounds(queries, keys, size)
    assert begin[0] <= keys - queries < ends[0]
    scores = torch.rand(batch, len(ends), keys, generator=generator)
    tokens = choose_tokens(scores, ends, budget=40, local=16, sink=3)
    for row in range(batch):
        for block, end in enumerate(ends.tolist()):
            listed = tokens[row, block].tolist()
            real = [t for t in listed if t < keys]
            assert listed == sorted(listed)
            assert len(set(real)) == len(real) == min(40, end)
            assert max(real) == end - 1
            assert {*range(min(3, end)), *range(max(end - 16, 0), end)} <= set(real)
            free = [t for t in range(3, end - 16) if t not in real]
            taken = [t for t in real if 3 <= t < end - 16]
            own = scores[row, block]
            assert not free or not taken or own[taken].min() >= own[free].max()


def test_single_keys_and_queries_of_one_head_are_exact_top_k():
    query, key, _ = tensors(1, 1, 1, 50, 50, dtype=torch.float64)
    every = torch.arange(51)[None]
    scores = token_scores(query, key, every, block_size=1)
    torch.testing.assert_close(scores[0], query[0, 0] @ key[0, 0].T)
    _, ends = block_bounds(50, 50, 1)
    tokens = choose_tokens(scores, ends, budget=7, local=1, sink=0)
    for i in range(7, 50):
        best = (key[0, 0, :i] @ query[0, 0, i]).topk(6).indices
        assert set(tokens[0, i].tolist()) == {i, *best.tolist()}


@pytest.mark.parametrize("keys", [96, 101])
def test_fixed_chunks_of_blocks_are_the_published_block_sparse_baseline(keys):
    query, key, _ = tensors(1, 6, 2, keys, keys)
    made = DHSA(
        boundaries="fixed", pooling="mean", chunk=8, block_size=8, local=8, sink=0, budget=32,
        instruction=0,
    )  # fmt: skip
    one_head = query.mean(1, keepdim=True), key.mean(1, keepdim=True)
    blocks = BlockTopK(k=4, sink=0, block_size=8).block_mask(*one_head, scale=1.0)
    expected = expand_to_tokens(blocks, 8, keys, keys)[:, 0]
    ours = token_mask(made.tokens(query, key, scale=1.0, layer=0), 8, keys, keys)
    whole = keys // 8 * 8  # a part of a block leaves budget for a part of another
    assert torch.equal(ours[:, :whole], expected[:, :whole])


# Attention ----------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("numbers", [1, 1 << 20])
def test_output_is_dense_attention_under_the_same_mask(
    batch, heads, key_heads, queries, keys, size, numbers, monkeypatch
):
    monkeypatch.setattr("reattend.long_context.dhsa.GATHERED_NUMBERS", numbers)
    query, key, value = tensors(batch, heads, key_heads, queries, keys)
    made = DHSA(block_size=size, **SMALL)
    tokens = made.tokens(query, key, scale=SCALE, layer=0)
    ours, pairs = attend_to_tokens(query, key, value, tokens, block_size=size, scale=SCALE)
    mask = token_mask(tokens, size, queries, keys)
    expected = dense_attention(query, key, value, mask=mask[:, None], scale=SCALE)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(pairs, mask.sum(-1))
    whole = made.prefill(query, key, value, scale=SCALE, layer=0)
    torch.testing.assert_close(whole, ours)
    share = mask.sum((1, 2)) / (queries * keys - queries * (queries - 1) // 2)
    assert share.mean() < 0.9
    assert made.density() == pytest.approx(share.mean().item())


@EACH
def test_with_room_for_everything_it_is_dense(batch, heads, key_heads, queries, keys, size):
    query, key, value = tensors(batch, heads, key_heads, queries, keys)
    expected = dense_attention(query, key, value, scale=SCALE, causal=True)
    everything = DHSA(block_size=size, **SMALL | {"budget": keys})
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(
        everything.prefill(query, key, value, scale=SCALE, layer=0), expected, **close
    )
    assert everything.density() == 1.0
    tokens = everything.tokens(query, key, scale=SCALE, layer=0)
    ours, _ = attend_to_tokens(query, key, value, tokens, block_size=size, scale=SCALE)
    torch.testing.assert_close(ours, expected, **close)


def test_the_instruction_reads_everything():
    query, key, value = tensors(1, 4, 2, 96, 96)
    made = DHSA(block_size=16, **SMALL | {"instruction": 21})
    ours = made.prefill(query, key, value, scale=SCALE, layer=0)
    expected = dense_attention(query, key, value, scale=SCALE, causal=True)
    torch.testing.assert_close(ours[:, :, -21:], expected[:, :, -21:], atol=1e-5, rtol=1e-5)
    assert (ours[:, :, -22] - expected[:, :, -22]).abs().max() > 1e-2
    tokens = made.tokens(query, key, scale=SCALE, layer=0)
    read = token_mask(tokens, 16, 96, 96).sum(-1)
    read[:, -21:] = torch.arange(76, 97)
    assert made.density() == pytest.approx(read.sum().item() / (96 * 97 / 2))


def test_sequences_of_a_batch_have_chunks_of_their_own():
    query, key, value = tensors(3, 4, 2, 90, 90)
    made = DHSA(block_size=16, **SMALL)
    together = made.prefill(query, key, value, scale=SCALE, layer=0)
    for row in range(3):
        one = slice(row, row + 1)
        alone = made.prefill(query[one], key[one], value[one], scale=SCALE, layer=0)
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("boundaries", ["jumps", "attention", "fixed", "predictor"])
def test_boundaries_by_name(boundaries):
    torch.manual_seed(0)
    query, key, _ = tensors(1, 4, 2, 90, 90)
    chosen = BoundaryPredictor(32, window=2) if boundaries == "predictor" else boundaries
    made = DHSA(boundaries=chosen, block_size=16, **SMALL)
    edges = made.edges(query, key, scale=SCALE, layer=0)
    expected = {
        "jumps": lambda: chunk_edges(key_jumps(key), limit=15, window=2),
        "attention": lambda: chunk_edges(
            boundary_ratios(head_mean_weights(query, key, SCALE), 4), limit=15, window=2
        ),
        "fixed": lambda: torch.arange(0, 91, 6)[None],
        "predictor": lambda: chunk_edges(chosen.scores(key), limit=15, window=2),
    }[boundaries]()
    assert torch.equal(edges, expected)


# In a model ---------------------------------------------------------------------------------------


def small_llama():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16}
    config = LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


def test_decoding_is_dense_behind_a_sparse_prompt():
    model, prompt = small_llama(), torch.randint(0, 50, (1, 90))
    predictor = BoundaryPredictor(16, window=2)
    with (
        torch.no_grad(),
        attach(model, "dhsa", boundaries=predictor, block_size=16, **SMALL) as made,
    ):
        read = model(prompt, use_cache=True)
        model(prompt[:, :1], past_key_values=read.past_key_values, use_cache=True)
    assert made.density() < 0.9
    assert made.density("decode") == 1.0


def test_the_teacher_collects_keys_and_ratios():
    model, prompt = small_llama(), torch.randint(0, 50, (2, 30))
    with torch.no_grad(), attach(model, Teacher(2)) as teacher:
        logits = model(prompt).logits
    torch.testing.assert_close(logits, model(prompt).logits, atol=1e-4, rtol=1e-4)
    weights = model.set_attn_implementation("eager")
    weights = model(prompt, output_attentions=True).attentions
    assert sorted(teacher.layers) == [0, 1]
    for layer, (keys, ratios) in teacher.layers.items():
        assert keys.shape == (2, 30, 16)
        expected = boundary_ratios(weights[layer].mean(1), 2)
        torch.testing.assert_close(ratios, expected, atol=1e-3, rtol=1e-3)


def test_a_prompt_saves_from_one_token_more_than_the_budget():
    assert DHSA().saves_from("prefill") == 2113  # its last block must reach beyond 64 dense queries
    for instruction in (0, 5, 16, 30):
        made = DHSA(block_size=16, **SMALL | {"instruction": instruction})
        least = made.saves_from("prefill")
        for keys, saves in ((least - 1, False), (least, True)):
            query, key, value = tensors(1, 2, 2, keys, keys)
            made.clear()
            made.prefill(query, key, value, scale=SCALE, layer=0)
            assert (made.density() < 1) is saves
    assert made.saves_from("decode") is None


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"boundaries": "best"},
            "boundaries must be a BoundaryPredictor or one of jumps, attention",
        ),
        ({"pooling": "max"}, "pooling must be one of sqrt, mean, got 'max'"),
        ({"local": 64}, "local must be at least block_size"),
        ({"budget": 200}, r"sink \+ local at most budget, got 128 \+ 128 of 200"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"instruction": -1}, "instruction must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DHSA(**settings)


def test_a_predictor_of_another_model_is_refused():
    _, key, _ = tensors(1, 2, 2, 20, 20)
    with pytest.raises(ValueError, match="keys of 48 numbers, this model's have 32: train one"):
        BoundaryPredictor(48).scores(key)


def test_boundaries_from_attention_need_the_whole_prompt():
    query, key, value = tensors(1, 2, 2, 30, 90)
    made = DHSA(boundaries="attention", block_size=16, **SMALL)
    with pytest.raises(ValueError, match="whole prompt at once"):
        made.prefill(query, key, value, scale=SCALE, layer=0)
