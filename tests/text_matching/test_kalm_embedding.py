"""KaLM-Embedding: focal weights, mixing, distillation, Matryoshka, the encoder and the data rules."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from reattend.text_matching.kalm_embedding import (
    add_own,
    distillation_loss,
    embed,
    focal_weights,
    instruct,
    list_weights,
    matryoshka_loss,
    mine_negatives,
    mix,
    pair_weights,
    ranking_consistent,
    weighted_loss,
)
from reattend.training.contrastive import answer_log_probability, cosine_logits
from reattend.trunks.decoders import decoder_states, pool_tokens

SEEDS = (0, 1, 2)
SHAPES = [(2, 2, 3), (5, 3, 7), (9, 7, 13)]  # batch, mined, width


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch_of(batch, mined, width, seed=0):
    """Queries, candidates with the answers first, and the mined negatives among them."""
    queries, documents = (
        normal(batch, width, seed=seed),
        normal(batch * (1 + mined), width, seed=seed + 9),
    )
    return queries, documents, documents[batch:].unflatten(0, (batch, mined))


# The encoder --------------------------------------------------------------------------------------


def decoder(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        initializer_range=0.3,
    )
    return LlamaModel(config).double().eval()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_token_reaches_the_first_only_without_the_mask(seed):
    """The gradient of the first state with respect to the last token's input."""
    model, ids = decoder(seed), torch.tensor([[3, 1, 4, 1, 5]])
    first = torch.tensor([[True, False, False, False, False]])
    inputs = []
    model.embed_tokens.register_forward_hook(
        lambda module, args, out: inputs.append(out.detach().requires_grad_()) or inputs[-1]
    )
    whole = torch.ones(1, 5, dtype=torch.bool)
    for causal in (True, False):
        state = pool_tokens(decoder_states(model, ids, whole, causal=causal), first, "last")
        (gradient,) = torch.autograd.grad(state.sum(), inputs[-1])
        reached = gradient[0, -1].abs().max().item()
        assert reached == 0 if causal else reached > 1e-6


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_change_a_vector(pooling, causal):
    model = decoder()
    ids = torch.tensor([[3, 1, 4, 0, 0], [9, 2, 6, 5, 3]])
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    found = embed(model, ids, mask, causal=causal, pooling=pooling)
    alone = embed(model, ids[:1, :3], mask[:1, :3], causal=causal, pooling=pooling)
    torch.testing.assert_close(found[:1], alone, rtol=0, atol=1e-10)


def test_the_four_encoders_agree_on_one_token_and_on_no_longer_text():
    model = decoder()
    for length in (1, 4):
        ids, mask = (
            torch.tensor([[3, 1, 4, 1]])[:, :length],
            torch.ones(1, length, dtype=torch.bool),
        )
        found = [
            embed(model, ids, mask, causal=c, pooling=p)
            for c in (True, False)
            for p in ("mean", "last")
        ]
        gaps = [(a - b).abs().max().item() for i, a in enumerate(found) for b in found[:i]]
        assert max(gaps) < 1e-12 if length == 1 else min(gaps) > 1e-3


def test_a_vector_is_the_plain_mean_of_all_tokens():
    model = decoder()
    ids, mask = torch.tensor([[3, 1, 4]]), torch.ones(1, 3, dtype=torch.bool)
    model.config.is_causal = False
    own = model(ids).last_hidden_state
    del model.config.is_causal
    torch.testing.assert_close(embed(model, ids, mask), own.mean(1), rtol=0, atol=1e-10)


def test_instruction():
    assert instruct("find the definition", "harp") == "Instruct: find the definition Query: harp"


# Focal reweighting --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "mined", "width"), SHAPES)
def test_gamma_zero_without_mixing_is_cross_entropy(batch, mined, width, seed):
    """The official layout: each answer before its own negatives, target i (1 + mined)."""
    queries, documents, negatives = batch_of(batch, mined, width, seed)
    log_p = answer_log_probability(cosine_logits(queries, documents, 0.02))
    found = weighted_loss(log_p, focal_weights(log_p, 0.0))
    interleaved = torch.cat([documents[:batch, None], negatives], 1).flatten(0, 1)
    scores = F.normalize(queries, dim=-1) @ F.normalize(interleaved, dim=-1).T / 0.02
    wanted = F.cross_entropy(scores, torch.arange(batch) * (1 + mined))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_detached_gradient_of_a_query_is_its_weight_times_that_of_info_nce(gamma):
    queries, documents, _ = batch_of(5, 3, 7)
    queries.requires_grad_()

    def gradient(use):
        log_p = answer_log_probability(cosine_logits(queries, documents, 0.1))
        return torch.autograd.grad(use(log_p), queries)[0], log_p.detach()

    plain, log_p = gradient(lambda lp: -lp.mean())
    focal, _ = gradient(lambda lp: weighted_loss(lp, focal_weights(lp, gamma)))
    torch.testing.assert_close(
        focal, (1 - log_p.exp())[:, None] ** gamma * plain, rtol=1e-9, atol=1e-12
    )
    through, _ = gradient(lambda lp: weighted_loss(lp, focal_weights(lp, gamma, detach=False)))
    assert (through - focal).abs().max() > 1e-3


def test_weights_lie_in_0_1_and_fall_with_the_probability():
    p = torch.linspace(1e-6, 1, 50, dtype=torch.float64)
    weights = focal_weights(p.log(), 0.5)
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert (weights.diff() < 0).all()
    torch.testing.assert_close(weights[:-1], (1 - p[:-1]).sqrt())
    assert weights[-1] < 1e-100


def test_certain_answers_cost_nothing_and_have_a_finite_gradient():
    log_p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for detach in (True, False):
        loss = weighted_loss(log_p, focal_weights(log_p, 0.5, detach=detach))
        (gradient,) = torch.autograd.grad(loss, log_p)
        assert loss.item() == 0
        assert gradient.isfinite().all()


def test_the_loss_is_divided_by_the_batch():
    log_p, weights = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25])
    assert weighted_loss(log_p, weights).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="negative"):
        focal_weights(log_p, -1.0)


# Mixing -------------------------------------------------------------------------------------------


def test_pair_weights_are_of_two_different_negatives_with_a_beta_2_2_share():
    weights = pair_weights(20_000, 3, torch.Generator().manual_seed(0))
    used = weights > 0
    assert (used.sum(1) == 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(20_000))
    assert (used.float().mean(0) - 2 / 3).abs().max() < 0.01
    shares = weights[used]  # lambda and 1 - lambda, both Beta(2, 2)
    assert shares.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert shares.var().item() == pytest.approx(0.05, abs=0.001)
    with pytest.raises(ValueError, match="two negatives"):
        pair_weights(4, 1, torch.Generator())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "mined", "width"), SHAPES)
def test_mixtures_have_length_one_and_are_combinations_of_unit_vectors(batch, mined, width, seed):
    queries, _, negatives = batch_of(batch, mined, width, seed)
    pair = pair_weights(batch, mined, torch.Generator().manual_seed(seed)).double()
    weights = torch.stack([pair, list_weights(queries, negatives)], 1)
    mixed = mix(negatives, weights)
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(batch, 2, dtype=torch.float64))
    unit = F.normalize(negatives, dim=-1)
    for i in range(batch):
        for k in range(2):
            wanted = sum(w * n for w, n in zip(weights[i, k], unit[i], strict=True))
            torch.testing.assert_close(mixed[i, k], wanted / wanted.norm())


def test_a_share_of_one_gives_a_negative_again_and_z_grows_by_its_term():
    queries, documents, negatives = batch_of(4, 3, 6)
    logits = cosine_logits(queries, documents, 0.1)
    which, rows = torch.tensor([0, 2, 1, 0]), torch.arange(4)
    only = F.one_hot(which, 3).double()[:, None]
    more = add_own(logits, queries, mix(negatives, only), 0.1)
    term = logits[rows, 4 + 3 * rows + which].exp()  # the mined negative, as it stands in the batch
    torch.testing.assert_close(more.exp().sum(1), logits.exp().sum(1) + term)
    assert (answer_log_probability(more) < answer_log_probability(logits)).all()


def test_list_weights_prefer_the_similar_and_are_constants():
    queries, _, negatives = batch_of(3, 4, 6)
    cosines = F.cosine_similarity(queries[:, None], negatives, dim=-1)
    sharp = list_weights(queries, negatives, temperature=1e-4)
    torch.testing.assert_close(sharp, F.one_hot(cosines.argmax(1), 4).double())
    torch.testing.assert_close(list_weights(queries, negatives, 0.05), (cosines / 0.05).softmax(1))
    negatives.requires_grad_()
    queries.requires_grad_()
    assert not list_weights(queries, negatives).requires_grad
    pair = pair_weights(3, 4, torch.Generator().manual_seed(0)).double()
    (gradient,) = torch.autograd.grad(mix(negatives, pair[:, None])[..., 0].sum(), negatives)
    assert torch.equal(gradient.abs().sum(-1) > 0, pair > 0)  # both parents, and no other


# Distillation and Matryoshka ----------------------------------------------------------------------


def test_distillation_is_the_divergence_and_ignores_shifts():
    teacher, student = 3 * normal(5, 7), 3 * normal(5, 7, seed=1)
    found = distillation_loss(teacher, student)
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(1).mean())
    assert found > 0.1
    assert distillation_loss(teacher, teacher).abs() < 1e-12
    shifted = distillation_loss(teacher + 5, student - normal(5, 1, seed=2))
    torch.testing.assert_close(shifted, found)


def test_distillation_with_candidates_left_out():
    teacher, student = normal(3, 6), normal(3, 6, seed=1).requires_grad_()
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[:, 4:] = True
    found = distillation_loss(
        teacher.masked_fill(hidden, -math.inf), student.masked_fill(hidden, -math.inf)
    )
    torch.testing.assert_close(found, distillation_loss(teacher[:, :4], student[:, :4]))
    assert torch.autograd.grad(found, student)[0].isfinite().all()


def test_matryoshka_is_the_weighted_sum_over_slices_of_unnormalised_vectors():
    queries, documents, _ = batch_of(4, 2, 8)

    def loss(q, d):
        return -answer_log_probability(cosine_logits(q, d, 0.1)).mean()

    whole = matryoshka_loss(loss, (queries, documents), [8], [1.0])
    torch.testing.assert_close(whole, loss(queries, documents))
    found = matryoshka_loss(loss, (queries, documents), [8, 3], [1.0, 0.25])
    sliced = loss(F.normalize(queries[:, :3], dim=-1), F.normalize(documents[:, :3], dim=-1))
    torch.testing.assert_close(found, whole + 0.25 * sliced)
    for dims, weights in (([8, 4], [1.0]), ([9], [1.0]), ([0], [1.0])):
        with pytest.raises(ValueError, match="one weight for each dim"):
            matryoshka_loss(loss, (queries, documents), dims, weights)


# Data rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_mined_negatives_come_from_the_range_and_are_never_the_answer(seed):
    scores, answers = normal(30, 40, seed=seed), torch.arange(30)
    mined = mine_negatives(scores, answers, 4, (5, 15), torch.Generator().manual_seed(seed))
    assert not (mined == answers[:, None]).any()
    for i in range(30):
        order = [j for j in scores[i].argsort(descending=True).tolist() if j != i]
        assert set(mined[i].tolist()) <= set(order[5:15])
        assert len(set(mined[i].tolist())) == 4
    found = set()
    for row, own in zip(scores, mined, strict=True):
        found |= set((row.argsort(descending=True) == own[:, None]).nonzero()[:, 1].tolist())
    assert len(found) >= 8  # drawn from the whole range
    for ranks in ((5, 8), (-1, 10), (30, 40)):
        with pytest.raises(ValueError, match="do not fit"):
            mine_negatives(scores, answers, 4, ranks, torch.Generator())


def test_the_consistency_filter():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    answers = torch.tensor([0, 1, 2])
    assert ranking_consistent(scores, answers, 1).tolist() == [True, False, False]
    assert ranking_consistent(scores, answers, 2).tolist() == [True, True, False]
    assert ranking_consistent(scores, answers, 3).all()
