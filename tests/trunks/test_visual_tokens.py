"""Token reduction: exact sets and groups, exact costs, and the two sides of keep and recover."""

import math

import pytest
import torch
from torch.nn import functional as F

from reattend.trunks.visual_tokens import (
    DROPPED,
    Reduction,
    cache_bytes,
    even_places,
    kept_count,
    merged_tokens,
    pooled_tokens,
    prefill_multiply_adds,
    reduced_lengths,
    subset,
    top_tokens,
    uniform_tokens,
)

GRID = (5, 7)


def tokens(batch=3, n=35, width=4, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=generator, dtype=torch.double)


def all_reductions(x: torch.Tensor, kept: int) -> dict[str, Reduction]:
    return {
        "top": top_tokens(x[..., 0], kept),
        "uniform": uniform_tokens(GRID, kept, len(x)),
        "pooled": pooled_tokens(GRID, kept, len(x)),
        "merged": merged_tokens(x, kept),
    }


@pytest.mark.parametrize("seed", range(3))
def test_top_tokens_are_the_best_in_raster_order(seed):
    scores = tokens(seed=seed)[..., 0]
    found = top_tokens(scores, 9)
    for row, places in zip(scores, found.places, strict=True):
        best = sorted(range(35), key=lambda j: -row[j])[:9]
        assert places.tolist() == sorted(best)


def test_ties_give_exactly_as_many_tokens_as_asked_for_the_first_ones():
    found = top_tokens(torch.full((2, 11), 0.25), 4)
    assert found.places.tolist() == [[0, 1, 2, 3]] * 2
    assert (found.groups != DROPPED).sum(1).tolist() == [4, 4]


def test_a_subset_given_in_any_order_is_kept_in_raster_order():
    x = tokens(2, 6)
    found = subset(torch.tensor([[4, 0, 2], [5, 3, 1]]), 6)
    assert torch.equal(found.keep(x), torch.stack([x[0, [0, 2, 4]], x[1, [1, 3, 5]]]))
    assert found.groups.tolist() == [[0, -1, 1, -1, 2, -1], [-1, 0, -1, 1, -1, 2]]


def test_permuted_patches_permute_the_kept_set():
    x, order = tokens(), torch.randperm(35, generator=torch.Generator().manual_seed(5))
    kept, moved = top_tokens(x[..., 0], 9), top_tokens(x[:, order, 0], 9)
    for a, b in zip(kept.places, moved.places, strict=True):
        assert set(a.tolist()) == set(order[b].tolist())


@pytest.mark.parametrize("kept", [1, 2, 3, 8, 17, 34, 35])
def test_every_reduction_has_the_asked_length_order_and_sizes(kept):
    x = tokens()
    for name, found in all_reductions(x, kept).items():
        assert found.places.shape == (3, kept), name
        assert (found.places.diff(dim=1) > 0).all(), name
        members = kept if name in ("top", "uniform") else 35
        assert found.sizes.sum(1).tolist() == [members] * 3, name
        assert (found.sizes > 0).all(), name
        assert torch.equal(found.groups.gather(1, found.places), torch.arange(kept).expand(3, -1))


def test_keeping_all_tokens_changes_nothing():
    x = tokens()
    for found in all_reductions(x, 35).values():
        assert torch.equal(found.keep(x), x)
        assert torch.equal(found.recover(found.keep(x)), x)


def test_keep_averages_and_recover_copies_or_fills():
    x = torch.tensor([[[1.0], [5.0], [3.0], [7.0]]])
    found = Reduction(torch.tensor([[0, 3]]), torch.tensor([[0, DROPPED, 0, 1]]))
    assert found.keep(x).flatten().tolist() == [2, 7]
    assert found.sizes.tolist() == [[2, 1]]
    assert found.recover(found.keep(x), fill=-9.0).flatten().tolist() == [2, -9, 2, 7]


@pytest.mark.parametrize("kept", [4, 13])
def test_a_token_wise_map_may_come_before_or_after_keeping(kept):
    x, weight = tokens(), tokens(1, 4, 6)[0]
    for name, found in all_reductions(x, kept).items():
        close = torch.allclose(found.keep(x) @ weight, found.keep(x @ weight), atol=1e-12)
        assert close, name


def test_nothing_kept_is_an_empty_sequence():
    found = top_tokens(torch.rand(2, 5), 0)
    assert found.keep(torch.rand(2, 5, 3)).shape == (2, 0, 3)


def test_the_count_of_kept_tokens_is_the_papers():
    removed = (0.25, 0.5, 0.75, 0.9, 0.95)
    assert [kept_count(576, r) for r in removed] == [432, 288, 144, 58, 29]
    assert [kept_count(144, r) for r in (0.0, 0.5, 0.9, 0.95, 1.0)] == [144, 72, 14, 7, 0]


def test_even_places_spread_over_rows_and_columns():
    for kept in range(1, 145):
        places = even_places((12, 12), kept)
        assert len(set(places.tolist())) == kept
        assert (places.diff() > 0).all()
    assert even_places((4, 4), 4).tolist() == [5, 7, 13, 15]
    assert even_places((3, 3), 1).tolist() == [4]
    rows, columns = even_places((12, 12), 7) // 12, even_places((12, 12), 7) % 12
    assert len(set(rows.tolist())) == 3
    assert columns.max() - columns.min() > 6


def test_pooling_joins_the_nearest_place():
    found = pooled_tokens((3, 5), 2, 1)
    assert found.places[0].tolist() == [6, 8]
    assert found.groups.view(3, 5).tolist() == [[0, 0, 0, 1, 1]] * 3


def test_merging_joins_the_same_things():
    """Four kinds of orthogonal tokens in a row: merged down to four, each kind is one token."""
    kinds = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 3, 3])
    x = F.one_hot(kinds).double()[None] * torch.linspace(1, 2, 10, dtype=torch.double)[:, None]
    found = merged_tokens(x, 4)
    joined = found.groups[0]
    assert all((joined[kinds == k] == joined[kinds == k][0]).all() for k in range(4))
    for k in range(4):
        assert torch.allclose(found.keep(x)[0, joined[kinds == k][0]], x[0, kinds == k].mean(0))


def test_one_round_of_merging_is_bipartite_matching_done_by_hand():
    x = tokens(1, 7, 3, seed=4)
    unit = F.normalize(x[0], dim=-1)
    pairs = sorted(
        ((max((unit[a] @ unit[b]).item(), -2), a, b) for a in (0, 2, 4, 6) for b in (1, 3, 5)),
        reverse=True,
    )
    best = {}
    for cosine, a, b in pairs:
        best.setdefault(a, (cosine, b))
    (first, second), *_ = [sorted(best, key=lambda a: -best[a][0])[:2]]
    found = merged_tokens(x, 5)
    places = [i for i in range(7) if i not in (first, second)]
    assert found.places[0].tolist() == places
    for gone in (first, second):
        assert places[found.groups[0, gone]] == best[gone][1]


def test_refusals_name_the_cure():
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        top_tokens(torch.rand(1, 5), 6)
    with pytest.raises(ValueError, match="does not hold 17"):
        even_places((4, 4), 17)
    with pytest.raises(ValueError, match="cannot merge 5 tokens into 0"):
        merged_tokens(torch.rand(1, 5, 2), 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        kept_count(10, 95.0)
    with pytest.raises(ValueError, match="5 of 4 layers"):
        reduced_lengths(10, 5, 4, 5)


# --- cost: LLaVA-NeXT-7B, as reported -------------------------------------------------------------------------------

VICUNA = {"width": 4096, "hidden": 11008}


def test_cost_of_one_small_layer_by_hand():
    assert prefill_multiply_adds([3], 2, 5) == 4 * 3 * 4 + 2 * 9 * 2 + 3 * 3 * 2 * 5
    assert prefill_multiply_adds([3], 2, 5, gated=False) == 4 * 3 * 4 + 2 * 9 * 2 + 2 * 3 * 2 * 5
    assert prefill_multiply_adds([3], 2, 5, earlier=4) == 4 * 3 * 4 + 2 * 3 * 7 * 2 + 3 * 3 * 2 * 5
    assert prefill_multiply_adds([3, 4], 2, 5) == sum(
        prefill_multiply_adds([n], 2, 5) for n in (3, 4)
    )


@pytest.mark.parametrize(("removed", "tera"), [(0.0, 43.58), (0.75, 11.51), (0.95, 3.80)])
def test_prefill_is_the_papers_once_text_is_added(removed, tera):
    """The reported numbers are twice the multiply-adds of five tiles, and 1.9 T for the text beside each."""
    kept = 5 * kept_count(576, removed)
    picture = 2e-12 * prefill_multiply_adds(reduced_lengths(2880, kept, 32), **VICUNA)
    assert picture + 1.9 == pytest.approx(tera, abs=0.04)


def test_cache_is_the_papers():
    """0.5 MB a token in half precision; FastV keeps all tokens in K = 2 of 32 layers."""
    mega = 2**20

    def cache(removed, full):
        kept = 5 * kept_count(576, removed)
        return cache_bytes(reduced_lengths(2880, kept, 32, full), 4096) / mega

    assert cache(0.0, 0) == 1440
    assert cache(0.95, 0) == 72.5
    assert [cache(r, 2) for r in (0.25, 0.5, 0.75)] == [1102.5, 765.0, 427.5]
    assert cache(0.95, 2) == pytest.approx(158.59, rel=0.005)
    assert math.isclose(cache(0.95, 2), (2 * 1440 + 30 * 72.5) / 32)
