"""FILIP's similarities, loss and choice of tokens: by brute force, by hand and by invariance."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from reattend.training.contrastive import shared_targets, symmetric_info_nce
from reattend.vision_language.filip import (
    best_patches,
    best_words,
    filip_loss,
    gathered,
    late_similarity,
    prompt_ensemble,
    telling_tokens,
)

SIZES = [(3, 5, 4, 7), (5, 1, 1, 3), (7, 9, 6, 5)]  # pairs, patches, words, joint


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def sample(pairs=5, patches=7, words=6, joint=4, seed=0):
    """Patches, words and a mask with captions of different lengths."""
    lengths = torch.arange(pairs) % words + 1
    mask = torch.arange(words) < lengths[:, None]
    return unit(pairs, patches, joint, seed=seed), unit(pairs, words, joint, seed=seed + 1), mask


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_similarities_by_brute_force(sizes, seed):
    patches, words, mask = sample(*sizes, seed=seed)
    by_patches, by_words = late_similarity(patches, words, mask, chunk=2)
    for i, j in itertools.product(range(len(patches)), range(len(words))):
        real = [r for r in range(words.shape[1]) if mask[j, r]]
        table = [[float(v @ words[j, r]) for r in real] for v in patches[i]]
        expected = sum(max(row) for row in table) / len(table)
        assert by_patches[i, j].item() == pytest.approx(expected, abs=1e-12)
        expected = sum(max(column) for column in zip(*table, strict=True)) / len(real)
        assert by_words[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_one_token_each_is_clip():
    image, text = unit(6, 1, 5), unit(6, 1, 5, seed=1)
    mask = torch.ones(6, 1, dtype=torch.bool)
    cosines = image[:, 0] @ text[:, 0].T
    for similarity in late_similarity(image, text, mask):
        torch.testing.assert_close(similarity, cosines, atol=1e-12, rtol=0)
    logits, own = 14.3 * cosines, torch.arange(6)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    loss = filip_loss(image, text, mask, torch.tensor(14.3, dtype=torch.float64))
    assert loss.item() == pytest.approx(clip.item(), abs=1e-12)


def test_each_way_has_its_own_similarity():
    """Rows of s^I and columns of s^T: not one matrix for both, and neither transposed."""
    patches, words, mask = sample()
    by_patches, by_words = late_similarity(patches, words, mask)
    own = torch.arange(5)
    expected = F.cross_entropy(9 * by_patches, own) + F.cross_entropy(9 * by_words.T, own)
    loss = filip_loss(patches, words, mask, torch.tensor(9.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected.item() / 2, abs=1e-12)
    for wrong in (by_patches, by_words):
        both = F.cross_entropy(9 * wrong, own) + F.cross_entropy(9 * wrong.T, own)
        assert abs(both.item() / 2 - loss.item()) > 1e-3


def loss_and_gradients(patches, words, mask, **options):
    inputs = patches.clone().requires_grad_(), words.clone().requires_grad_()
    loss = filip_loss(*inputs, mask, torch.tensor(14.3, dtype=torch.float64), **options)
    return loss, torch.autograd.grad(loss, inputs)


def test_padding_changes_nothing():
    patches, words, mask = sample()
    loss, gradients = loss_and_gradients(patches, words, mask)
    # Padding that would win every maximum if it took part.
    longer = torch.cat([words, 50 * unit(5, 4, 4, seed=9)], 1)
    wider = F.pad(mask, (0, 4))
    padded_loss, padded = loss_and_gradients(patches, longer, wider)
    assert padded_loss.item() == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(padded[0], gradients[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(padded[1][:, :6], gradients[1], atol=1e-12, rtol=0)
    assert not padded[1][~wider].any()
    pairs = zip(
        late_similarity(patches, longer, wider), late_similarity(patches, words, mask), strict=True
    )
    for longer_one, one in pairs:
        torch.testing.assert_close(longer_one, one, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_change_nothing(chunk):
    patches, words, mask = sample(pairs=7)
    whole, gradients = loss_and_gradients(patches, words, mask, chunk=100)
    loss, cut = loss_and_gradients(patches, words, mask, chunk=chunk)
    assert loss.item() == pytest.approx(whole.item(), abs=1e-12)
    for mine, theirs in zip(cut, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_products_are_not_kept():
    """No tensor with an entry for every picture, patch, text and word is held for the backward pass."""
    patches, words, mask = sample(pairs=12, patches=11, words=10)
    patches.requires_grad_()
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        late_similarity(patches, words, mask, chunk=2)
    products = 12 * 11 * 12 * 10
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    floats = [t for t in kept if t.is_floating_point()]
    assert max(t.numel() for t in floats) < products / 6
    assert sum(storages.values()) < 8 * products / 2


def test_invariances():
    patches, words, mask = sample()
    expected = late_similarity(patches, words, mask)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    turned = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    cases = {
        "patches twice": (torch.cat([patches, patches], 1), words, mask),
        "patches permuted": (patches[:, order], words, mask),
        "words permuted": (patches, words[:, turned], mask[:, turned]),
    }
    for name, inputs in cases.items():
        for mine, theirs in zip(late_similarity(*inputs), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0, msg=name)


def test_range_and_identity():
    patches, words, mask = sample(pairs=4, patches=3)
    for similarity in late_similarity(patches, words, mask):
        assert similarity.abs().max() <= 1
    everything = torch.cat([patches, words], 1)
    all_real = torch.ones(4, 9, dtype=torch.bool)
    by_patches, _ = late_similarity(patches, everything, all_real)
    torch.testing.assert_close(by_patches.diagonal(), torch.ones(4).double(), atol=1e-12, rtol=0)


def test_sum_is_mean_times_length_and_ranks_alike():
    patches, words, mask = sample(seed=4)
    by_patches, by_words = late_similarity(patches, words, mask)
    summed_patches, summed_words = late_similarity(patches, words, mask, reduce="sum")
    torch.testing.assert_close(summed_patches, 7 * by_patches, atol=1e-12, rtol=0)
    torch.testing.assert_close(summed_words, by_words * mask.sum(1), atol=1e-12, rtol=0)
    assert torch.equal(summed_patches.argsort(1), by_patches.argsort(1))
    assert torch.equal(summed_words.argsort(0), by_words.argsort(0))


def test_gradient_reaches_winning_words_alone():
    patches, words, mask = sample(pairs=3)
    words.requires_grad_()
    by_patches, _ = late_similarity(patches, words, mask)
    (gradient,) = torch.autograd.grad(by_patches[1, 2], words)
    winners = (patches[1] @ words[2].T).masked_fill(~mask[2], -9).argmax(1).unique()
    touched = gradient.abs().sum(-1).nonzero()
    assert touched[:, 0].unique().tolist() == [2]
    assert touched[:, 1].tolist() == winners.tolist()


def test_repeated_captions_share_the_target():
    patches, words, mask = sample(pairs=4)
    words, mask = words[[0, 1, 0, 3]], mask[[0, 1, 0, 3]]
    targets = shared_targets(torch.tensor([5, 6, 5, 8]))
    loss = filip_loss(patches, words, mask, torch.tensor(9.0, dtype=torch.float64), targets)
    by_patches, by_words = late_similarity(patches, words, mask)
    expected = symmetric_info_nce(9 * by_patches, 9 * by_words, targets)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    # Two equal texts can never be told apart: at best log 2 is lost on each of them.
    assert loss.item() >= 0.5 * torch.log(torch.tensor(2.0)).item()


def test_all_tokens_is_the_plain_loss():
    patches, words, mask = sample()
    kept = telling_tokens(patches, words, 1.0, other_mask=mask)
    assert torch.equal(kept, torch.arange(7).expand(5, -1))
    assert torch.equal(gathered(patches, kept), patches)


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 4), (0.05, 1), (0.99, 8)])
@pytest.mark.parametrize("local", [None, 2, 3])
def test_kept_tokens_by_hand(share, count, local):
    patches, words, mask = sample(pairs=5, patches=9)
    kept = telling_tokens(patches, words, share, other_mask=mask, local=local)
    assert kept.shape == (5, count)
    workers = torch.arange(5) // (local or 5)
    for i in range(5):
        others = torch.cat([words[j][mask[j]] for j in range(5) if workers[j] == workers[i]])
        best = (patches[i] @ others.T).max(1).values
        assert kept[i].tolist() == sorted(best.topk(count).indices.tolist())


def test_padding_is_kept_last_and_ties_go_to_the_earlier():
    patches, words, mask = sample()
    longer = torch.cat([100 * unit(5, 1, 4, seed=8), words], 1)
    own = F.pad(mask, (1, 0))
    kept = telling_tokens(longer, patches, 1 / 7, mask=own)
    assert own.gather(1, kept).all()
    same = unit(1, 1, 4).expand(2, 6, -1)
    assert telling_tokens(same, words[:2], 0.5).tolist() == [[0, 1, 2]] * 2


def test_choice_has_no_gradient_but_kept_tokens_have():
    patches, words, mask = sample()
    patches.requires_grad_()
    kept = telling_tokens(patches, words, 0.5, other_mask=mask)
    filip_loss(gathered(patches, kept), words, mask, torch.tensor(9.0).double()).backward()
    reached = patches.grad.abs().sum(-1) > 0
    outside = torch.ones_like(reached).scatter(1, kept, False)
    assert reached.any(1).all()
    assert not (reached & outside).any()


def test_ensemble_averages_similarities():
    patches = unit(4, 5, 6)
    prompts = unit(3 * 2, 7, 6, seed=1)
    mask = torch.ones(6, 7, dtype=torch.bool)
    by_patches, _ = late_similarity(patches, prompts, mask)
    scores = by_patches.unflatten(1, (3, 2))
    torch.testing.assert_close(prompt_ensemble(scores), (scores[..., 0] + scores[..., 1]) / 2)
    torch.testing.assert_close(prompt_ensemble(scores[..., :1]), scores[..., 0])


def test_alignment_by_hand():
    patches, words, mask = sample()
    chosen, pointed = best_words(patches, words, mask), best_patches(patches, words)
    for i in range(5):
        table = patches[i] @ words[i].T
        assert pointed[i].tolist() == table.argmax(0).tolist()
        assert chosen[i].tolist() == table[:, mask[i]].argmax(1).tolist()


def test_refusals():
    patches, words, mask = sample()
    with pytest.raises(ValueError, match="no word that takes part"):
        late_similarity(patches, words, mask & (torch.arange(5) > 0)[:, None])
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must lie in"):
            telling_tokens(patches, words, share)
