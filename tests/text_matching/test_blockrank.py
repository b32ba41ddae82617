"""Block-sparse attention against the masked reference, order without effect, scores and loss by hand."""

import itertools
import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.dense import causal_sdpa, dense_attention
from reattend.text_matching.blockrank import (
    auxiliary_loss,
    block_attention,
    document_scores,
    head_scores,
    multiply_adds,
    pack_blocks,
    projections,
    shared_positions,
    states_entering,
    visible,
)

SEEDS = range(3)
OFFSET = 40


def prompts(seed, documents=3, longest=7, batch=2, least=1):
    """Prompts of random tokens in blocks of random lengths."""
    generator = torch.Generator().manual_seed(seed)

    def block():
        size = int(torch.randint(least, longest + 1, (), generator=generator))
        return torch.randint(1, 50, (size,), generator=generator).tolist()

    return [[block() for _ in range(documents + 2)] for _ in range(batch)]


def heads(batch, tokens, seed, query_heads=6, key_heads=2, dim=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, tokens, dim, generator=generator, dtype=torch.float64)
        for n in (query_heads, key_heads, key_heads)
    ]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def block_attend(block, blocks):
    return lambda q, k, v: block_attention(q, k, v, block >= 0, blocks)


def run(model, prompt, layers, multiple=1):
    """States entering `layers` with the attention computed block by block."""
    ids, block = pack_blocks([prompt], multiple)
    places = shared_positions(block, OFFSET)
    with torch.no_grad():
        states = states_entering(model, ids, places, block_attend(block, len(prompt)), layers)
    return states, block, places


def scores_at(model, states, block, places, layer):
    """S at a layer, from the last two tokens."""
    turn = model.model.rotary_emb(states[layer], places)
    with torch.no_grad():
        query, key, _ = projections(model.model.layers[layer], states[layer], turn)
    last = int(block.max())
    document = torch.where((block > 0) & (block < last), block - 1, -1)
    return document_scores(query[:, :, -2:], key, document, last - 1)


# Layout -------------------------------------------------------------------------------------------


def test_blocks_are_padded_on_the_left_to_a_multiple():
    ids, block = pack_blocks([[[5, 6, 7], [8], [9, 4]]], multiple=4, pad=99)
    assert ids.tolist() == [[99, 5, 6, 7, 99, 99, 99, 8, 99, 99, 9, 4]]
    assert block.tolist() == [[-1, 0, 0, 0, -1, -1, -1, 1, -1, -1, 2, 2]]


def test_documents_share_positions_behind_the_instruction():
    _, block = pack_blocks([[[5, 6, 7], [8], [8, 8], [9, 4]]], multiple=4)
    expected = [0, 0, 1, 2, 0, 0, 0, 3, 0, 0, 3, 4, 0, 0, 40, 41]
    assert shared_positions(block, OFFSET).tolist() == [expected]
    without_padding = block[block >= 0][None]
    assert shared_positions(without_padding, OFFSET).tolist() == [[0, 1, 2, 3, 3, 4, 40, 41]]


@pytest.mark.parametrize(
    "wrong",
    [[[[1], [2]]], [[[1], [2], [3]], [[1], [2], [3], [4]]], []],
    ids=["two blocks", "different numbers", "none"],
)
def test_prompts_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="the same number of documents"):
        pack_blocks(wrong)


def test_an_empty_block_is_refused():
    with pytest.raises(ValueError, match="leave it out"):
        pack_blocks([[[1], [], [3]]])


# Attention ----------------------------------------------------------------------------------------


def test_the_mask_by_hand():
    block = torch.tensor([[0, 0, 1, -1, 2, 2, 3]])
    expected = [
        "1000000",
        "1100000",
        "1110000",
        "0000000",
        "1100100",
        "1100110",
        "1110111",
    ]
    assert ["".join(map(str, row)) for row in visible(block)[0].int().tolist()] == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("documents", [1, 2, 5])
def test_blocks_are_the_masked_reference(seed, documents):
    batch = prompts(seed, documents)
    _, block = pack_blocks(batch, multiple=3)
    q, k, v = heads(2, block.shape[1], seed)
    for x in (q, k, v):
        x.requires_grad_()
    found = block_attention(q, k, v, block >= 0, documents + 2)
    expected = dense_attention(q, k, v, mask=visible(block)[:, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).double()
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_scale_is_that_of_the_reference():
    _, block = pack_blocks(prompts(0), multiple=2)
    q, k, v = heads(2, block.shape[1], 0)
    found = block_attention(q, k, v, block >= 0, 5, scale=0.7)
    expected = dense_attention(q, k, v, mask=visible(block)[:, None], scale=0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_flex_attention_with_the_papers_mask_agrees():
    """The mask of the official flex back-end: last block, first block, own block, and causal."""
    blocks, length = 4, 16
    q, k, v = (x.float() for x in heads(1, blocks * length, 1))

    def mask_mod(b, h, query, key):
        row, column = query // length, key // length
        return (query >= key) & ((row == blocks - 1) | (column == 0) | (row == column))

    mask = create_block_mask(mask_mod, None, None, blocks * length, blocks * length, "cpu")
    with torch.no_grad():
        expected = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    real = torch.ones(1, blocks * length, dtype=torch.bool)
    torch.testing.assert_close(block_attention(q, k, v, real, blocks), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_document_is_causal_attention(seed):
    q, k, v = heads(2, 21, seed)
    real = torch.ones(2, 21, dtype=torch.bool)
    found = block_attention(q, k, v, real, 3)
    torch.testing.assert_close(found, causal_sdpa(q, k, v), rtol=0, atol=1e-12)


def test_tokens_must_divide_into_blocks():
    q, k, v = heads(1, 10, 0)
    with pytest.raises(ValueError, match="10 tokens are no 4 equal blocks"):
        block_attention(q, k, v, torch.ones(1, 10, dtype=torch.bool), 4)


@pytest.mark.parametrize(("documents", "length"), [(1, 5), (4, 3), (30, 16)])
def test_multiply_adds_count_the_scores_of_each_part(documents, length):
    """N (2 H^2) + H^2 + (N + 2) H^2 against ((N + 2) H)^2: the matrices that are really formed."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counting(q, k, v, **settings):
        seen.append(q.shape[0] * q.shape[2] * k.shape[2])
        return original(q, k, v, **settings)

    tokens = (documents + 2) * length
    q, k, v = heads(1, tokens, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", counting)
        block_attention(q, k, v, torch.ones(1, tokens, dtype=torch.bool), documents + 2)
        one_by_one = sum(seen)
        seen.clear()
        causal_sdpa(q, k, v)
    assert multiply_adds(documents, length) == (one_by_one, sum(seen))


# In a language model ------------------------------------------------------------------------------


def test_states_are_those_of_the_model_itself(tiny):
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    places = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        expected = tiny(ids, output_hidden_states=True).hidden_states
        states = states_entering(tiny, ids, places, causal_sdpa, range(5))
    for layer in range(4):
        torch.testing.assert_close(states[layer], expected[layer], rtol=0, atol=1e-12)
    normed = tiny.model.norm(states[4])  # transformers normalises what leaves the last layer
    torch.testing.assert_close(normed, expected[4], rtol=0, atol=1e-12)


def test_an_early_exit_gives_the_states_of_the_full_pass(tiny):
    prompt = prompts(0, batch=1)[0]
    early, _, _ = run(tiny, prompt, [2])
    full, _, _ = run(tiny, prompt, [2, 4])
    assert torch.equal(early[2], full[2])
    with pytest.raises(ValueError, match=r"layers must lie in 0\.\.4"):
        run(tiny, prompt, [5])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_documents_has_no_effect(tiny, seed):
    instruction, *documents, segment = prompts(seed, documents=4, least=3, batch=1)[0]
    states, block, places = run(tiny, [instruction, *documents, segment], [2, 4])
    scores = scores_at(tiny, states, block, places, 2)[0]
    assert scores.std() > 1e-3
    for order in list(itertools.permutations(range(4)))[1::5]:
        moved, block, places = run(
            tiny, [instruction, *(documents[i] for i in order), segment], [2, 4]
        )
        found = scores_at(tiny, moved, block, places, 2)[0]
        torch.testing.assert_close(found, scores[list(order)], rtol=0, atol=1e-12)
        torch.testing.assert_close(moved[4][:, -1], states[4][:, -1], rtol=0, atol=1e-11)


def test_the_order_matters_under_the_causal_mask(tiny):
    """What the test above would miss if the model did not read its documents."""
    instruction, *documents, segment = prompts(0, documents=4, least=3, batch=1)[0]
    ends = []
    for order in (documents, documents[::-1]):
        ids = torch.tensor([[t for part in (instruction, *order, segment) for t in part]])
        places = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            ends.append(states_entering(tiny, ids, places, causal_sdpa, [4])[4][:, -1])
    assert (ends[0] - ends[1]).abs().max() > 1e-3


@pytest.mark.parametrize("changed", range(3))
def test_documents_do_not_see_each_other(tiny, changed):
    instruction, *documents, segment = prompts(5, least=3, batch=1)[0]
    before, block, _ = run(tiny, [instruction, *documents, segment], [3])
    documents[changed] = [(token + 7) % 50 for token in documents[changed]]
    after, _, _ = run(tiny, [instruction, *documents, segment], [3])
    same = (before[3] == after[3]).all(-1)[0]
    for number in range(4):  # instruction and documents
        assert same[block[0] == number].all() == (number != changed + 1)
    assert not same[block[0] == 4].any()


def test_padding_changes_nothing(tiny):
    prompt = prompts(1, batch=1)[0]
    tight, block, _ = run(tiny, prompt, [4])
    wide, padded, _ = run(tiny, prompt, [4], multiple=16)
    expected = tight[4][block >= 0]
    torch.testing.assert_close(wide[4][padded >= 0], expected, rtol=0, atol=1e-11)


# Scores and loss ----------------------------------------------------------------------------------


def test_scores_by_hand():
    """One head, two signals, keys that give logits log 1, log 2, log 5 over document tokens."""
    query = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]], dtype=torch.float64)
    logits = torch.tensor([9.0, math.log(1), math.log(2), math.log(5), 9.0], dtype=torch.float64)
    key = torch.stack([logits * 2**0.5, torch.zeros(5)], -1)[None, None]
    document = torch.tensor([[-1, 0, 0, 1, -1]])
    found = document_scores(query, key, document, 3)[0]
    expected = [(3 / 8 + 2 / 3) / 2, (5 / 8 + 1 / 3) / 2, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_spread_one_over_the_documents(seed):
    q, k, _ = heads(3, 17, seed)
    document = torch.randint(-1, 4, (3, 17), generator=torch.Generator().manual_seed(seed))
    by_head = head_scores(q[:, :, -2:], k, document, 4)
    assert by_head.shape == (3, 6, 4)
    torch.testing.assert_close(by_head.sum(-1), torch.ones(3, 6).double(), rtol=0, atol=1e-12)
    mean = document_scores(q[:, :, -2:], k, document, 4)
    torch.testing.assert_close(by_head.mean(1), mean, rtol=0, atol=1e-12)


def test_uniform_scores_cost_log_n():
    positive = torch.eye(7, dtype=torch.bool)[[2, 5]]
    assert auxiliary_loss(torch.full((2, 7), 1 / 7), positive).item() == pytest.approx(math.log(7))


def test_the_loss_by_hand():
    scores = torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.float64)
    exponents = [math.exp(s / 0.05) for s in (0.1, 0.2, 0.4)]
    for right in ([1], [0, 2]):
        positive = torch.zeros(1, 3, dtype=torch.bool)
        positive[0, right] = True
        expected = -math.log(sum(exponents[i] for i in right) / sum(exponents))
        assert auxiliary_loss(scores, positive).item() == pytest.approx(expected)
    ends = auxiliary_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[False, True]])).item()
    assert ends == pytest.approx(20, abs=1e-4)  # scores lie in [0, 1]: logits span 1 / tau at most


def test_wrong_input_of_the_loss_is_refused():
    scores, positive = torch.rand(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs a right document"):
        auxiliary_loss(scores, positive)
    with pytest.raises(ValueError, match="temperature must be positive"):
        auxiliary_loss(scores, ~positive, 0.0)


def test_the_loss_trains_no_layer_above_its_own(tiny):
    prompt = prompts(3, least=3, batch=1)[0]
    ids, block = pack_blocks([prompt], 1)
    places = shared_positions(block, OFFSET)
    tiny.requires_grad_(True)
    tiny.zero_grad()
    states = states_entering(tiny, ids, places, block_attend(block, 5), [2, 4])
    turn = tiny.model.rotary_emb(states[2], places)
    query, key, _ = projections(tiny.model.layers[2], states[2], turn)
    document = torch.where((block > 0) & (block < 4), block - 1, -1)
    scores = document_scores(query[:, :, -2:], key, document, 3)
    auxiliary_loss(scores, torch.tensor([[True, False, False]])).backward()
    reached = [
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        for layer in tiny.model.layers
    ]
    assert reached == [True, True, True, False]
    layer = tiny.model.layers[2]
    assert layer.self_attn.q_proj.weight.grad is not None
    assert layer.self_attn.v_proj.weight.grad is None
