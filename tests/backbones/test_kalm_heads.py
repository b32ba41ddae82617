"""What the study of KaLM-Embedding trains: arms on equal batches, placebos that change only what they should."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from reattend.backbones.trained import kalm_heads
from reattend.backbones.trained.kalm_heads import (
    ARMS,
    BATCH,
    MINED,
    MORE_ARMS,
    Arm,
    Batch,
    Pairs,
    draw,
    fit_head,
    head_batches,
    piece_means,
    untrained_head,
)

WIDTH = 16


def pool(pairs=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randn(pairs, WIDTH, generator=generator)
    queries = documents + torch.randn(pairs, WIDTH, generator=generator)
    return Pairs(queries, documents, queries + 0.1, documents - 0.1)


def one_batch(seed=0):
    drawn = draw(pool(), 70, seed)
    return Batch(drawn, torch.arange(BATCH), torch.Generator().manual_seed(seed))


def loss(arm, batch=None):
    head = untrained_head(WIDTH)
    value = (batch or one_batch()).loss(head, arm)
    (gradient,) = torch.autograd.grad(value, head.weight)
    return value.item(), gradient


def test_a_draw_pairs_queries_with_their_documents_and_differs_by_seed():
    drawn, other = draw(pool(), 70, 0), draw(pool(), 70, 1)
    whole = pool()
    for q, d in zip(drawn.pairs.queries, drawn.pairs.documents, strict=True):
        i = (whole.queries == q).all(1).nonzero().item()
        assert torch.equal(whole.documents[i], d)
    assert not torch.equal(drawn.pairs.queries, other.pairs.queries)
    assert drawn.negatives.shape == (70, MINED)
    assert torch.equal(draw(pool(), 70, 0).negatives, drawn.negatives)


def test_all_arms_of_a_seed_see_the_same_batches():
    drawn = draw(pool(), 70, 3)
    for first, second, _ in zip(
        head_batches(drawn, 3), head_batches(drawn, 3), range(3), strict=False
    ):
        assert torch.equal(first.queries, second.queries)
        assert torch.equal(first.pair, second.pair)
        assert torch.equal(first.order, second.order)


def test_gamma_zero_and_no_more_negatives_is_info_nce_by_hand():
    batch = one_batch()
    scores = F.normalize(batch.queries, dim=-1) @ F.normalize(batch.documents, dim=-1).T / 0.05
    wanted = F.cross_entropy(scores.masked_fill(~batch.counted, -torch.inf), torch.arange(BATCH))
    assert loss(Arm(1e-3), batch)[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_permuted_and_mean_weights_keep_the_mean_weight_but_not_its_place():
    batch = one_batch()
    own, permuted, even = (
        loss(Arm(1e-3, gamma=0.5, weighting=w), batch) for w in ("own", "permuted", "mean")
    )
    plain = loss(Arm(1e-3), batch)
    assert own[0] > permuted[0]  # hard queries keep the large weights
    assert even[0] < plain[0]
    cosine = F.cosine_similarity(even[1].flatten(), plain[1].flatten(), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-5)  # the direction is that of InfoNCE
    assert F.cosine_similarity(permuted[1].flatten(), plain[1].flatten(), dim=0) < 0.9999


@pytest.mark.parametrize("more", ["mixed", "duplicates", "others"])
def test_further_negatives_are_two_a_query_and_raise_the_loss(more):
    batch, head = one_batch(), untrained_head(WIDTH)
    q, d = head(batch.queries), head(batch.documents)
    plain, larger = (batch.logits(q, d, Arm(1e-3, more=m)) for m in ("", more))
    assert larger.shape[1] == plain.shape[1] + 2
    assert loss(Arm(1e-3, more=more), batch)[0] > loss(Arm(1e-3), batch)[0]
    own = plain[:, BATCH:].unflatten(1, (BATCH, MINED))[torch.arange(BATCH), torch.arange(BATCH)]
    copies = (larger[:, -2:, None] - own[:, None]).abs().min(-1).values
    assert (copies.max() < 1e-4) == (more == "duplicates")


def test_a_dealt_teacher_keeps_the_answer_and_moves_the_rest():
    batch = one_batch()
    own, dealt = (batch.teacher_logits(Arm(1e-3, teacher=t)) for t in ("own", "dealt"))
    assert torch.equal(own.diagonal(), dealt.diagonal())
    assert torch.equal(own.isneginf(), dealt.isneginf())
    torch.testing.assert_close(own.sort(1).values, dealt.sort(1).values)
    assert ((own == dealt).float().mean() < 0.1).item()


def test_distillation_from_the_head_itself_has_no_gradient():
    whole = pool()
    same = Pairs(whole.queries, whole.documents, whole.queries, whole.documents)
    batch = Batch(draw(same, 70, 0), torch.arange(BATCH), torch.Generator().manual_seed(0))
    value, gradient = loss(Arm(1e-3, contrast=0.0, distil=1.0), batch)
    assert abs(value) < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("name", [*ARMS, *MORE_ARMS])
def test_every_arm_learns_its_training_pairs(name):
    arm = {**ARMS, **MORE_ARMS}[name]
    drawn = draw(pool(), 70, 0)
    head, log = fit_head(drawn, arm, 30, 0)
    assert len(log.losses) == 30 * arm.steps
    before, after = (arm_loss(h, drawn, arm) for h in (untrained_head(WIDTH), head))
    assert after < before


def arm_loss(head, drawn, arm):
    return next(head_batches(drawn, 0)).loss(head, arm).item()


def test_piece_means_are_of_the_pieces_alone():
    class Splitter:
        def __call__(self, texts, **how):
            assert how["add_special_tokens"] is False

            class Made:
                input_ids = [[int(c) for c in text] for text in texts]  # noqa: RUF012

            return Made()

    found = piece_means(Splitter(), torch.eye(3), ["01", "2", "0012"])
    assert found.tolist() == [[0.5, 0.5, 0], [0, 0, 1], [0.5, 0.25, 0.25]]


def test_the_build_gives_the_same_numbers_twice(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        kalm_heads.build(tmp_path / name, "smoke")
    for file in ("heads", "vectors"):
        first, second = (
            load_file(tmp_path / n / f"{file}.safetensors") for n in ("first", "second")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
