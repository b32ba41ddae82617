"""Oracles of blocked local attention with halos: everything against dense attention and plain loops."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.attention.dense import dense_attention
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import multiply_adds
from reattend.vision.halonet import (
    FAMILY,
    HaloAttention,
    HaloBlock,
    HaloNet,
    HaloNetConfig,
    attention_multiply_adds,
    axis_mask,
    gather_windows,
    halo_attention,
    join_blocks,
    neighbourhood_elements,
    relative_rows,
    split_blocks,
)

SEEDS = (0, 1, 2)
# height, width, block, halo: rectangular maps, odd blocks, halos beyond the neighbouring block
GEOMETRIES = [(8, 8, 4, 2), (6, 9, 3, 1), (4, 6, 2, 3), (5, 7, 1, 1), (8, 4, 4, 0), (6, 6, 6, 0)]
IDS = ["H{}-W{}-b{}-h{}".format(*g) for g in GEOMETRIES]


def tensors(height, width, block, halo, seed=0, stride=1, heads=2, dim=3, value_dim=5):
    """Queries, keys, values and tables in float64, all with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return (
        normal(2, heads, height // stride, width // stride, dim),
        normal(2, heads, height, width, dim),
        normal(2, heads, height, width, value_dim),
        normal(2, 2 * (block + 2 * halo) - 1, dim),
    )


def pairs(height, width, block, halo, stride=1, reach=None):
    """Boolean mask and offsets of all (query, key) pairs, by plain loops over pixels."""
    window = block + 2 * halo
    queries = list(itertools.product(range(0, height, stride), range(0, width, stride)))
    keys = list(itertools.product(range(height), range(width)))
    mask = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    offsets = torch.zeros(2, len(queries), len(keys), dtype=torch.long)
    for row, query in enumerate(queries):
        for column, key in enumerate(keys):
            starts = [place // block * block for place in query]
            inside = [s - halo <= k < s + block + halo for s, k in zip(starts, key, strict=True)]
            near = reach is None or all(
                abs(k - q) <= reach for q, k in zip(query, key, strict=True)
            )
            mask[row, column] = all(inside) and near
            for axis in (0, 1):
                # key counted from the start of its window, query from the start of its block
                offset = (key[axis] - starts[axis] + halo) - (query[axis] - starts[axis])
                offsets[axis, row, column] = (offset + window - 1) * mask[row, column]
    return mask, offsets


def dense(queries, keys, values, block, halo, tables=None, reach=None, scale=None):
    """The same attention, dense over all pixels with a mask and gathered relative logits."""
    stride = keys.shape[2] // queries.shape[2]
    mask, offsets = pairs(*keys.shape[2:4], block, halo, stride, reach)
    flat = [x.flatten(2, 3) for x in (queries, keys, values)]
    bias = None
    if tables is not None:
        bias = sum(
            torch.einsum("bhqd,qkd->bhqk", flat[0], table[offset])
            for table, offset in zip(tables, offsets, strict=True)
        )
    out = dense_attention(*flat, mask=mask[None, None], bias=bias, scale=scale)
    return out.unflatten(2, queries.shape[2:4])


def assert_same(ours, theirs, inputs, tolerance=1e-10):
    """Outputs, and the gradients of a random projection of them, agree."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9)).double()
    one, other = (
        torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)
        for out in (ours, theirs)
    )
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


# Against dense attention --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_equals_dense_attention_masked_to_the_haloed_blocks(geometry, seed):
    block, halo = geometry[2:]
    inputs = tensors(*geometry, seed)
    ours = halo_attention(*inputs[:3], block, halo, inputs[3])
    assert_same(ours, dense(*inputs[:3], block, halo, inputs[3]), inputs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_equals_masked_dense_attention_without_positions(geometry):
    block, halo = geometry[2:]
    inputs = tensors(*geometry)[:3]
    assert_same(halo_attention(*inputs, block, halo), dense(*inputs, block, halo), inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_block_without_halo_is_global_attention(seed):
    inputs = tensors(6, 6, 6, 0, seed)[:3]
    flat = [x.flatten(2, 3) for x in inputs]
    fused = F.scaled_dot_product_attention(*flat).unflatten(2, (6, 6))
    for mask_padding in (True, False):  # there is none
        ours = halo_attention(*inputs, 6, 0, mask_padding=mask_padding)
        assert_same(ours, fused, inputs)
    single = [x.float() for x in inputs]
    torch.testing.assert_close(halo_attention(*single, 6, 0), fused.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("radius", [1, 2])
def test_blocks_of_one_pixel_are_a_window_around_every_pixel(radius):
    queries, keys, values, tables = tensors(5, 4, 1, radius)
    ours = halo_attention(queries, keys, values, 1, radius, tables)
    window = 2 * radius + 1
    for i, j in itertools.product(range(5), range(4)):
        logits, read = [], []
        for a, b in itertools.product(range(-radius, radius + 1), repeat=2):
            if 0 <= i + a < 5 and 0 <= j + b < 4:
                query, key = queries[:, :, i, j], keys[:, :, i + a, j + b]
                row, column = (
                    tables[axis, x + radius + window - 1] for axis, x in ((0, a), (1, b))
                )
                logits.append((query * key).sum(-1) / 3**0.5 + query @ (row + column))
                read.append(values[:, :, i + a, j + b])
        weights = torch.stack(logits).softmax(0)
        expected = (weights[..., None] * torch.stack(read)).sum(0)
        torch.testing.assert_close(ours[:, :, i, j], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("block", [2, 4])
def test_reach_makes_per_pixel_windows_of_any_block(block):
    radius, geometry = 3, (8, 4)
    inputs = tensors(*geometry, block, radius)
    ours = halo_attention(*inputs[:3], block, radius, inputs[3], reach=radius)
    # The offset of the same displacement differs by the constant difference of the windows.
    single = 2 * (1 + 2 * radius) - 1
    shifted = inputs[3][:, block - 1 : block - 1 + single]
    theirs = halo_attention(*inputs[:3], 1, radius, shifted)
    assert_same(ours, theirs, inputs)
    assert_same(ours, dense(*inputs[:3], block, radius, inputs[3], reach=radius), inputs)


# Strided queries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [None, 1])
@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 2, 2), (6, 1, 3), (4, 3, 4), (2, 1, 2)])
def test_strided_queries_sample_the_full_output(block, halo, stride, reach):
    queries, keys, values, tables = tensors(12, 12, block, halo)
    full = halo_attention(queries, keys, values, block, halo, tables, reach=reach)
    sampled = queries[:, :, ::stride, ::stride]
    strided = halo_attention(sampled, keys, values, block, halo, tables, reach=reach)
    inputs = (queries, keys, values, tables)
    assert_same(strided, full[:, :, ::stride, ::stride], inputs)
    assert_same(strided, dense(sampled, keys, values, block, halo, tables, reach), inputs)


def test_layer_with_stride_samples_the_layer_without():
    torch.manual_seed(0)
    layer = HaloAttention(6, 2, 4, 1).double()
    strided = HaloAttention(6, 2, 4, 1, stride=2).double()
    strided.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(strided(x), layer(x)[:, :, ::2, ::2])


# The conventions of the public timm layer ---------------------------------------------------------


def relative_to_absolute(logits):
    """[rows, b, 2m - 1] by offset -> [rows, b, m] by key: pad, flatten, skew."""
    rows, block, offsets = logits.shape
    window = (offsets + 1) // 2
    flat = F.pad(F.pad(logits, (0, 1)).flatten(1), (0, window - 1 + window - block))
    # Every row of the skewed matrix is one shorter, so it starts one offset earlier than the last.
    skewed = flat[:, : (block + 1) * offsets].reshape(rows, block + 1, offsets)
    return skewed[:, :block, window - 1 :]


def unfolded_layer(x, query, key_value, height_rel, width_rel, heads, block, halo, scale_all=False):
    """Halo attention in the order of the public timm layer, written apart from the library: [k | v]
    side by side within each head, one unfold over an unmasked zero padding, offsets skewed."""
    batch, _, height, width = x.shape
    window, dim = block + 2 * halo, height_rel.shape[1]
    q = F.conv2d(x, query).reshape(
        batch * heads, dim, height // block, block, width // block, block
    )
    q = q.permute(0, 2, 4, 3, 5, 1).reshape(batch * heads, -1, block * block, dim)
    kv = F.unfold(F.conv2d(x, key_value), window, padding=halo, stride=block)
    kv = kv.reshape(batch * heads, -1, window * window, q.shape[1]).permute(0, 3, 2, 1)
    k, v = kv.split([dim, kv.shape[-1] - dim], -1)
    square = q.reshape(-1, block, block, dim)
    across = relative_to_absolute((square @ width_rel.T).reshape(-1, block, 2 * window - 1))
    down = square.transpose(1, 2) @ height_rel.T
    down = relative_to_absolute(down.reshape(-1, block, 2 * window - 1))
    across = across.reshape(-1, block, block, 1, window)
    down = down.reshape(-1, block, block, window).transpose(1, 2)[..., None]
    relative = (across + down).reshape(*q.shape[:3], window * window)
    logits = q @ k.mT * dim**-0.5 + relative * (dim**-0.5 if scale_all else 1)
    out = logits.softmax(-1) @ v
    out = out.reshape(batch * heads, height // block, width // block, block, block, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


@pytest.mark.parametrize("scale_relative", [False, True])
@pytest.mark.parametrize(("block", "halo"), [(4, 2), (2, 1), (4, 0), (3, 3)])
def test_layer_equals_the_public_one_with_copied_weights(block, halo, scale_relative):
    torch.manual_seed(1)
    heads, dim, value_dim = 2, 3, 5
    layer = HaloAttention(
        heads * dim,
        heads,
        block,
        halo,
        values=heads * value_dim,
        mask_padding=False,
        scale_relative=scale_relative,
    ).double()
    key = layer.key.weight.unflatten(0, (heads, dim))
    value = layer.value.weight.unflatten(0, (heads, value_dim))
    key_value = torch.cat([key, value], 1).flatten(0, 1)
    x = torch.randn(2, heads * dim, 12, 24, dtype=torch.float64, requires_grad=True)
    theirs = unfolded_layer(
        x, layer.query.weight, key_value, *layer.tables, heads, block, halo, scale_relative
    )
    assert_same(layer(x), theirs, [x, *layer.parameters()])


def test_relative_rows_and_the_skew_against_a_loop_over_pairs():
    block, window = 4, 10
    table = torch.randn(2 * window - 1, 6, dtype=torch.float64)
    query = torch.randn(1, block, 6, dtype=torch.float64)
    expected = torch.empty(1, block, window, dtype=torch.float64)
    for y, other in itertools.product(range(block), range(window)):
        expected[0, y, other] = query[0, y] @ table[other - y + window - 1]
    ours = torch.einsum("ryd,ymd->rym", query, relative_rows(table, block, window))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(relative_to_absolute(query @ table.T), expected)


def test_only_some_offsets_are_used():
    block, halo = 4, 1
    inputs = tensors(8, 8, block, halo)
    halo_attention(*inputs[:3], block, halo, inputs[3]).square().sum().backward()
    used = inputs[3].grad.abs().sum(-1) > 0
    assert used.shape == (2, 11)
    assert used.sum(1).tolist() == [block + 6 - 1] * 2
    assert not used[:, : 6 - block].any()  # offsets -(m - 1) .. -b


# Conventions --------------------------------------------------------------------------------------


def test_scales():
    inputs = tensors(4, 4, 2, 1)
    queries, keys, values, tables = inputs
    ours = halo_attention(queries, keys, values, 2, 1, tables, scale=1.0)
    assert_same(ours, dense(queries, keys, values, 2, 1, tables, scale=1.0), inputs)
    both = halo_attention(queries, keys, values, 2, 1, tables, scale_relative=True)
    alone = halo_attention(queries, keys, values, 2, 1, tables * 3**-0.5)
    assert_same(both, alone, inputs)


def test_padding_weighs_in_unless_it_is_masked():
    ones = torch.ones(1, 1, 4, 4, 1, dtype=torch.float64)
    masked = halo_attention(ones, 0 * ones, ones, 2, 1)
    torch.testing.assert_close(masked, ones)
    # Every block of 2 sees a corner of the map: 9 of the 16 keys in its window lie on it.
    padded = halo_attention(ones, 0 * ones, ones, 2, 1, mask_padding=False)
    torch.testing.assert_close(padded, 9 / 16 * ones)
    layer, open_layer = HaloAttention(1, 1, 2, 1), HaloAttention(1, 1, 2, 1, mask_padding=False)
    open_layer.load_state_dict(layer.state_dict())
    maps = ones[..., 0].float()
    torch.testing.assert_close(layer(maps), layer.value(maps))  # equal values: any weights do
    assert (open_layer(maps).abs() < layer(maps).abs()).all()


@pytest.mark.parametrize("mask_padding", [True, False])
def test_layer_commutes_with_shifts_by_a_block_only(mask_padding):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 24, 24, dtype=torch.float64)

    def change(layer, shift, margin=8):
        """Largest difference, two blocks from the borders, between shifting before and after."""
        moved = layer(x.roll((shift, shift), (2, 3))) - layer(x).roll((shift, shift), (2, 3))
        return moved[..., margin:-margin, margin:-margin].abs().max().item()

    options = {"mask_padding": mask_padding}
    blocked = HaloAttention(4, 2, 4, 2, **options).double()
    assert change(blocked, 4) < 1e-12
    assert change(blocked, 1) > 1e-2
    for per_pixel in (HaloAttention(4, 2, 1, 3, **options), HaloAttention(4, 2, 4, 3, reach=3)):
        assert change(per_pixel.double(), 1) < 1e-12


def test_value_width_is_free_and_the_heads_share_the_tables():
    layer = HaloAttention(8, 4, 2, 1, values=20)
    assert layer(torch.randn(3, 8, 6, 4)).shape == (3, 20, 6, 4)
    assert layer.tables.shape == (2, 7, 2)
    assert parameter_count(layer) == 2 * 64 + 160 + 28
    assert HaloAttention(8, 4, 2, 1, relative=False).tables is None


@pytest.mark.parametrize("seed", SEEDS)
def test_tables_start_with_unit_variance_of_their_logits(seed):
    torch.manual_seed(seed)
    tables = HaloAttention(64, 1, 8, 8).tables
    assert tables.std().item() == pytest.approx(64**-0.5, rel=0.05)


# Parts --------------------------------------------------------------------------------------------


def test_blocks_are_cut_and_joined():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1).double()
    blocks = split_blocks(x, 2)
    assert blocks.shape == (2, 2, 3, 2, 2, 1)
    assert blocks[0, 1, 2, ..., 0].tolist() == [[16, 17], [22, 23]]
    torch.testing.assert_close(join_blocks(blocks), x)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_windows_are_the_haloed_blocks(geometry):
    height, width, block, halo = geometry
    x = torch.randn(2, height, width, 3, dtype=torch.float64, requires_grad=True)
    windows = gather_windows(x, block, halo)
    padded = F.pad(x, (0, 0, halo, halo, halo, halo))
    size = block + 2 * halo
    assert windows.shape == (2, height // block, width // block, size, size, 3)
    views = padded.unfold(1, size, block).unfold(2, size, block).movedim(3, -1)
    assert_same(windows, views, [x])
    last = padded[:, -size:, -size:]
    torch.testing.assert_close(windows[:, -1, -1], last)


@pytest.mark.parametrize("halo", [1, 2])
def test_a_wrapped_halo_shows_the_pixels_of_its_own_block_only(halo):
    x = torch.arange(36.0).view(6, 6, 1)
    windows, blocks = gather_windows(x, 3, halo, wrap=True), split_blocks(x, 3)
    for i, j in itertools.product(range(3 + 2 * halo), repeat=2):
        assert torch.equal(windows[:, :, i, j], blocks[:, :, (i - halo) % 3, (j - halo) % 3])
    inputs = tensors(6, 6, 3, halo)
    inputs[1].data[:, :, :3, 3:] = 0.0  # keys and values of another block
    inputs[2].data[:, :, :3, 3:] = 0.0
    again = tensors(6, 6, 3, halo)
    ours, theirs = (
        halo_attention(*some[:3], 3, halo, some[3], wrap=True)[:, :, :3, :3]
        for some in (inputs, again)
    )
    assert torch.equal(ours, theirs)


def test_a_wrapped_halo_of_whole_blocks_weighs_like_none():
    queries, keys, values, _ = tensors(6, 6, 3, 3)
    wrapped = halo_attention(queries, keys, values, 3, 3, wrap=True)
    torch.testing.assert_close(wrapped, halo_attention(queries, keys, values, 3, 0))


@pytest.mark.parametrize("wrap", [False, True])
def test_weights_are_those_that_make_the_output(wrap):
    torch.manual_seed(0)
    layer = HaloAttention(6, 2, 4, 2, wrap=wrap).double()
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    weights = layer.weights(x)
    assert weights.shape == (2, 2, 8, 8, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 8, 8, dtype=torch.float64))
    values = layer.value(x).unflatten(1, (2, 3)).flatten(3)
    out = torch.einsum("nhijp,nhdp->nhdij", weights, values).flatten(1, 2)
    torch.testing.assert_close(out, layer(x))


def test_axis_mask_of_a_small_map():
    rows = axis_mask(4, 2, 1).int().tolist()
    assert rows == [[[0, 1, 1, 1]] * 2, [[1, 1, 1, 0]] * 2]
    near = axis_mask(4, 2, 1, reach=1).int().tolist()
    assert near == [[[0, 1, 1, 0], [0, 1, 1, 1]], [[1, 1, 1, 0], [0, 1, 1, 0]]]
    assert axis_mask(4, 2, 1, padding=True).all()
    assert axis_mask(4, 2, 1, stride=2, reach=1).int().tolist() == [[[0, 1, 1, 0]], [[1, 1, 1, 0]]]


# Costs --------------------------------------------------------------------------------------------


class Core(nn.Module):
    """Attention between given projections, as a module for the counter."""

    def __init__(self, block, halo, relative):
        super().__init__()
        self.block, self.halo, self.relative = block, halo, relative

    def forward(self, queries, keys, values, tables):
        tables = tables if self.relative else None
        return halo_attention(queries, keys, values, self.block, self.halo, tables)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("block", "halo"), [(4, 2), (2, 3), (8, 0), (16, 0)])
def test_counted_costs_equal_the_closed_forms(block, halo, stride, relative):
    inputs = tensors(16, 16, block, halo, stride=stride, heads=2, dim=4, value_dim=4)
    window, channels = block + 2 * halo, 8
    counted = multiply_adds(Core(block, halo, relative), *inputs) / 2  # two images
    assert counted == attention_multiply_adds(16, 16, channels, window, stride, relative)
    if not relative:
        assert counted == 2 * 16 * 16 * window**2 * channels / stride**2
    gathered = gather_windows(inputs[1], block, halo)[0].numel()
    assert gathered == neighbourhood_elements(16, 16, channels, block, halo)
    assert gathered == (16 // block) ** 2 * (block + 2 * halo) ** 2 * channels


def test_costs_of_the_extremes():
    per_pixel = neighbourhood_elements(16, 16, 8, 1, 3)
    assert per_pixel == 16 * 16 * 7**2 * 8
    assert gather_windows(torch.zeros(16, 16, 8), 1, 3).numel() == per_pixel
    assert neighbourhood_elements(16, 16, 8, 16, 0) == 16 * 16 * 8
    assert attention_multiply_adds(16, 16, 8, 16) == 2 * (16 * 16) ** 2 * 8


# The family ---------------------------------------------------------------------------------------

REPORTED = dict(zip(FAMILY, (5.5, 8.1, 9.4, 11.8, 19.1, 30.7, 43.4, 67.4), strict=True))


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_of_the_family_are_the_reported_ones(name):
    with torch.device("meta"):
        model = HaloNet(FAMILY[name])
    assert parameter_count(model) / 1e6 == pytest.approx(REPORTED[name], rel=0.005)


def test_a_small_halonet_runs_and_learns():
    torch.manual_seed(0)
    config = HaloNetConfig(4, 1, 2.0, 1.5, 2, 24)
    model = HaloNet(config, 5, bases=(8, 8, 8, 16), heads=(1, 2, 2, 4), depths=(1, 2, 1))
    x = torch.randn(2, 3, 128, 128)
    out = model(x)
    assert out.shape == (2, 5)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(isinstance(layer, HaloBlock) for layer in model) == 6


def test_only_blocks_that_change_the_map_have_a_weighted_shortcut():
    config = HaloNetConfig(2, 1, 1.0, 0.5, 1)
    assert isinstance(HaloBlock(8, 16, 2, config, 1).shortcut, nn.Identity)
    shrinking = HaloBlock(8, 16, 2, config, 2)
    assert parameter_count(shrinking.shortcut) == 8 * 8 + 2 * 8
    assert shrinking(torch.randn(2, 8, 4, 4)).shape == (2, 8, 2, 2)


# Errors -------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    queries, keys, values, tables = tensors(6, 6, 2, 1)
    with pytest.raises(ValueError, match="block of 4 does not divide a map of 6 x 6"):
        halo_attention(queries, keys, values, 4, 1)
    with pytest.raises(ValueError, match="stride of 3 does not divide a block of 2"):
        halo_attention(queries[:, :, ::3, ::3], keys, values, 2, 1)
    with pytest.raises(ValueError, match="no even sample"):
        halo_attention(queries[:, :, :4], keys, values, 2, 1)
    with pytest.raises(ValueError, match="window of 6 needs 11 offsets, got 7"):
        halo_attention(queries, keys, values, 2, 2, tables)
    with pytest.raises(ValueError, match="3 heads do not divide widths of 8 and 9"):
        HaloAttention(8, 3, 2, 1, values=9)
    with pytest.raises(ValueError, match="block of 5 does not divide a map of 6 x 4"):
        split_blocks(torch.zeros(6, 4, 1), 5)
