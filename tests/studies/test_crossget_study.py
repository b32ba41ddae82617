"""Matchings asked about the same tokens, merged ViTs, groups of tokens and multiply-adds: by hand and by counting."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from reattend.backbones.pretrained.vit import prepare
from reattend.backbones.trained.crossget import SETTINGS, Reduced, arm_of, paired, untrained
from reattend.studies.crossget import (
    MATCHERS,
    BlockTokens,
    MatchingProbe,
    arm_multiply_adds,
    by_photograph,
    divergence,
    matching_quality,
    merging_of,
    multiply_adds,
    pair_similarity,
    random_order_matching,
    retrieved,
    token_counts,
    token_groups,
    told_apart,
    vit_cls,
)
from reattend.trunks.image_text import NO_HOOKS, ImageTower
from reattend.vision_language.crossget import (
    Merging,
    TokenEnsemble,
    bipartite_matching,
    complete_graph_matching,
    similarities,
)

SMOKE, CPU = SETTINGS["smoke"], SETTINGS["cpu"]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=14,
        image_size=56,
        layerscale_value=0.7,
    )
    return Dinov2Model(config).eval().requires_grad_(False)


def pictures(count=3, size=56, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_the_vit_with_hooks_is_the_vit(vit):
    plain = vit(prepare(pictures(), 56)).last_hidden_state[:, 0]
    torch.testing.assert_close(vit_cls(vit, pictures(), NO_HOOKS, 56), plain, atol=1e-6, rtol=0)


def test_a_vit_of_equal_patches_is_the_same_after_merging(vit):
    vit.embeddings.position_embeddings.data[:, 1:] = 0.3
    grey = torch.full((2, 3, 56, 56), 90, dtype=torch.uint8)
    found = matching_quality(lambda x, hooks: vit_cls(vit, x, hooks, 56), grey, 3, (2, 4))
    for cells in found.values():
        for cell in cells.values():
            assert cell["error"].max() < 1e-5
            torch.testing.assert_close(cell["similarity"], torch.ones(2), atol=1e-5, rtol=0)


def test_the_probe_changes_nothing_and_asks_about_the_same_tokens(vit):
    matchers = {"CGSM": complete_graph_matching, "BSM": bipartite_matching}
    probe = MatchingProbe(matchers, 3)
    plain = vit_cls(vit, pictures(), NO_HOOKS, 56)
    assert torch.equal(vit_cls(vit, pictures(), probe, 56), plain)
    again = MatchingProbe({"BSM": bipartite_matching, "CGSM": complete_graph_matching}, 3)
    vit_cls(vit, pictures(), again, 56)
    for name in matchers:
        assert len(probe.found[name]) == 3
        for one, two in zip(probe.found[name], again.found[name], strict=True):
            assert torch.equal(one, two)


def test_qualities_are_those_of_each_matching(vit):
    found = matching_quality(
        lambda x, hooks: vit_cls(vit, x, hooks, 56), pictures(5), 3, (1, 4), batch=2
    )
    assert set(found) == set(MATCHERS)
    assert found["CGSM"][4]["similarity"].shape == (5,)
    # One pair a block: the complete graph has the best one, as the greedy choice.
    torch.testing.assert_close(found["CGSM"][1]["similarity"], found["greedy"][1]["similarity"])
    assert (found["greedy"][4]["similarity"] > found["random pairs"][4]["similarity"]).all()
    plain = vit_cls(vit, pictures(5), NO_HOOKS, 56)
    hooks = TokenEnsemble((4, 4, 4), match=bipartite_matching, importance=None)
    error = (vit_cls(vit, pictures(5), hooks, 56) - plain).norm(dim=1) / plain.norm(dim=1)
    torch.testing.assert_close(found["BSM"][4]["error"], error, atol=1e-5, rtol=1e-4)


def test_means_of_photographs():
    values = torch.tensor([1.0, 3, 5, 9, 2, 4])
    found = by_photograph({"CGSM": {5: {"error": values}}}, 3)
    assert found["CGSM"][5]["error"].tolist() == [2, 7, 3]


def test_pair_similarity_by_hand():
    similarity = torch.arange(32.0).view(2, 4, 4)
    merging = Merging(
        torch.tensor([[1], [3]]), torch.tensor([[0, 2, 3], [0, 1, 2]]), torch.tensor([[2], [1]])
    )
    assert pair_similarity(similarity, merging).tolist() == [7.0, 16 + 13.0]


def test_random_order_ranks_by_chance():
    keys = torch.randn(400, 6, 3, generator=torch.Generator().manual_seed(0))
    similarity = similarities(keys, torch.zeros(400, 6, dtype=torch.bool))
    one, same, other = (
        random_order_matching(torch.Generator().manual_seed(seed))(similarity, 2, None).sources
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    ranked = complete_graph_matching(similarity, 2).sources
    assert 0.05 < (one != ranked).any(1).double().mean() < 0.95


def test_groups_by_hand():
    """Five tokens: 3 goes into 1, and then 2 into what was 4 (the third of four)."""
    first = Merging(torch.tensor([[3]]), torch.tensor([[0, 1, 2, 4]]), torch.tensor([[1]]))
    second = Merging(torch.tensor([[2]]), torch.tensor([[0, 1, 3]]), torch.tensor([[2]]))
    assert token_groups([first, second], 5).tolist() == [[0, 1, 2, 1, 2]]
    assert token_groups([first, second], 5, appended=1).tolist() == [[0, 1, 2, 1]]


@pytest.mark.parametrize("r", [(0, 0, 0), (3, 2, 1)])
def test_multiply_adds_by_counting(r):
    tower = ImageTower(12, 4, 16, 3, 2).eval()
    hooks = TokenEnsemble(r, importance=None)
    embedded = tower.embed(pictures(1, 12))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower.states(embedded, hooks)
    lengths = [10]
    for merged in r:
        lengths.append(lengths[-1] - merged)
    assert counter.get_total_flops() == 2 * multiply_adds(16, lengths, matching=True)


def test_retrieved_is_that_of_unit_vectors():
    pairs = paired(SMOKE.pictures(32, "test", 0))
    reduced = Reduced(untrained(SMOKE.shape, 0), arm_of("CrossGET", SMOKE, 0)).eval()
    found = retrieved(reduced, pairs, 16)
    ranks = []
    with torch.no_grad():
        for start in (0, 16):
            vectors = reduced(pairs[slice(start, start + 16)])
            cosines = vectors.image @ vectors.text.T
            ranks.append((cosines > cosines.diagonal()[:, None]).sum(1) + 1)
    expected = 100 * (torch.cat(ranks) <= 5).double().mean().item()
    assert found["I2T R@5"] == pytest.approx(expected)
    assert found["NLL"] > 0


def test_told_apart_one_by_one():
    reduced = Reduced(untrained(SMOKE.shape, 2), arm_of("dense", SMOKE, 0)).eval()
    pairs = paired(SMOKE.pictures(20, "test", 0))
    with torch.no_grad():
        cosines = (lambda v: v.image @ v.text.T)(reduced(pairs))
    right = [cosines[i, i] > cosines[i, i + 1 - 2 * (i % 2)] for i in range(20)]
    assert told_apart(reduced, pairs) == 5.0 * sum(right)


def test_costs_of_arms_by_hand():
    """38 tokens with the cross token, then 22, 12, 7, 5: at most half of the free ones go. Captions of ten."""
    assert token_counts(38, (16,) * 4, 2) == [38, 22, 12, 7, 5]
    assert token_counts(37, (15, 10, 5, 2), 1) == [37, 22, 12, 7, 5]
    width = CPU.shape.width
    found = {name: arm_multiply_adds(name, CPU) for name in ("dense", "CrossGET", "CGSM", "text")}
    linear = (4 * (38 + 22 + 12 + 7) + 8 * (22 + 12 + 7 + 5)) * width**2
    assert found["CrossGET"]["image"] == linear + 3 * (38**2 + 22**2 + 12**2 + 7**2) * width
    assert found["CGSM"]["image"] == multiply_adds(width, [37, 22, 12, 7, 5], matching=True)
    assert found["dense"] == {
        name: multiply_adds(width, [n] * 5) for name, n in (("image", 37), ("text", 10))
    }
    assert found["CrossGET"]["text"] == found["dense"]["text"]
    assert found["text"]["text"] == multiply_adds(width, [11, 10, 9, 8, 7], matching=True)


def test_shown_mergings_are_those_of_the_tower():
    setting, model = CPU, untrained(CPU.shape, 3)
    reduced = Reduced(model, arm_of("CrossGET", setting, 0)).eval()
    reduced.cross.image.data += 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    shown, groups = merging_of(reduced, setting.pictures(4, "test", 0).pixels)
    assert [values.isfinite().sum(1).tolist() for values in shown] == [
        [n] * 4 for n in (36, 20, 10, 5)
    ]
    assert shown[0].abs().max() <= 1 + 1e-6
    for row in groups:
        assert len(set(row.tolist())) == 4
        assert (row == row[0]).sum() == 1  # nothing is merged into [CLS]


def test_divergence_is_zero_where_both_sides_are_equal():
    reduced = Reduced(untrained(SMOKE.shape, 0), arm_of("CrossGET", SMOKE, 0)).eval()
    pairs = paired(SMOKE.pictures(4, "test", 0))
    assert divergence(reduced, pairs) > 1e-6
    for part in ("image_map", "text_map"):
        getattr(reduced.model, part).weight.data.zero_()
    assert divergence(reduced, pairs) == pytest.approx(0, abs=1e-7)


def test_block_tokens_keep_the_keys_of_one_block(vit):
    seen = BlockTokens(1)
    vit_cls(vit, pictures(), seen, 56)
    states = vit(prepare(pictures(), 56), output_hidden_states=True).hidden_states[1]
    block = vit.encoder.layer[1]
    torch.testing.assert_close(
        seen.keys, block.attention.k_proj(block.norm1(states)), atol=1e-5, rtol=0
    )
