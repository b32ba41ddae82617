"""Reading under masks, the placebo's density, readers that start at the model's own attention, shares by hand."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.dense import causal_sdpa, dense_attention
from reattend.backbones.trained.blockrank import (
    DEALT,
    LONGER,
    MASKS,
    OFFSET,
    SETTINGS,
    Masked,
    Reader,
    Seen,
    Shares,
    Together,
    arms,
    fit_reader,
    joined,
    random_blocks,
    read,
    read_together,
)
from reattend.text_matching.blockrank import (
    document_scores,
    projections,
    shared_positions,
    states_entering,
    visible,
)
from reattend.training.loop import TrainingPlan


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompts(count=5, documents=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def block():
        size = int(torch.randint(2, 7, (), generator=generator))
        return torch.randint(1, 50, (size,), generator=generator).tolist()

    return [[block() for _ in range(documents + 2)] for _ in range(count)]


def test_joined_blocks_are_padded_on_the_left():
    ids, block = joined([[[5, 6], [7], [8]], [[1], [2], [3]]])
    assert ids.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3]]
    assert block.tolist() == [[0, 0, 1, 2], [-1, 0, 1, 2]]


@pytest.mark.parametrize("mask", MASKS[:2])
def test_reading_does_not_depend_on_the_batch(tiny, mask):
    together = read(tiny, prompts(), mask, [2], seed=0, batch=3)[0][2]
    for row, prompt in enumerate(prompts()):
        alone = read(tiny, [prompt], mask, [2], seed=0)[0][2]
        size = alone.document.shape[1]
        assert together.document[row, :size].tolist() == alone.document[0].tolist()
        assert (together.document[row, size:] == -1).all()
        torch.testing.assert_close(together.key[row, :size], alone.key[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(together.query[row], alone.query[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mask", MASKS[:2])
def test_an_untrained_reader_is_the_models_attention(tiny, mask):
    """Against the layer's own projections, on one prompt, under the mask itself."""
    for prompt in prompts():
        seen = read(tiny, [prompt], mask, [2], seed=0)[0][2]
        reader = Reader(seen, rank=4, generator=torch.Generator().manual_seed(1))
        ids, block = joined([prompt])
        allowed, places = visible(block), shared_positions(block, OFFSET)
        if mask == "full":
            allowed = torch.ones_like(allowed).tril()
            places = torch.arange(ids.shape[1])[None]

        def attend(q, k, v, allowed=allowed):
            return dense_attention(q, k, v, mask=allowed[:, None])

        states = states_entering(tiny, ids, places, attend, [2])[2]
        turn = tiny.model.rotary_emb(states, places)
        query, key, _ = projections(tiny.model.layers[2], states, turn)
        document = torch.where((block > 0) & (block < 4), block - 1, -1)
        expected = document_scores(query[:, :, -2:], key, document, 3)
        torch.testing.assert_close(reader(seen), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS[:2])
def test_a_changed_reader_is_attention_with_changed_projections(tiny, mask):
    """W_q + A B and W_k + A B in the layer itself, on queries and keys turned afterwards."""
    generator = torch.Generator().manual_seed(3)
    for prompt in prompts():
        seen = read(tiny, [prompt], mask, [2], seed=0)[0][2]
        reader = Reader(seen, rank=4, generator=generator)
        layer = copy.deepcopy(tiny.model.layers[2])
        for factors, project in ((reader.query, "q_proj"), (reader.key, "k_proj")):
            factors[1].data.normal_(generator=generator)
            change = factors[0] @ factors[1].transpose(0, 1).flatten(1)
            getattr(layer.self_attn, project).weight.data += change.detach().T
        ids, block = joined([prompt])
        attend = Masked(mask, block, generator)
        states = states_entering(tiny, ids, attend.positions, attend, [2])[2]
        turn = tiny.model.rotary_emb(states, attend.positions)
        query, key, _ = projections(layer, states, turn)
        document = torch.where((block > 0) & (block < 4), block - 1, -1)
        expected = document_scores(query[:, :, -2:], key, document, 3)
        assert (
            document_scores(*_own(tiny, states, turn), document, 3) - expected
        ).abs().max() > 0.01
        torch.testing.assert_close(reader(seen), expected, rtol=0, atol=1e-4)


def _own(model, states, turn):
    query, key, _ = projections(model.model.layers[2], states, turn)
    return query[:, :, -2:], key


def lists_of_one_query():
    """Prompts of 3, 4 and 7 documents that share most, each with its own query segment and with another."""
    instruction, *documents, segment = prompts(1, documents=7)[0]
    *moved, other = prompts(1, documents=4, seed=5)[0][2:]
    lists = [documents[:3], [documents[0], moved[0], *documents[2:4]], documents]
    return [[instruction, *held, end] for held in lists for end in (segment, other)]


def test_prompts_read_together_are_those_read_alone(tiny):
    together = read_together(tiny, lists_of_one_query(), 2)
    for prompt, found in zip(lists_of_one_query(), together, strict=True):
        alone = read(tiny, [prompt], "block", [2], seed=0)[0][2]
        assert found.documents == alone.documents == len(prompt) - 2
        for name in Seen.__dataclass_fields__:
            expected = getattr(alone, name)
            torch.testing.assert_close(getattr(found, name), expected, rtol=0, atol=1e-5)


def test_a_document_of_several_lists_is_read_once():
    lists = lists_of_one_query()
    attend = Together(lists)
    assert attend.real.shape[0] == 8  # seven documents and the one that stands in place of another
    segments = sum(len(prompt[-1]) for prompt in lists)
    assert attend.ids.shape[1] == len(lists[0][0]) + attend.real.numel() + segments
    for prompt, rows in zip(lists, attend.rows, strict=True):
        assert attend.ids[0, rows].tolist() == [token for block in prompt for token in block]


def test_dense_prompts_one_by_one_are_those_of_a_batch(tiny):
    """The kernel without a mask against the mask."""
    batch = read(tiny, prompts(), "full", [2], seed=0, batch=5)[0][2]
    alone = read(tiny, prompts(), "full", [2], seed=0, batch=1)[0][2]
    real = (batch.document >= 0)[..., None]
    assert torch.equal(batch.document, alone.document)
    torch.testing.assert_close(batch.inputs * real, alone.inputs * real, rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.query, alone.query, rtol=0, atol=1e-4)


def test_decoding_reads_the_logits_of_the_whole_model(tiny):
    names = torch.tensor([4, 7, 2])
    _, found = read(tiny, prompts(), "full", [1], seed=0, names=names, batch=2)
    for prompt, logits in zip(prompts(), found, strict=True):
        ids = torch.tensor([sum(prompt, [])])  # noqa: RUF017
        torch.testing.assert_close(logits, tiny(ids).logits[0, -1, names], rtol=0, atol=1e-4)


def test_the_placebo_gives_documents_as_many_blocks_at_random():
    block = torch.arange(6).repeat_interleave(4)[None].expand(300, -1).clone()
    block[0, :2] = -1
    found = random_blocks(block, torch.Generator().manual_seed(0))
    reference = visible(block)
    document = (block > 0) & (block < 5)
    assert torch.equal(found[~document], reference[~document])
    assert not found[0, :, :2].any()
    by_block = F.one_hot(block[1], 6).float()
    seen = (found[1:].float() @ by_block)[:, 4:20].unflatten(1, (4, 4))  # document, token, block
    own = torch.arange(1, 5)
    others = seen.clone()
    others[:, own - 1, :, own] = 0
    assert set(others.unique().tolist()) == {0.0, 4.0}  # whole blocks, alike for all tokens
    assert (others[:, :, :1] == others).all()
    itself = seen[:, own - 1, :, own].transpose(0, 1)  # [prompt, document, token]
    ramp = torch.arange(1.0, 5)
    chosen = (itself == ramp).all(-1)
    assert torch.equal(itself[chosen], ramp.expand(int(chosen.sum()), -1))
    assert (itself[~chosen] == 1).all()  # always the own token
    assert ((others[:, :, 0] > 0).sum(-1) + chosen == 2).all()
    assert chosen.float().mean() == pytest.approx(2 / 5, abs=0.05)
    assert (others[:, :, 0, 0] > 0).float().mean() == pytest.approx(2 / 5, abs=0.05)


def test_the_placebo_draws_anew_in_every_layer(tiny):
    ids, block = joined(prompts(2, documents=6))
    attend = Masked("random", block, torch.Generator().manual_seed(0))
    q, k, v = (torch.randn(2, n, ids.shape[1], 4) for n in (6, 2, 2))
    assert (attend(q, k, v) - attend(q, k, v)).abs().max() > 1e-3
    fixed = Masked("block", block, torch.Generator())
    assert torch.equal(fixed(q, k, v), fixed(q, k, v))


def test_a_reader_learns_where_the_right_document_is_marked(tiny):
    """Documents that end in token 49 are right: a change of rank 4 finds them on new prompts."""
    generator, batch = torch.Generator().manual_seed(0), prompts(260, documents=4)
    right = torch.randint(4, (260,), generator=generator)
    for prompt, place in zip(batch, right.tolist(), strict=True):
        prompt[place + 1][-1] = 49
    seen = read(tiny, batch, "block", [0], seed=0)[0][0]
    reader = Reader(seen, rank=4, generator=generator)
    before = (reader(seen).argmax(1) == right)[200:].float().mean()
    plan = TrainingPlan(100, 0.03, weight_decay=0.0)
    batches = iter(lambda: torch.randint(200, (32,), generator=generator), None)
    fit_reader(reader, seen, right, plan, batches)
    after = (reader(seen).argmax(1) == right)[200:].float().mean()
    assert before < 0.5
    assert after > 0.8


def test_shares_by_hand():
    """Two documents of two tokens: uniform attention is 1, a document's own token alone is 0."""
    block = torch.tensor([0, 1, 1, 2, 2, 3, 3])
    noted = Shares(block, right=1)
    q = k = torch.zeros(1, 1, 7, 4)
    noted(q, k, q)
    assert noted.between[0] == pytest.approx([1, 1])
    sharp = torch.eye(7)[None, None] * 50
    noted(sharp, sharp, sharp)
    assert noted.between[1] == pytest.approx([0, 0], abs=1e-6)
    # Pseudo-documents are the tokens 1 | 2 3 | 4: other shares 1/2 + 0 + 1/3 + 3/4 of all that is seen.
    rows = [0, 1 / 3, 1 / 4, 3 / 5]  # other documents' mass of token 1, 2, 3, 4
    inside = [1 / 2, 2 / 3, 3 / 4, 4 / 5]
    rows[1] = 1 / 3
    rows[2] = 1 / 4
    assert noted.uniform[1] == pytest.approx(sum(rows) / sum(inside))
    assert noted.uniform[0] == pytest.approx((0 + 0 + 2 / 4 + 2 / 5) / sum(inside))
    document = [1 / 2, 1 / 3, 1 / 4, 1 / 5]
    expected = [sum(document) / 4, 0, (1 / 2 + 2 / 3 + 1 / 4 + 2 / 5) / 4, (2 / 4 + 2 / 5) / 4]
    assert noted.segments[0][:4] == pytest.approx(expected)
    signals = [
        (1 / 6 + 1 / 7) / 2,
        0,
        (2 / 6 + 2 / 7) / 2,
        (2 / 6 + 2 / 7) / 2,
        (1 / 6 + 2 / 7) / 2,
    ]
    assert noted.segments[0][4:] == pytest.approx(signals)


def test_shares_leave_the_attention_as_it_is():
    q, k, v = (torch.randn(1, n, 7, 4) for n in (6, 2, 2))
    noted = Shares(torch.tensor([0, 1, 1, 2, 2, 3, 3]), right=0)
    torch.testing.assert_close(noted(q, k, v), causal_sdpa(q, k, v), rtol=0, atol=1e-6)


def test_arms_cover_what_is_compared():
    kinds = arms(SETTINGS["cpu"])
    assert {kinds[mask] for mask in MASKS} == {(mask, 16) for mask in MASKS}
    assert kinds[DEALT] == ("block", 16)
    assert kinds[LONGER] == ("full", 16)
    assert len(kinds) == 8


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_growing_lists_hold_what_the_claim_compares(setting):
    """The length of training and four times as many documents, under both masks."""
    read_densely = setting.numbers[: setting.dense_numbers]
    assert {setting.documents, 4 * setting.documents} <= set(read_densely)
    assert setting.pool > setting.numbers[-1]
