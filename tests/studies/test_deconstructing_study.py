"""What is asked of simplified attention: skipped layers, common embeddings, maps, indicators, costs."""

import math
from functools import partial

import pytest
import torch

from reattend.language_modeling.deconstructing_attention import (
    NonApproximate,
    StaticEmbQK,
    StreamQK,
    StreamTrunk,
    TokenMLP,
    softmax_maps,
)
from reattend.studies.deconstructing_attention import (
    common_embeddings,
    counted_cost,
    indicators,
    logits_by_layer,
    maps_by_layer,
    mixer_calls,
    paper_cost,
    seen_once,
    skipping,
)
from reattend.trunks.language import GatedFeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

EXACT = {"rtol": 0, "atol": 1e-10}
WIDTH, HEADS = 12, 3


def model(mixers=None, kind=Trunk, **more):
    torch.manual_seed(0)
    mixers = mixers or [partial(SoftmaxAttention, heads=HEADS)] * 3
    feed_forward = partial(GatedFeedForward, hidden=20)
    built = kind(
        11, WIDTH, mixers, feed_forward=feed_forward, embedding_std=0.4, norm="rms", **more
    )
    return built.double().eval()


def tokens(rows=3, length=9, seed=1):
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- taking parts out -----------------------------------------------------------------------


def test_a_skipped_layer_is_a_stack_without_it():
    whole, text = model(), tokens()
    before = whole(text)
    shorter = model(mixers=[partial(SoftmaxAttention, heads=HEADS)])
    kept = {n.replace("blocks.1", "blocks.0"): t for n, t in whole.state_dict().items()}
    kept = {n: t for n, t in kept.items() if n in shorter.state_dict()}
    kept |= {
        n.replace("blocks.1", "blocks.0"): t
        for n, t in whole.state_dict().items()
        if "blocks.1" in n
    }
    shorter.load_state_dict(kept)
    with skipping(whole, [0, 2]):
        torch.testing.assert_close(whole(text), shorter(text), **EXACT)
    torch.testing.assert_close(whole(text), before, **EXACT)


def test_a_skipped_mixer_leaves_the_feed_forward_part():
    whole, text = model(), tokens()
    with skipping(whole, [1], "mixer"):
        found = whole(text)
    with torch.no_grad():
        whole.blocks[1].mixer.out.weight.zero_()
    torch.testing.assert_close(found, whole(text), **EXACT)


def test_common_embeddings_are_the_mean_in_every_place():
    static, text = model([partial(StaticEmbQK, heads=HEADS)] * 2), tokens()
    whole = static(text)
    with common_embeddings(static):
        calls = mixer_calls(static, text)
        changed = static(text)
    expected = static.tokens(text).flatten(0, 1).mean(0).expand(3, 9, -1)
    for _, _, more in calls:
        torch.testing.assert_close(more["embeddings"], expected, **EXACT)
    assert (changed - whole).abs().max() > 0.001
    torch.testing.assert_close(static(text), whole, **EXACT)
    standard = model()
    with common_embeddings(standard):  # nothing is read
        torch.testing.assert_close(standard(text), model()(text), **EXACT)


# --- maps and scores -----------------------------------------------------------------------------


def test_maps_come_from_inside_wrappers_and_are_none_where_nothing_is_mixed():
    def shifted(width):
        return TokenShift(SoftmaxAttention(width, HEADS), width, learned=False)

    maps = maps_by_layer(model([shifted, TokenMLP]), tokens())
    assert maps[0].shape == (3, HEADS, 9, 9)
    assert maps[1] is None
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(3, HEADS, 9).double(), **EXACT)


def test_a_stream_has_one_map_for_all_texts():
    noise = torch.randn(9, WIDTH).double()
    built = model([partial(StreamQK, heads=HEADS)] * 2, kind=StreamTrunk, stream=noise)
    assert [m.shape[0] for m in maps_by_layer(built, tokens())] == [1, 1]


def test_logits_are_what_the_maps_are_the_softmax_of():
    kinds = [partial(SoftmaxAttention, heads=HEADS), partial(NonApproximate, heads=HEADS), TokenMLP]
    built, text = model(kinds), tokens()
    pairs, own, none = logits_by_layer(built, text)
    maps = maps_by_layer(built, text)
    assert none is None
    assert (len(own), len(pairs)) == (3 * HEADS * 9, 3 * HEADS * 45)
    rows = torch.full((3, HEADS, 9, 9), float("-inf")).double()
    rows[torch.ones_like(rows).tril() == 1] = pairs
    torch.testing.assert_close(rows.softmax(-1), maps[0], **EXACT)
    scores = own.view(3, HEADS, 9)
    torch.testing.assert_close(scores.softmax(-1), maps[1][:, :, -1], **EXACT)


# --- indicators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 12])
def test_indicators_of_the_identity(length):
    found = indicators(torch.eye(length).expand(2, 3, -1, -1).double())
    assert found["concentration"] == pytest.approx(length**0.5)
    assert found["sink"] == pytest.approx(1 / length)
    expected = {"entropy": 0, "diversity": 0, "local 0": 1, "local 1": 0, "local 3": 0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_indicators_of_uniform_reading():
    uniform = softmax_maps(*torch.zeros(2, 2, 3, 6, 4).double())
    found = indicators(uniform)
    assert found["entropy"] == pytest.approx(sum(math.log(i) for i in range(1, 7)) / 6)
    assert found["concentration"] == pytest.approx(sum(1 / i for i in range(1, 7)) ** 0.5)
    assert found["sink"] == pytest.approx(sum(1 / i for i in range(1, 7)) / 6)
    for back in range(4):
        cells = [1 / i for i in range(1 + back, 7)]
        assert found[f"local {back}"] == pytest.approx(sum(cells) / len(cells))


def test_diversity_is_the_spread_over_heads_in_the_lower_triangle():
    first, second = torch.eye(4).double(), torch.zeros(4, 4).double()
    second[:, 0] = 1.0
    found = indicators(torch.stack([first, second])[None])
    differing = 2 * 3  # rows 2 to 4 differ in two cells, by one: a deviation of a half
    assert found["diversity"] == pytest.approx(0.5 * differing / 10)


# --- look-ups ------------------------------------------------------------------------------------


def test_tokens_seen_once_before():
    text = torch.tensor([[4, 7, 4, 4, 7, 2, 9]])
    assert seen_once(text).tolist() == [[False, False, True, False, True, False]]


# --- costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_counted_costs_are_the_papers_formulas_and_the_output_projection(batch):
    length = 20
    x = torch.randn(batch, length, WIDTH)
    out = 2 * batch * WIDTH**2
    operations, cache = counted_cost(StaticEmbQK(WIDTH, HEADS), x, embeddings=x)
    expected = paper_cost("Standard", batch, length, WIDTH, HEADS)
    assert (operations - out, cache) == expected
    operations, cache = counted_cost(NonApproximate(WIDTH, HEADS), x)
    assert (operations - out, cache) == paper_cost("Non-approximate", batch, length, WIDTH, HEADS)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_stream_costs_what_its_own_row_adds(batch):
    length = 20
    rows = torch.randn(batch + 1, length, WIDTH)
    operations, cache = counted_cost(StreamQK(WIDTH, HEADS), rows)
    one_map = 2 * length * WIDTH
    projections = 4 * WIDTH**2 + 2 * (batch + 1) * 2 * WIDTH**2
    assert operations == projections + one_map + 2 * (batch + 1) * length * WIDTH
    assert cache == 2 * (batch + 2) * length * WIDTH
    printed = paper_cost("RndEmbQK", batch, length, WIDTH, HEADS)[1]
    assert cache - printed == 2 * length * WIDTH  # the stream's own values


def test_the_papers_formulas_by_hand():
    """Batch 2, length 10, width 12, 3 heads."""
    at = (2, 10, 12, 3)
    assert paper_cost("MLP", *at) == (None, 0)
    assert paper_cost("StaticEmbQK", *at) == (None, None)
    assert paper_cost("Approximate", *at) == (None, 144 + 384)
    assert paper_cost("Non-approximate", *at) == (1728, 48 + 24)
    assert paper_cost("RndEmbQK", *at) == (240 + 480 + 1728, 720)
    assert paper_cost("Standard", *at) == (1728 + 960, 960)
