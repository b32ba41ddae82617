"""Both forms of one encoder: orders, labels, copies, the development pairs that choose."""

import pytest
import torch

from reattend.metrics import spearman
from reattend.studies.two_forms import PairEncoder, Recipe, TwoForms, shared_copy
from reattend.text_matching.trans_encoder import SegmentCrossEncoder, bi_labels, segment_masks
from reattend.trunks.encoders import BiEncoder, tokenise

A = [f"a {n} of the {k}" for n in ("drink", "bird", "tool", "song") for k in ("sea", "old house")]
B = A[1:] + A[:1]
PAIRS = {
    "train": (A, B, torch.linspace(0, 1, 8)),
    "validation": (A[:5], B[3:], torch.tensor([0.1, 0.9, 0.3, 0.2, 0.5])),
    "human": (["dog", "river"], ["cat", "bank"], torch.tensor([0.8, 0.4])),
}
RECIPE = Recipe(contrast=(1e-3, 1.0, 4), cross=(1e-3, 1.0, 4), bi=(1e-3, 1.0, 4), checks=2)


@pytest.fixture(scope="module")
def encoder():
    return PairEncoder(2, 1, PAIRS, length=12)


def test_logits_are_those_of_each_order(encoder):
    torch.manual_seed(0)
    cross = SegmentCrossEncoder(encoder.raw).eval()
    for order, (a, b) in {"given": (A, B), "swapped": (B, A)}.items():
        pairs = tokenise(encoder.tokenizer, a, b, length=24)
        with torch.no_grad():
            expected = cross(pairs, *segment_masks(pairs))
        # States are stored in half precision.
        torch.testing.assert_close(
            encoder.logits(cross, "train", order), expected, rtol=1e-2, atol=3e-3
        )
    assert len(encoder.logits(cross, "human")) == 2


def test_cosines_and_development_score(encoder):
    bi = BiEncoder(encoder.raw).eval()
    a, b, gold = PAIRS["validation"]
    with torch.no_grad():
        u, v = (bi(tokenise(encoder.tokenizer, texts, length=12)) for texts in (a, b))
    expected = torch.nn.functional.cosine_similarity(u, v)
    torch.testing.assert_close(encoder.cosines(bi, "validation"), expected, rtol=1e-3, atol=1e-3)
    assert encoder.development(bi) == pytest.approx(spearman(expected.numpy(), gold.numpy()))


def test_training_starts_anew_and_leaves_its_start_alone(encoder):
    start = encoder.contrast(BiEncoder(encoder.raw), RECIPE, seed=0)
    assert not torch.equal(
        encoder.cosines(start, "train"), encoder.cosines(BiEncoder(encoder.raw), "train")
    )
    before = encoder.cosines(start, "train")
    student = TwoForms(encoder, start, RECIPE, seed=3)
    labels = student.label_with_bi(start)
    torch.testing.assert_close(labels, bi_labels(before))
    cross, again = (student.train_cross(labels, 0) for _ in range(2))
    torch.testing.assert_close(encoder.logits(cross, "train"), encoder.logits(again, "train"))
    said = student.label_with_cross(cross)
    assert said.shape == (8,)
    assert said.min() > 0
    assert said.max() < 1
    bi = student.train_bi(said, 0)
    assert not torch.equal(encoder.cosines(bi, "train"), before)
    torch.testing.assert_close(encoder.cosines(start, "train"), before, rtol=0, atol=0)


def test_more_contrast_keeps_the_checkpoint_that_development_pairs_prefer(encoder):
    start = BiEncoder(encoder.raw)
    scores = iter([1.0, 0.0])
    first_only = PairEncoder(2, 1, PAIRS, length=12)
    first_only.development = lambda _: next(scores)
    kept = first_only.contrast(start, RECIPE, 0, passes=1.0)
    last = encoder.contrast(start, RECIPE, 0)  # the same steps, without a choice
    assert not torch.equal(encoder.cosines(kept, "train"), encoder.cosines(last, "train"))


def test_copies_share_frozen_weights_alone(encoder):
    made = shared_copy(encoder.raw)
    for own, other in zip(made.parameters(), encoder.raw.parameters(), strict=True):
        assert (own is other) == (not other.requires_grad)
