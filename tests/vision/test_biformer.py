"""Oracles of bi-level routing attention, of its baselines, of the BiFormer models and of the cost."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from reattend.attention.block_sparse import block_sparse_attention
from reattend.attention.dense import dense_attention
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import Stage, VisionTrunk, multiply_adds
from reattend.vision.biformer import (
    FULL,
    VARIANTS,
    Attention,
    BiFormer,
    Block,
    Layout,
    Pattern,
    attend,
    best_side,
    bra_cost,
    dense,
    dense_cost,
    dilated,
    fixed,
    gather_regions,
    least_attention,
    nearest_regions,
    partition,
    random_groups,
    random_regions,
    region_affinity,
    route,
    routed,
    routed_mask,
    routed_regions,
    sliding,
    unpartition,
    window,
)

# batch, height, width, side, heads, channels: awkward sizes on purpose.
SHAPES = [(1, 4, 4, 2, 1, 3), (2, 6, 9, 3, 2, 10), (3, 10, 5, 5, 3, 12), (2, 8, 8, 4, 4, 8)]
IDS = [f"B{b}-{h}x{w}-S{s}-h{n}-C{c}" for b, h, w, s, n, c in SHAPES]
SEEDS = [0, 1, 2]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int, height: int, width: int, channels: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values whose attention is far from uniform."""
    drawn = 2 * torch.randn(3, batch, height, width, channels, generator=rng(seed))
    return [x.clone().requires_grad_() for x in drawn]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=rng(99))
    return torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True)


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], tolerance: float = 1e-10):
    """Equal outputs and equal gradients."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for one, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def flat_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, ..., channels] to [batch, heads, tokens, dim] with tokens in the order of x."""
    return x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)


def reference(qkv: list[Tensor], mask: Tensor, heads: int, scale: float) -> Tensor:
    """Dense attention under a mask over tokens in row order, [tokens, tokens] or with a batch."""
    mask = mask if mask.ndim == 3 else mask[None]
    out = dense_attention(*(flat_heads(x, heads) for x in qkv), mask=mask[:, None], scale=scale)
    return out.transpose(1, 2).flatten(2).view(qkv[2].shape)


def places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every token in row order."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rows.flatten(), columns.flatten()


def equal_pairs(*codes: Tensor) -> Tensor:
    """Which pairs of tokens agree in all codes."""
    return torch.stack([c[:, None] == c for c in codes]).all(0)


# Regions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "height", "width", "side", "heads", "channels"), SHAPES, ids=IDS)
def test_regions_are_slices_of_the_image_and_go_back(batch, height, width, side, heads, channels):
    image = images(batch, height, width, channels)[0]
    regions = partition(image, side, side)
    tall, wide = height // side, width // side
    assert regions.shape == (batch, side**2, tall * wide, channels)
    for row in range(side):
        for column in range(side):
            piece = image[:, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            torch.testing.assert_close(regions[:, row * side + column], piece.flatten(1, 2))
    assert torch.equal(unpartition(regions, side, height, width), image)


@pytest.mark.parametrize(("batch", "height", "width", "side", "heads", "channels"), SHAPES, ids=IDS)
def test_affinity_is_that_of_average_pooled_queries_and_keys(
    batch, height, width, side, heads, channels
):
    query, key, _ = images(batch, height, width, channels)
    ours = region_affinity(partition(query, side, side), partition(key, side, side))
    pooled = [
        functional.avg_pool2d(x.permute(0, 3, 1, 2), (height // side, width // side)).flatten(2)
        for x in (query, key)
    ]
    torch.testing.assert_close(ours, pooled[0].mT @ pooled[1], atol=1e-12, rtol=1e-12)
    assert not ours.requires_grad  # routing gets no gradient


def test_route_lists_the_largest_affinities_best_first():
    affinity = torch.tensor([[[0.1, 0.9, -3.0, 0.5]] * 4])
    assert route(affinity, 3)[0, 0].tolist() == [1, 3, 0]
    assert route(affinity, 1, force_self=True)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert route(affinity, 2, force_self=True)[0].tolist() == [[0, 1], [1, 3], [2, 1], [3, 1]]


def test_gathered_tokens_follow_the_index():
    tensor = torch.arange(24.0).view(1, 4, 3, 2)
    gathered = gather_regions(tensor, torch.tensor([[[3, 0]] * 4]))
    assert torch.equal(gathered[0, 2], torch.cat([tensor[0, 3], tensor[0, 0]]))


# Bi-level routing attention -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "height", "width", "side", "heads", "channels"), SHAPES, ids=IDS)
def test_equals_dense_attention_under_the_routed_mask(
    batch, height, width, side, heads, channels, seed
):
    qkv = images(batch, height, width, channels, seed)
    for topk in {1, 2, side**2 - 1}:
        ours = routed(side, topk)(*qkv, heads=heads, scale=0.4)
        regions = [partition(x, side, side) for x in qkv]
        index = route(region_affinity(*regions[:2]), topk)
        assert index.shape == (batch, side**2, topk)
        tokens = regions[0].shape[2]
        mask = routed_mask(index, tokens)
        assert (mask.sum(-1) == topk * tokens).all()
        theirs = reference(regions, mask, heads, 0.4).flatten(1, 2).unflatten(1, (side**2, -1))
        assert_same(ours, unpartition(theirs, side, height, width), qkv)
        fused = functional.scaled_dot_product_attention(
            *(flat_heads(x, heads) for x in regions), attn_mask=mask[:, None], scale=0.4
        )
        fused = fused.transpose(1, 2).flatten(2).unflatten(1, (side**2, -1))
        torch.testing.assert_close(ours, unpartition(fused, side, height, width))


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_shared_block_sparse_operator(seed):
    qkv = images(2, 8, 12, 12, seed)
    ours = routed(4, 3)(*qkv, heads=2, scale=0.3)
    regions = [partition(x, 4, 4) for x in qkv]
    index = route(region_affinity(*regions[:2]), 3)
    blocks = functional.one_hot(index, 16).bool().any(2)[:, None]
    theirs = block_sparse_attention(
        *(flat_heads(x, 2) for x in regions),
        blocks,
        block_size=6,
        scale=0.3,
        backend="gather",
        causal=False,
    )
    theirs = theirs.transpose(1, 2).flatten(2).unflatten(1, (16, -1))
    assert_same(ours, unpartition(theirs, 4, 8, 12), qkv)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "height", "width", "side", "heads", "channels"), SHAPES, ids=IDS)
def test_all_regions_are_full_attention(batch, height, width, side, heads, channels, seed):
    qkv = images(batch, height, width, channels, seed)
    full = dense(*qkv, heads=heads, scale=0.4)
    everything = torch.ones(height * width, height * width, dtype=torch.bool)
    assert_same(full, reference(qkv, everything, heads, 0.4), qkv)
    assert_same(routed(side, side**2)(*qkv, heads=heads, scale=0.4), full, qkv)
    assert_same(routed(1, 1)(*qkv, heads=heads, scale=0.4), full, qkv)
    single = [x.detach().float() for x in qkv]
    difference = routed(side, side**2)(*single, heads=heads, scale=0.4) - dense(
        *single, heads=heads, scale=0.4
    )
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_forced_self_region_alone_is_window_attention(seed):
    qkv = images(2, 6, 6, 8, seed)
    ours = routed(2, 1, force_self=True)(*qkv, heads=2, scale=0.4)
    assert_same(ours, window(*qkv, size=3, heads=2, scale=0.4), qkv)
    assert_same(fixed(2, nearest_regions(2, 1))(*qkv, heads=2, scale=0.4), ours, qkv)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_gathered_regions_is_irrelevant(seed):
    query, key, value = (partition(x, 3, 3) for x in images(2, 6, 6, 8, seed))
    index = route(region_affinity(query, key), 4)
    shuffled = index[..., torch.randperm(4, generator=rng(seed))]
    outputs = [
        attend(query, gather_regions(key, i), gather_regions(value, i), heads=2, scale=0.5)
        for i in (index, shuffled)
    ]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_rolling_by_whole_regions_rolls_the_output(seed):
    torch.manual_seed(seed)
    layer = Attention(8, 2, routed(4, 3), lce=0)
    x = torch.randn(2, 8, 8, 12)
    move = {"shifts": (4, -3), "dims": (2, 3)}
    torch.testing.assert_close(layer(x.roll(**move)), layer(x).roll(**move), atol=1e-12, rtol=0)


def test_without_convolutions_order_inside_a_region_does_not_matter():
    torch.manual_seed(0)
    layer = Attention(8, 2, routed(2, 2), lce=0)
    x = torch.randn(1, 8, 6, 6)

    def shuffle(image: Tensor) -> Tensor:
        regions = partition(image.permute(0, 2, 3, 1), 2, 2)
        order = torch.randperm(9, generator=rng(1))
        return unpartition(regions[:, :, order], 2, 6, 6).permute(0, 3, 1, 2)

    torch.testing.assert_close(layer(shuffle(x)), shuffle(layer(x)), atol=1e-12, rtol=0)
    with_lce = Attention(8, 2, routed(2, 2))
    assert not torch.allclose(with_lce(shuffle(x)), shuffle(with_lce(x)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_change_of_affinity_that_keeps_the_top_k_changes_nothing(seed):
    qkv = images(2, 6, 6, 8, seed)
    before = routed(3, 4)(*qkv, heads=2, scale=0.5)

    def select(query: Tensor, key: Tensor) -> Tensor:
        return route(torch.tanh(0.01 * region_affinity(query, key)) - 5, 4)

    after = partial(routed(3, 4), select=select)(*qkv, heads=2, scale=0.5)
    assert_same(before, after, qkv, tolerance=1e-12)


# Other patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("height", "width", "size"), [(6, 9, 3), (8, 4, 4), (8, 8, 2), (5, 5, 5)])
def test_windows_and_shifted_windows(height, width, size, seed):
    qkv = images(2, height, width, 6, seed)
    rows, columns = places(height, width)
    mask = equal_pairs(rows // size, columns // size)
    ours = window(*qkv, size=size, heads=2, scale=0.7)
    assert_same(ours, reference(qkv, mask, 2, 0.7), qkv)
    # A shifted grid cuts at half a window, and its first and last stripes are narrower.
    mask = equal_pairs((rows - size // 2) // size, (columns - size // 2) // size)
    ours = window(*qkv, size=size, heads=2, scale=0.7, shifted=True)
    assert_same(ours, reference(qkv, mask, 2, 0.7), qkv)


@pytest.mark.parametrize(("height", "width", "interval"), [(6, 9, 3), (8, 4, 2), (5, 7, 1)])
def test_dilated(height, width, interval):
    qkv = images(2, height, width, 6)
    rows, columns = places(height, width)
    mask = equal_pairs(rows % interval, columns % interval)
    ours = dilated(*qkv, interval=interval, heads=2, scale=0.7)
    assert_same(ours, reference(qkv, mask, 2, 0.7), qkv)


@pytest.mark.parametrize(
    ("height", "width", "block", "halo"), [(6, 9, 3, 1), (4, 8, 2, 2), (5, 5, 1, 1)]
)
def test_sliding_blocks_see_their_halo_without_the_padding(height, width, block, halo):
    qkv = images(2, height, width, 6)
    mask = torch.ones(height * width, height * width, dtype=torch.bool)
    for axis in places(height, width):
        start = axis // block * block
        mask &= (axis >= start[:, None] - halo) & (axis < start[:, None] + block + halo)
    ours = sliding(*qkv, block=block, halo=halo, heads=2, scale=0.7)
    assert_same(ours, reference(qkv, mask, 2, 0.7), qkv)


def test_nearest_and_random_regions():
    nearest = nearest_regions(4, 5)
    assert nearest[5].tolist() == [5, 1, 4, 6, 9]  # itself and its four neighbours
    assert nearest[0].tolist() == [0, 1, 4, 5, 2]
    drawn = random_regions(4, 5, rng(0))
    assert drawn.shape == (16, 5)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    assert torch.equal(drawn, random_regions(4, 5, rng(0)))
    assert not torch.equal(drawn, random_regions(4, 5, rng(1)))


# The module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_random_groups_are_closed(seed):
    index = random_groups(4, 4, rng(seed))
    groups = [frozenset(row) for row in index.tolist()]
    assert all(region in group for region, group in enumerate(groups))
    assert len(set(groups)) == 4
    assert all(len(group) == 4 for group in groups)
    assert not torch.equal(index, random_groups(4, 4, rng(seed + 1)))
    with pytest.raises(ValueError, match="16 regions cannot be dealt into groups of 5"):
        random_groups(4, 5, rng(0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lce_of", ["value", "input"])
def test_module_adds_lce_before_the_output_projection(lce_of, seed):
    torch.manual_seed(seed)
    layer = Attention(12, 3, routed(3, 2), lce_of=lce_of)
    x = torch.randn(2, 12, 6, 9, requires_grad=True)
    weights, bias = layer.qkv.weight.split(12), layer.qkv.bias.split(12)
    qkv = [functional.linear(x.movedim(1, -1), w, b) for w, b in zip(weights, bias, strict=True)]
    regions = [partition(part, 3, 3) for part in qkv]
    index = route(region_affinity(*regions[:2]), 2)
    mixed = reference(regions, routed_mask(index, 6), 3, 12**-0.5)  # C^-1/2, not (C / heads)^-1/2
    mixed = unpartition(mixed.flatten(1, 2).unflatten(1, (9, -1)), 3, 6, 9)
    convolved = qkv[2].movedim(-1, 1) if lce_of == "value" else x
    local = functional.conv2d(
        convolved, layer.lepe.weight, layer.lepe.bias, padding=2, groups=12
    ).movedim(1, -1)
    theirs = functional.linear(mixed + local, layer.proj.weight, layer.proj.bias).movedim(-1, 1)
    assert_same(layer(x), theirs, [x, *layer.parameters()])
    assert torch.equal(routed_regions(layer, x, 3, 2), index)


def test_block_is_position_attention_and_mlp_with_shortcuts():
    torch.manual_seed(0)
    block = Block(8, Attention(8, 2, dense), ratio=3, position=True, drop_path=0.5).eval()
    x = torch.randn(2, 8, 4, 6)

    def norm(y: Tensor, layer: nn.LayerNorm) -> Tensor:
        centred = y - y.mean(1, keepdim=True)
        scaled = centred / (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]

    for layer in (block.norm1, block.norm2):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    y = x + block.pos_embed(x)
    y = y + block.attn(norm(y, block.norm1))
    y = y + block.mlp(norm(y, block.norm2).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(block(x), y, atol=1e-10, rtol=1e-10)


def test_dropped_paths_keep_the_expectation():
    torch.manual_seed(0)
    block = Block(4, Attention(4, 1, dense), ratio=1, position=False, drop_path=0.25)
    branch = torch.ones(20_000, 4, 1, 1)
    kept = block._kept(branch)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert block.eval()._kept(branch) is branch


# Models -------------------------------------------------------------------------------------------


def on_meta(name: str) -> BiFormer:
    with torch.device("meta"):
        return BiFormer(VARIANTS[name]).eval()


# Reported: 13.1, 25.5, 56.8 and 28.4 M.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("T", 13_142_760), ("S", 25_536_232), ("B", 56_804_968), ("STL", 28_372_552)],
)
def test_parameter_counts_are_those_of_the_paper(name, parameters):
    assert parameter_count(on_meta(name)) == parameters


@pytest.mark.parametrize(("name", "giga"), [("T", 2.2), ("STL", 4.6)])
def test_multiply_adds_at_224_are_those_of_the_paper(name, giga):
    with torch.device("meta"):
        counted = multiply_adds(on_meta(name), torch.empty(1, 3, 224, 224))
    assert round(counted / 1e9, 1) == giga


def test_official_names_and_the_odd_last_stage():
    model = on_meta("T")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["downsample_layers.0.3.weight"] == (64, 32, 3, 3)
    assert shapes["stages.2.7.attn.qkv.bias"] == (768,)
    assert shapes["stages.2.7.attn.lepe.weight"] == (256, 1, 5, 5)
    assert shapes["stages.3.1.mlp.3.weight"] == (512, 1536)
    assert "stages.3.0.attn.qkv.bias" not in shapes  # full attention is built without it
    heads = [stage[0].attn.heads for stage in model.stages]
    assert heads == [2, 4, 8, 8]
    scales = [stage[0].attn.scale for stage in model.stages]
    assert scales == pytest.approx([64**-0.5, 128**-0.5, 256**-0.5, (512 / 8) ** -0.5])
    assert all(norm.eps == 1e-6 for norm in (model.stages[0][0].norm1, model.stages[3][1].norm2))


def test_drop_path_rises_linearly_from_0_over_all_blocks():
    layout = Layout((32, 64), (2, 3), ratio=1)
    model = BiFormer(layout, classes=2, side=2, topks=(1, FULL), drop_path=0.2)
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("swin", [False, True])
def test_small_pyramid_trains_end_to_end(swin):
    torch.manual_seed(0)
    layout = Layout((32, 64), (1, 1), ratio=2, swin=swin)
    model = BiFormer(layout, classes=5, channels=1, side=4, topks=(2, FULL), drop_path=0.1)
    logits = model(torch.randn(3, 1, 32, 32))
    assert logits.shape == (3, 5)
    functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_fits_the_shared_trunk():
    stage = Stage(8, 2, lambda width, stride: Attention(width, 2, routed(2, 1)))
    model = VisionTrunk(3, [stage], stem_stride=4).double()
    assert model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 3)


# Cost ---------------------------------------------------------------------------------------------


def counted(pattern: Pattern, height: int, width: int, channels: int) -> int:
    """Torch's count for a whole layer without LCE."""
    with torch.device("meta"):
        layer = Attention(channels, 1, pattern, lce=0)
        return multiply_adds(layer, torch.empty(1, channels, height, width))


@pytest.mark.parametrize(
    ("height", "width", "side", "topk", "channels"),
    [(56, 56, 7, 1, 64), (28, 28, 7, 4, 128), (6, 9, 3, 2, 10), (27, 27, 9, 1, 32)],
)
def test_counted_multiply_adds_are_the_closed_form(height, width, side, topk, channels):
    tokens = height * width
    ours = counted(routed(side, topk), height, width, channels)
    assert ours == sum(bra_cost(tokens, side, topk, channels))
    assert counted(dense, height, width, channels) == sum(dense_cost(tokens, channels))


def test_keys_per_query_of_the_published_stages():
    for tokens, topk in ((56**2, 1), (28**2, 4), (14**2, 16)):
        assert bra_cost(tokens, 7, topk, 32).tokens == 2 * tokens * 64 * 32
    assert dense_cost(7**2, 32).tokens == 2 * 49 * 49 * 32


@pytest.mark.parametrize("topk", [1, 4, 16])
@pytest.mark.parametrize("tokens", [64, 27**2, 56**2])
def test_best_side_is_the_minimum(tokens, topk):
    side = best_side(tokens, topk)
    least = bra_cost(tokens, side, topk, 8).attention
    assert least == pytest.approx(least_attention(tokens, topk, 8), rel=1e-12)
    assert least < min(bra_cost(tokens, side * f, topk, 8).attention for f in (0.99, 1.01))


# Refusals -----------------------------------------------------------------------------------------


def test_refusals_name_the_cure():
    image = torch.zeros(1, 6, 6, 4)
    with pytest.raises(ValueError, match="6 x 6 tokens cannot be cut into 4 x 4 regions"):
        partition(image, 4, 4)
    for topk in (0, 5):
        with pytest.raises(ValueError, match=f"between 1 and the number of regions 4, got {topk}"):
            route(torch.zeros(1, 4, 4), topk)
    qkv, setting = [image] * 3, {"heads": 1, "scale": 1.0}
    with pytest.raises(ValueError, match="interval 4 does not divide 6 x 6"):
        dilated(*qkv, interval=4, **setting)
    with pytest.raises(ValueError, match="window 4 does not divide 6 x 6"):
        window(*qkv, size=4, **setting)
    with pytest.raises(ValueError, match="block 4 does not divide 6 x 6"):
        sliding(*qkv, block=4, halo=1, **setting)
    with pytest.raises(ValueError, match="3 heads cannot share 4 channels"):
        Attention(4, 3, dense)
    with pytest.raises(ValueError, match="odd, or 0"):
        Attention(4, 2, dense, lce=4)
    assert math.isclose(Attention(4, 2, dense, scale=0.3).scale, 0.3)
