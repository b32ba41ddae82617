"""What the study of KaLM-Embedding trains: arms on equal batches, placebos that change only what they should."""

import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import TruncatedSVD
from torch.nn import functional as F

from reattend.backbones.pretrained import minilm, mpnet
from reattend.backbones.trained import kalm_heads
from reattend.backbones.trained.kalm_heads import (
    ARMS,
    BATCH,
    DISTILLED,
    FIRST_SEED,
    MINED,
    MORE_ARMS,
    SETTINGS,
    Arm,
    Batch,
    Pairs,
    arms_of,
    draw,
    fit_head,
    head_batches,
    piece_means,
    principal_axes,
    taught_vectors,
    untrained_head,
)
from reattend.training.contrastive import answer_log_probability

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


def test_permuted_weights_are_the_same_weights_on_other_queries():
    batch = one_batch()
    own, permuted = (loss(Arm(1e-3, gamma=0.5, permuted=p), batch) for p in (False, True))
    assert own[0] > permuted[0]  # hard queries keep the large weights
    head = untrained_head(WIDTH)
    log_p = answer_log_probability(
        batch.logits(head(batch.queries), head(batch.documents), Arm(1e-3))
    )
    weights = (1 - log_p.exp()).sqrt()
    assert own[0] == pytest.approx(-(weights * log_p).mean().item(), rel=1e-5)
    assert permuted[0] == pytest.approx(-(weights[batch.order] * log_p).mean().item(), rel=1e-5)


@pytest.mark.parametrize("more", ["mixed", "duplicates"])
def test_further_negatives_are_two_a_query_and_raise_the_loss(more):
    batch, head = one_batch(), untrained_head(WIDTH)
    q, d = head(batch.queries), head(batch.documents)
    plain, larger = (batch.logits(q, d, Arm(1e-3, more=m)) for m in ("", more))
    assert larger.shape[1] == plain.shape[1] + 2
    assert loss(Arm(1e-3, more=more), batch)[0] > loss(Arm(1e-3), batch)[0]
    own = plain[:, BATCH:].unflatten(1, (BATCH, MINED))[torch.arange(BATCH), torch.arange(BATCH)]
    copies = (larger[:, -2:, None] - own[:, None]).abs().min(-1).values
    assert (copies.max() < 1e-4) == (more == "duplicates")


def test_pair_wise_mixtures_are_the_first_of_both():
    batch, head = one_batch(), untrained_head(WIDTH)
    q, d = head(batch.queries), head(batch.documents)
    both, alone = (batch.logits(q, d, Arm(1e-3, more=m)) for m in ("mixed", "pairs"))
    torch.testing.assert_close(alone, both[:, :-1])


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


def test_a_start_on_axes_changes_no_cosine_and_puts_most_first():
    x = pool().documents * torch.linspace(0.2, 3, WIDTH)
    axes = principal_axes(x)
    torch.testing.assert_close(axes @ axes.T, torch.eye(WIDTH), rtol=0, atol=1e-5)
    unit = F.normalize(x, dim=-1)
    torch.testing.assert_close(
        (unit @ axes.T) @ (unit @ axes.T).T, unit @ unit.T, rtol=0, atol=1e-5
    )
    reference = TruncatedSVD(3, algorithm="arpack", random_state=0).fit(unit.numpy())
    torch.testing.assert_close(
        axes[:3].abs(), torch.from_numpy(reference.components_.copy()).abs(), rtol=0, atol=1e-4
    )


def test_further_seeds_train_what_is_distilled_alone():
    setting = SETTINGS["cpu"]
    trained = [arms_of(FIRST_SEED + n, setting) for n in range(setting.seeds + setting.further)]
    assert set(trained[0]) == {*ARMS, *MORE_ARMS}
    assert set(trained[setting.few]) == set(ARMS)
    assert [set(arms) == set(DISTILLED) for arms in trained] == [False] * 5 + [True] * 7


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
    tokenizer, _ = minilm.load(1)
    table = torch.arange(len(tokenizer))[:, None].float()
    found = piece_means(tokenizer, table, ["harp", "a stringed harp"])
    pieces = [
        tokenizer.convert_tokens_to_ids(p) for p in (["harp"], ["a", "string", "##ed", "harp"])
    ]
    assert found[:, 0].tolist() == pytest.approx([sum(p) / len(p) for p in pieces])


def test_the_teacher_reads_each_text_alone_and_hardly_minds_half_precision():
    tokenizer, model = mpnet.load(2)
    texts = ["harp", "a large instrument with strings to pluck", "someone who plays it"]
    found = taught_vectors(tokenizer, model, texts)
    with torch.inference_mode():
        for text, vector in zip(texts, found, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            torch.testing.assert_close(vector, alone, rtol=0, atol=1e-4)
    half = taught_vectors(tokenizer, model.bfloat16(), texts)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, found).min() > 0.999


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
