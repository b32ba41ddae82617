"""Oracles of TextMonkey: the official numbers and mask, identity at the start, reach across borders, selection."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.multimodal_llm.textmonkey import (
    CropGrid,
    CrossWindowAttention,
    LatentAttention,
    ScaledMLP,
    TokenResampler,
    WindowAttention,
    gather_tokens,
    join,
    later_similarity,
    least_similar,
    partition,
    redundant_tokens,
    relative_index,
    visible_along,
    visible_pairs,
)
from reattend.vision.hat import WindowAttention as HatWindowAttention
from reattend.vision.hat import shift_mask

SEEDS = (0, 1, 2)
GRIDS = (CropGrid(1, 2, 6, 6), CropGrid(2, 2, 6, 6), CropGrid(2, 3, 4, 5), CropGrid(1, 1, 3, 7))


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"atol": 1e-12, "rtol": 1e-12} | tolerance))


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def filled(module, seed=0, size=0.4):
    """The module in float64 and evaluation mode, its parameters drawn anew in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(size * noise)
    return module


def numbered(height, width):
    """A map that holds the number of each place, row by row."""
    return torch.arange(height * width).view(1, height, width, 1)


# Crops and windows --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_crops_are_cut_and_stitched_back(grid):
    height, width = grid.size
    page = drawn(2, height, width, 3)
    crops = grid.cut(page)
    assert crops.shape == (2, grid.rows * grid.columns, grid.height * grid.width, 3)
    assert torch.equal(grid.stitch(crops), page)
    last = page[:, height - grid.height :, width - grid.width :].flatten(1, 2)
    assert torch.equal(crops[:, -1], last)
    second = page[:, : grid.height, grid.width : 2 * grid.width].flatten(1, 2)
    assert grid.columns == 1 or torch.equal(crops[:, 1], second)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"2 crops of 36 tokens, not 4 crops of 36"):
        CropGrid(1, 2, 6, 6).stitch(torch.zeros(1, 4, 36, 2))


@pytest.mark.parametrize("window", [(2, 3), (4, 9), (1, 1)])
def test_windows_join_to_the_map(window):
    page = drawn(2, 4, 9, 3)
    windows = partition(page, window)
    assert torch.equal(windows[:, 0], page[:, : window[0], : window[1]].flatten(1, 2))
    assert torch.equal(join(windows, window, (4, 9)), page)


@pytest.mark.parametrize(
    ("size", "window", "shift"), [((6, 12), 6, 3), ((7, 9), 4, 2), ((5, 5), 3, 1), ((8, 3), 3, 0)]
)
def test_a_block_puts_every_token_back_where_it_was(size, window, shift):
    block = cross_window(CropGrid(1, 1, *size), window=window, shift=shift).shift_attn
    page = drawn(2, *size, 3)
    assert torch.equal(block.unwindowed(block.windows(page)), page)


def test_the_official_mask_joins_opposite_edges_and_ours_does_not():
    """64 tokens, windows of 12, shift 6: 736 pairs of real tokens are unmasked, 40 join both ends."""
    places = (torch.arange(72) + 6).view(6, 12)
    real, source = torch.arange(72).view(6, 12) < 64, places % 64
    pairs = real[:, :, None] & real[:, None, :]
    far = (source[:, :, None] - source[:, None, :]).abs() >= 12
    official, ours = (visible_along(64, 12, 6, official=flag) for flag in (True, False))
    assert (official & pairs).sum() == 736
    assert (official & pairs & far).sum() == 40
    assert (ours & pairs).sum() == 696
    assert not (ours & far).any()
    assert official[:, :, ~real.flatten()[-12:]].any()  # padding is a key there
    assert not (ours & ~real[:, None, :]).any()


@pytest.mark.parametrize(
    ("size", "window", "shift"), [(12, 6, 3), (16, 8, 4), (9, 3, 2), (6, 6, 0)]
)
def test_both_masks_agree_where_the_window_divides_the_page(size, window, shift):
    ours, official = (visible_along(size, window, shift, official=flag) for flag in (False, True))
    assert torch.equal(ours, official)
    rolled = (torch.arange(size) + shift).view(-1, window)
    before = rolled < size  # of the roll's seam
    assert torch.equal(ours, before[:, :, None] == before[:, None, :])


def test_the_mask_is_that_of_plain_shifted_windows():
    both = visible_pairs((8, 12), (4, 4), (2, 2))
    assert torch.equal(both, shift_mask(8, 12, 4, 2).flatten(0, 1))


def test_the_bias_counts_query_minus_key():
    index = relative_index((2, 3))
    assert index.shape == (6, 6)
    for (a, b), (c, d) in product(product(range(2), range(3)), repeat=2):
        assert index[a * 3 + b, c * 3 + d] == (a - c + 1) * 5 + b - d + 2


@pytest.mark.parametrize("seed", SEEDS)
def test_one_window_as_large_as_the_map_is_full_attention(seed):
    ours = filled(WindowAttention(12, 3, (4, 5)), seed)
    x = drawn(2, 1, 20, 12, seed=seed)
    q, k, v = (
        part.unflatten(-1, (3, 4)).transpose(1, 2) for part in ours.qkv(x[:, 0]).chunk(3, -1)
    )
    bias = ours.relative_position_bias_table[relative_index((4, 5))].movedim(-1, 0)
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(2, -1, -1, -1))
    expected = ours.proj(read.transpose(1, 2).flatten(2))
    close(ours(x, visible_pairs((4, 5), (4, 5), (0, 0)))[:, 0], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_is_that_of_another_paper_with_equal_weights(seed):
    """HAT's shifted windows; its table counts key - query, so it is read from behind."""
    theirs = filled(HatWindowAttention(12, 3, 4, shift=2), seed)
    ours = WindowAttention(12, 3, (4, 4)).double()
    state = theirs.state_dict()
    state["relative_position_bias_table"] = state["relative_position_bias_table"].flip(0)
    ours.load_state_dict(state)
    page = drawn(2, 8, 12, 12, seed=seed)
    windows = partition(page.roll((-2, -2), (1, 2)), (4, 4))
    read = ours(windows, visible_pairs((8, 12), (4, 4), (2, 2)))
    close(join(read, (4, 4), (8, 12)).roll((2, 2), (1, 2)), theirs(page))


# Cross-window attention ---------------------------------------------------------------------------


def cross_window(grid, *, dim=8, hidden=12, heads=3, window=6, seed=None, **options):
    module = CrossWindowAttention(grid, dim, hidden, heads, window=window, **options)
    return module.double().eval() if seed is None else filled(module, seed)


# The official module with these parameters and inputs: sum, sum of squares, three entries in each of two places.
OFFICIAL_WINDOWS = {
    (8, 3): (
        (53.38087643180427, 1068.6695132946063),
        (0.7666084021683047, -0.16706279413889327, 0.43677513059768536),
        (0.3706661661512136, 1.722878063843862, -1.0205493159255143),
    ),
    (12, 6): (
        (175.53504151369327, 2287.2404633508972),
        (-2.5157313896630655, 0.7720420697658934, -0.3881856653186032),
        (-1.4669006652271968, 1.2637641727974838, 1.2149499645572952),
    ),
    (10, 4): (
        (-74.15829631146165, 1618.5118395878117),
        (0.9167217088136593, -1.4709538885223348, -0.21927065047409205),
        (-1.5291955708207738, -1.1699855772371544, 0.04050062376106828),
    ),
    (5, 8): (
        (17.247897100487, 613.246678827001),
        (-0.891587278079722, -1.370964734753136, -1.5199228221114294),
        (-0.30331608650210157, 0.9310123630658629, -0.6622375032678287),
    ),
}


@pytest.mark.parametrize(("side", "window"), OFFICIAL_WINDOWS)
def test_cross_window_attention_has_the_official_numbers(side, window):
    module = cross_window(CropGrid(1, 1, side, side), window=window, seed=0, official_mask=True)
    x = drawn(2, 8, side, side, seed=1).movedim(1, -1)
    found = module(x.flatten(1, 2)[:, None])[:, 0].view(2, side, side, 8)
    sums, one, other = (
        torch.tensor(t, dtype=torch.float64) for t in OFFICIAL_WINDOWS[side, window]
    )
    close(torch.stack([found.sum(), found.square().sum()]), sums, atol=1e-9)
    close(found[1, 0, -1, :3], one)
    close(found[0, -1, 2, -3:], other)


def test_the_official_mask_changes_numbers_only_where_the_window_does_not_divide_the_page():
    for side, window, same in ((8, 3, False), (12, 6, True)):
        x = drawn(1, 1, side * side, 8)
        grid = CropGrid(1, 1, side, side)
        ours, official = (
            cross_window(grid, window=window, seed=0, official_mask=flag)(x)
            for flag in (False, True)
        )
        assert ((ours - official).abs().max() < 1e-12) == same


@pytest.mark.parametrize("grid", GRIDS)
def test_zero_initialised_it_changes_nothing_and_its_last_matrix_learns_first(grid):
    module = cross_window(grid)
    crops = drawn(2, grid.rows * grid.columns, grid.height * grid.width, 8)
    assert torch.equal(module(crops), crops)
    module(crops).square().sum().backward()
    moved = {name for name, p in module.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {"shift_attn.mlp.fc2.weight"}
    assert not torch.equal(cross_window(grid, zero=False)(crops), crops)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_branch_follows_the_paper_line_by_line(seed):
    """X + s W2 GELU(W1 LN(D')), D' = D + Attention(LN(D)), D = (X + P) W_down; positions in the branch only."""
    grid = CropGrid(1, 2, 6, 6)
    module = cross_window(grid, seed=seed)
    block, page = module.shift_attn, drawn(2, 6, 12, 8, seed=seed)
    narrow = (page + module.position_embedding.view(1, 6, 12, 8)) @ block.downsample.weight.T
    crops = grid.cut(page)
    flat = block.norm1(narrow).flatten(1, 2)
    q, k, v = (p.unflatten(-1, (3, 4)).transpose(1, 2) for p in block.attn.qkv(flat).chunk(3, -1))
    column = torch.arange(72) % 12
    row = torch.arange(72) // 12
    # Windows over columns 0-2, 3-8 and 9-11 of the page.
    part = (column >= 3).int() + (column >= 9).int()
    together = part[:, None] == part[None]
    offset = (row[:, None] - row + 5) * 11 + column[:, None] - column + 5
    bias = block.attn.relative_position_bias_table[offset.clamp(0, 120)].movedim(-1, 0)
    scores = (q @ k.mT / 2 + bias).masked_fill(~together, -math.inf)
    read = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    after = block.norm2(narrow.flatten(1, 2) + block.attn.proj(read))
    branch = F.gelu(after @ block.mlp.fc1.weight.T) @ block.mlp.fc2.weight.T
    close(module(crops), grid.cut(page + (block.mlp.scale * branch).view(2, 6, 12, 8)))


def test_weights_stay_between_neighbours_and_are_those_of_the_forward_pass():
    grid = CropGrid(1, 2, 6, 6)
    module = cross_window(grid, seed=0)
    crops = drawn(2, 2, 36, 8)
    weights = module.weights(crops)
    close(weights.sum(-1), torch.ones(2, 3, 72).double())
    column = torch.arange(72) % 12
    part = (column >= 3).int() + (column >= 9).int()
    apart = part[:, None] != part[None]
    assert weights[:, :, apart].max() < 1e-6
    assert weights[:, :, ~apart].min() > 0
    block, page = module.shift_attn, grid.stitch(crops)
    narrow = block.downsample(module.placed(page)).flatten(1, 2)
    values = block.attn.qkv(block.norm1(narrow)).chunk(3, -1)[2].unflatten(-1, (3, 4))
    read = block.attn.proj((weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2))
    branch = block.mlp(block.norm2(narrow + read)).view_as(page)
    close(module(crops), grid.cut(page + branch))


def test_the_official_mask_lets_the_ends_of_a_page_see_each_other():
    grid = CropGrid(1, 1, 1, 64)
    x = drawn(1, 1, 64, 8)
    apart = (torch.arange(64)[:, None] - torch.arange(64)).abs() >= 12
    for official in (True, False):
        module = cross_window(grid, window=12, seed=0, official_mask=official)
        most = module.weights(x)[..., apart].max()
        assert most > 1e-3 if official else most == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_only_shifted_windows_cross_the_border(seed):
    """Tokens of crop 1 that depend on crop 2: those of the window over the border, none without shift."""
    grid = CropGrid(1, 2, 6, 6)
    for shift, columns in ((3, {3, 4, 5}), (0, set())):
        module = cross_window(grid, shift=shift, seed=seed)
        crops = drawn(1, 2, 36, 8, seed=seed).requires_grad_()
        found = set()
        for token in range(36):
            grad = torch.autograd.grad(module(crops)[0, 0, token].sum(), crops)[0]
            if grad[0, 1].abs().max() > 0:  # a masked pair weighs nothing
                found.add(token % 6)
        assert found == columns


def test_the_shift_is_half_a_window_and_only_along_axes_longer_than_it():
    block = cross_window(CropGrid(1, 2, 6, 6)).shift_attn
    assert (block.window, block.shift) == ((6, 6), (0, 3))
    assert cross_window(CropGrid(2, 2, 6, 6)).shift_attn.shift == (3, 3)
    assert cross_window(CropGrid(1, 1, 4, 9)).shift_attn.window == (4, 6)


def test_heads_must_divide_the_branch():
    with pytest.raises(ValueError, match="5 heads do not divide 12 channels"):
        cross_window(GRIDS[0], heads=5)


def test_dropout_is_of_training_alone():
    mlp = filled(ScaledMLP(6, 400, 3, dropout=0.5))
    x = drawn(4, 6)
    close(mlp(x), mlp(x), atol=0, rtol=0)
    torch.manual_seed(0)
    assert not torch.equal(mlp.train()(x), mlp(x))


# Token resampler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_similarity_looks_at_later_tokens(seed):
    tokens = drawn(2, 9, 5, seed=seed)
    found = later_similarity(tokens)
    for page, i in product(range(2), range(9)):
        later = [F.cosine_similarity(tokens[page, i], tokens[page, j], 0) for j in range(i + 1, 9)]
        expected = torch.stack(later).max() if later else torch.tensor(-1.0).double()
        close(found[page, i], expected)
    close(later_similarity(tokens * drawn(2, 9, 1, seed=9).abs()), found)  # lengths do not matter


def test_selection_at_its_ends():
    tokens = drawn(2, 7, 5)
    assert least_similar(tokens, 7).tolist() == [list(range(7))] * 2
    assert least_similar(tokens, 1).tolist() == [[6]] * 2  # the last one's -1 is the smallest
    assert torch.equal(gather_tokens(tokens, least_similar(tokens, 7)), tokens)


def test_of_duplicates_the_last_stays():
    tokens = torch.eye(6, dtype=torch.float64)[None].clone()
    tokens[0, 1] = tokens[0, 4]
    tokens[0, 0] = 3 * tokens[0, 4]
    assert least_similar(tokens, 4).tolist() == [[2, 3, 4, 5]]


def test_of_orthogonal_tokens_the_last_is_never_dropped():
    assert 5 in least_similar(torch.eye(6, dtype=torch.float64)[None], 5)[0]


@pytest.mark.parametrize("keep", [0, 8])
def test_numbers_of_tokens_that_do_not_exist_are_refused(keep):
    with pytest.raises(ValueError, match=rf"keep must lie in 1\.\.7, .* not {keep}"):
        least_similar(drawn(1, 7, 3), keep)


# The official resampler with these parameters and tokens (12 of 16 channels, 5 kept).
OFFICIAL_KEPT = [[4, 6, 8, 10, 11], [2, 3, 6, 9, 11]]
OFFICIAL_SUMS = (-4.58367392053785, 156.605942714641)
OFFICIAL_ENTRIES = (1.4707431498916914, -0.515576407045639, 0.7386314913032179)


def test_the_resampler_has_the_official_numbers():
    module, tokens = filled(TokenResampler(16, 12, 3, 5)), drawn(2, 12, 16, seed=3)
    places = least_similar(tokens, 5)
    assert places.tolist() == OFFICIAL_KEPT
    found = module(tokens, gather_tokens(tokens, places))
    sums = torch.stack([found.sum(), found.square().sum()])
    close(sums, torch.tensor(OFFICIAL_SUMS, dtype=torch.float64), atol=1e-9)
    close(found[1, 3, :3], torch.tensor(OFFICIAL_ENTRIES, dtype=torch.float64))


def test_the_resampler_starts_as_plain_selection():
    torch.manual_seed(0)
    module, tokens = TokenResampler(16, 12, 3, 4).double(), drawn(2, 9, 16)
    kept = gather_tokens(tokens, least_similar(tokens, 4))
    assert torch.equal(module(tokens, kept), kept)
    module(tokens, kept).square().sum().backward()
    moved = {name for name, p in module.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {"layers.0.1.fc2.weight"}


@pytest.mark.parametrize("seed", SEEDS)
def test_latents_read_tokens_and_each_other(seed):
    module = filled(LatentAttention(6, 2, 5), seed)
    tokens, latents = drawn(2, 7, 6, seed=seed), drawn(2, 3, 6, seed=seed + 10)
    normed = module.norm_latents(latents)
    both = torch.cat([module.norm_media(tokens), normed], 1)
    heads = []
    for head in range(2):
        rows = slice(5 * head, 5 * head + 5)
        q = normed @ module.to_q.weight[rows].T
        k = both @ module.to_kv.weight[rows].T
        v = both @ module.to_kv.weight[10:][rows].T
        heads.append((q @ k.mT * 5**-0.5).softmax(-1) @ v)
    close(module(tokens, latents), torch.cat(heads, -1) @ module.to_out.weight.T)


def test_no_gradient_passes_through_the_selection():
    tokens = drawn(1, 8, 4).requires_grad_()
    assert not least_similar(tokens, 3).requires_grad
    gather_tokens(tokens, least_similar(tokens, 3)).sum().backward()
    assert (tokens.grad.sum(-1) > 0).sum() == 3


# Redundancy ---------------------------------------------------------------------------------------


def test_redundancy_counts_tokens_with_a_likeness():
    tokens = torch.eye(5, dtype=torch.float64)[None].clone()
    tokens[0, 1] += 2 * tokens[0, 0]  # cosine 2 / sqrt 5 = .894
    assert redundant_tokens(tokens).tolist() == [[1, 1, 0, 0, 0]]
    assert redundant_tokens(tokens, 0.9).tolist() == [[0] * 5]


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_candidates_are_the_mean_over_random_choices(seed):
    tokens = drawn(1, 12, 3, seed=seed)
    found = redundant_tokens(tokens, 0.7, candidates=4)[0]
    unit = F.normalize(tokens[0], dim=-1)
    over = (unit @ unit.T > 0.7).double()
    for i in range(12):
        others = [j for j in range(12) if j != i]
        choices = torch.combinations(torch.tensor(others), 4)
        close(found[i], over[i][choices].amax(-1).mean())
    close(redundant_tokens(tokens, 0.7, candidates=11), redundant_tokens(tokens, 0.7))


def test_more_candidates_than_tokens_are_refused():
    with pytest.raises(ValueError, match=r"candidates must lie in 1\.\.4, .* not 5"):
        redundant_tokens(drawn(1, 5, 3), candidates=5)


# On a reader's own model --------------------------------------------------------------------------


def test_it_stands_before_blocks_of_any_encoder():
    grid = CropGrid(2, 2, 3, 4)
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval() for _ in range(3)]
    crops = torch.randn(2, 4, 12, 8)
    alone = crops.flatten(0, 1)
    for block in blocks:
        alone = block(alone)
    modules = {1: CrossWindowAttention(grid, 8, 8, 2, window=4)}
    x = crops
    for number, block in enumerate(blocks):
        x = modules[number](x) if number in modules else x
        x = block(x.flatten(0, 1)).unflatten(0, (2, 4))
    torch.testing.assert_close(x, alone.unflatten(0, (2, 4)))
