"""Oracles of HAT: dense attention under masks, reach, hand-written blocks, the official code's numbers and sizes."""

import math
import zlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.trunks.language import parameter_count
from reattend.vision.hat import (
    HAT,
    MEAN,
    SIZES,
    ChannelAttention,
    ChannelBlock,
    HATConfig,
    HybridBlock,
    HybridGroup,
    OverlappingAttention,
    OverlappingBlock,
    WindowAttention,
    depth_rates,
    drop_path,
    enlarge,
    from_official,
    relative_index,
    restore,
    shift_mask,
    upsampler,
)

SEEDS = (0, 1, 2)
SMALL = HATConfig(
    dim=12, groups=2, blocks=3, heads=3, window=4, compress=3, squeeze=6, drop_path=0.0
)


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"atol": 1e-12, "rtol": 1e-12} | tolerance))


def randomised(module, seed=0, size=0.4):
    """The module in float64 and evaluation mode, all of its parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(size * drawn)
    return module


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense(module, x, allowed, offset):
    """Attention of every pixel on every place of `x`, padded by the module's halo with zero keys and values.

    Args:
        allowed: [queries, keys] of all pixels and all padded places.
        offset: [2, queries, keys] of the bias table's rows, row and column.
    """
    heads, dim = module.heads, x.shape[-1]
    halo = getattr(module, "halo", 0)
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).chunk(3, -1)
    k, v = (F.pad(z, (0, 0, halo, halo, halo, halo)) for z in (k, v))
    q, k, v = (z.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    side = math.isqrt(len(module.relative_position_bias_table))
    rows = (offset[0].clamp(0, side - 1) * side + offset[1].clamp(0, side - 1)).long()
    bias = module.relative_position_bias_table[rows].movedim(-1, 0)
    logits = q @ k.mT / math.sqrt(dim // heads) + bias
    read = logits.masked_fill(~allowed, -math.inf).softmax(-1) @ v
    return module.proj(read.transpose(1, 2).flatten(2)).view(x.shape)


def places(height, width, halo=0):
    """Row and column of every place of a padded map, [places, 2], counted from the map's first pixel."""
    grid = torch.cartesian_prod(
        torch.arange(-halo, height + halo), torch.arange(-halo, width + halo)
    )
    return grid


# Windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "keys"), [(4, 4), (4, 6), (2, 6), (3, 5)])
def test_index_is_one_row_for_each_offset(window, keys):
    index = relative_index(window, keys)
    queries, around = places(window, window), places(keys, keys)
    offset = around[None] - queries[:, None]
    code = offset[..., 0] * 1000 + offset[..., 1]
    assert index.shape == (window**2, keys**2)
    assert index.unique().tolist() == list(range((window + keys - 1) ** 2))
    for row in index.unique():
        assert len(code[index == row].unique()) == 1
    assert index[0, 0] == (window - 1) * (window + keys - 1) + window - 1  # offset 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shift", [0, 2, 1])
def test_window_attention_is_dense_attention_in_windows(shift, seed):
    height, width, window = 12, 8, 4
    module = randomised(WindowAttention(6, 2, window, shift), seed)
    x = maps(2, height, width, 6, seed=seed)
    spots = places(height, width)
    # Shifted windows start at `shift`; those at the ends of the map are cut off by it.
    windows = torch.div(spots - shift, window, rounding_mode="floor")
    allowed = (windows[:, None] == windows[None]).all(-1)
    offset = (spots[None] - spots[:, None]).movedim(-1, 0) + window - 1
    close(module(x), dense(module, x, allowed, offset))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("window", "overlap"), [(4, 0.5), (4, 1.0), (6, 1 / 3), (4, 0.0)])
def test_overlapping_attention_is_dense_attention_in_wider_windows(window, overlap, seed):
    height, width = 2 * window, 3 * window
    module = randomised(OverlappingAttention(6, 3, window, overlap), seed)
    halo = module.halo
    assert halo == round(overlap * window) // 2
    x = maps(2, height, width, 6, seed=seed)
    queries, keys = places(height, width), places(height, width, halo)
    start = queries // window * window
    inside = (keys[None] >= start[:, None] - halo) & (keys[None] < start[:, None] + window + halo)
    # Rows of the table count key - query from the starts of their windows, which lie `halo` apart.
    offset = (keys[None] - queries[:, None] + halo).movedim(-1, 0) + window - 1
    close(module(x), dense(module, x, inside.all(-1), offset))


def test_without_overlap_it_is_window_attention():
    overlapping = randomised(OverlappingAttention(6, 2, 4, 0.0))
    plain = WindowAttention(6, 2, 4).double()
    plain.load_state_dict(overlapping.state_dict())
    x = maps(2, 8, 12, 6)
    close(overlapping(x), plain(x))


def reach(module, height, width, row, column, dim=6):
    """Which pixels the output at one pixel depends on."""
    x = maps(1, height, width, dim).requires_grad_()
    module(x)[0, row, column].sum().backward()
    return x.grad[0].abs().sum(-1) > 1e-12


@pytest.mark.parametrize(
    ("module", "rows", "columns"),
    [
        (WindowAttention(6, 2, 4), (4, 8), (8, 12)),
        (WindowAttention(6, 2, 4, 2), (2, 6), (6, 10)),
        (OverlappingAttention(6, 2, 4, 0.5), (3, 9), (7, 13)),
        (OverlappingAttention(6, 2, 4, 0.5, wrap=True), (4, 8), (8, 12)),
    ],
    ids=["window", "shifted", "overlapping", "own"],
)
def test_reach(module, rows, columns):
    seen = reach(randomised(module), 12, 16, 4, 8)
    expected = torch.zeros(12, 16, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(seen, expected)


def test_the_placebo_costs_as_much():
    method, placebo = (OverlappingAttention(6, 2, 4, 0.5, wrap) for wrap in (False, True))
    assert parameter_count(method) == parameter_count(placebo)
    placebo.load_state_dict(method.state_dict())
    x = maps(1, 8, 8, 6).float()
    assert not torch.allclose(method(x), placebo(x))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 8), (4, 16)])
def test_shift_mask_parts_the_ends_of_the_map(height, width):
    mask = shift_mask(height, width, 4, 2)
    assert mask.shape == (height // 4, width // 4, 16, 16)
    assert mask[: height // 4 - 1, : width // 4 - 1].all()
    last = mask[-1, -1].view(4, 4, 4, 4)
    assert last[0, 0].sum() == 4  # of the 16, those before both ends
    assert last[0, 0, 1, 1]
    assert not last[0, 0, 2, 0]
    assert not last[0, 0, 0, 2]


def test_bad_overlap_is_refused():
    with pytest.raises(ValueError, match="even"):
        OverlappingAttention(6, 2, 6, 0.5)
    with pytest.raises(ValueError, match="even"):
        OverlappingAttention(6, 2, 4, 0.4)


# Blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_channel_attention_weighs_by_the_whole_picture(seed):
    module = randomised(ChannelAttention(6, 1), seed)
    x = 1 + maps(3, 6, 5, 7, seed=seed)
    first, _, second, _ = module.attention
    pooled = x.mean((2, 3))
    hidden = (pooled @ first.weight[..., 0, 0].T + first.bias).relu()
    gate = torch.sigmoid(hidden @ second.weight[..., 0, 0].T + second.bias)
    close(module(x), x * gate[..., None, None])
    assert not torch.allclose(gate[0], gate[1])


def test_a_blind_gate_is_the_same_for_all_pictures():
    module = randomised(ChannelAttention(6, 3, blind=True))
    x = maps(3, 6, 5, 7)
    gates = module(x) / x
    close(gates, gates[:1, :, :1, :1].expand_as(gates))
    sighted = ChannelAttention(6, 3).double()
    sighted.load_state_dict(module.state_dict())
    assert not torch.allclose(sighted(x), module(x))


def test_channel_block_sees_the_whole_picture_and_its_placebo_five_by_five():
    seen = reach(randomised(ChannelBlock(6, 2, 3)), 9, 10, 4, 4)
    assert seen.all()
    local = reach(randomised(ChannelBlock(6, 2, 3, blind=True)), 9, 10, 4, 4)
    assert local.sum() == 25
    assert local[2:7, 2:7].all()


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


@pytest.mark.parametrize("seed", SEEDS)
def test_hybrid_block(seed):
    block = randomised(HybridBlock(replace(SMALL, alpha=0.3), shift=2), seed)
    x = maps(2, 8, 12, 12, seed=seed)
    normed = norm(block.norm1, x)
    convolved = block.conv_block(normed)
    middle = x + block.attn(normed) + 0.3 * convolved
    close(block(x), middle + block.mlp(norm(block.norm2, middle)))


def test_stochastic_depth_never_drops_the_channel_block():
    block = randomised(HybridBlock(replace(SMALL, alpha=0.3), shift=0, rate=0.999))
    nn.init.zeros_(block.mlp[2].weight), nn.init.zeros_(block.mlp[2].bias)
    x = maps(2, 8, 8, 12)
    torch.manual_seed(0)
    close(block.train()(x), x + 0.3 * block.conv_block(norm(block.norm1, x)))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 1, 1, dtype=torch.float64)
    dropped = drop_path(x, 0.2, training=True)
    assert dropped.unique().tolist() == [0, 1.25]
    assert abs(dropped.mean() - 1) < 0.02
    assert drop_path(x, 0.2, training=False) is x
    rates = depth_rates(replace(SMALL, drop_path=0.1))
    close(torch.tensor(rates), torch.linspace(0, 0.1, 6).view(2, 3), atol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_overlapping_block(seed):
    block = randomised(OverlappingBlock(SMALL), seed)
    x = maps(2, 8, 12, 12, seed=seed)
    middle = x + block.attn(norm(block.norm1, x))
    close(block(x), middle + block.mlp(norm(block.norm2, middle)))


def test_group():
    group = randomised(HybridGroup(SMALL, [0.0, 0.0, 0.0]))
    assert [block.attn.shift for block in group.blocks] == [0, 2, 0]
    x = maps(1, 8, 8, 12)
    y = x
    for block in group.blocks:
        y = block(y)
    y = group.overlap_attn(y).movedim(-1, 1)
    close(group(x), x + group.conv(y).movedim(1, -1))


def test_with_alpha_zero_and_without_overlap_block_it_is_swinir():
    hat = randomised(HAT(replace(SMALL, alpha=0.0, ocab="off"), 2))
    swinir = HAT(replace(SMALL, cab="off", ocab="off"), 2).double().eval()
    known = swinir.state_dict()
    swinir.load_state_dict({k: v for k, v in hat.state_dict().items() if k in known})
    x = maps(1, 3, 8, 8)
    close(swinir(x), hat(x))


# Network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_an_empty_last_convolution_leaves_the_mean_colour_or_the_enlargement(scale):
    pictures = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    model = HAT(SMALL, scale).eval()
    nn.init.zeros_(model.conv_last.weight), nn.init.zeros_(model.conv_last.bias)
    found = model(pictures)
    assert found.shape == (2, 3, 8 * scale, 12 * scale)
    close(found, torch.tensor(MEAN)[:, None, None].expand_as(found), atol=1e-6)
    skipping = HAT(SMALL, scale, skip=True).eval()
    close(skipping(pictures), enlarge(pictures, scale))


def test_network_step_by_step():
    model = randomised(HAT(replace(SMALL, groups=1), 2, features=5), 1, 0.2)
    x = maps(1, 3, 8, 8)
    shallow = model.conv_first(x - torch.tensor(MEAN).double()[:, None, None])
    tokens = norm(model.patch_norm, shallow.movedim(1, -1))
    tokens = norm(model.norm, model.layers[0](tokens))
    deep = shallow + model.conv_after_body(tokens.movedim(-1, 1))
    y = F.leaky_relu(model.conv_before_upsample(deep), 0.01)
    y = F.pixel_shuffle(model.upsample[0](y), 2)
    # MEAN is kept in single precision
    expected = model.conv_last(y) + torch.tensor(MEAN).double()[:, None, None]
    close(model(x), expected, atol=1e-6, rtol=1e-6)


def test_restore_takes_any_size():
    model = HAT(SMALL, 2).eval()
    picture = torch.rand(1, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    found = restore(model, picture)
    assert found.shape == (1, 3, 14, 20)
    mirrored = torch.cat([picture, picture[:, :, -2:-1]], 2)
    mirrored = torch.cat([mirrored, mirrored[..., -2:-1], mirrored[..., -3:-2]], 3)
    close(found, model(mirrored)[..., :14, :20])
    whole = mirrored[:, :, :8, :8]
    close(restore(model, whole), model(whole))
    with pytest.raises(ValueError, match="too small"):
        restore(model, picture[..., :1, :])


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        upsampler(6, 4)


@pytest.mark.parametrize(
    ("name", "count"),
    [("SwinIR", 11_900_199), ("HAT-S", 9_621_183), ("HAT", 20_772_507), ("HAT-L", 40_846_575)],
)
def test_published_networks_have_the_official_number_of_parameters(name, count):
    with torch.device("meta"):
        assert parameter_count(HAT(SIZES[name])) == count


# Official code ------------------------------------------------------------------------------------

OFFICIAL = HATConfig(dim=12, groups=1, blocks=2, heads=3, window=4, squeeze=6)


def official_shapes(config, scale=2, features=64):
    """Names and shapes of the official checkpoint's parameters, with one group of blocks."""
    dim, hidden, narrow = (
        config.dim,
        int(config.dim * config.mlp_ratio),
        config.dim // config.compress,
    )
    squeezed, keys = config.dim // config.squeeze, round((1 + config.overlap) * config.window)

    def layer(name, outputs, *inputs):
        return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}

    def attention(name, rows):
        table = {f"{name}.relative_position_bias_table": (rows, config.heads)}
        return table | layer(f"{name}.qkv", 3 * dim, dim) | layer(f"{name}.proj", dim, dim)

    def block(name):
        parts = layer(f"{name}.norm1", dim) | layer(f"{name}.norm2", dim)
        return parts | layer(f"{name}.mlp.fc1", hidden, dim) | layer(f"{name}.mlp.fc2", dim, hidden)

    group = "layers.0.residual_group"
    shapes = layer("conv_first", dim, 3, 3, 3) | layer("patch_embed.norm", dim)
    for number in range(config.blocks):
        name = f"{group}.blocks.{number}"
        cab = f"{name}.conv_block.cab"
        shapes |= block(name) | attention(f"{name}.attn", (2 * config.window - 1) ** 2)
        shapes |= layer(f"{cab}.0", narrow, dim, 3, 3) | layer(f"{cab}.2", dim, narrow, 3, 3)
        shapes |= layer(f"{cab}.3.attention.1", squeezed, dim, 1, 1)
        shapes |= layer(f"{cab}.3.attention.3", dim, squeezed, 1, 1)
    overlapping = f"{group}.overlap_attn"
    shapes |= block(overlapping) | attention(overlapping, (config.window + keys - 1) ** 2)
    shapes |= layer("layers.0.conv", dim, dim, 3, 3) | layer("norm", dim)
    shapes |= layer("conv_after_body", dim, dim, 3, 3)
    shapes |= layer("conv_before_upsample.0", features, dim, 3, 3)
    shapes |= layer("upsample.0", 4 * features, features, 3, 3)
    return shapes | layer("conv_last", 3, features, 3, 3)


def waves(name, shape):
    """Numbers of a fixed pattern, another one for every name."""
    phase = zlib.crc32(name.encode()) % 1000
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.3 * torch.sin(phase + 1.7 * count)).view(shape)


def test_official_numbers():
    """Outputs of the official network at three pixels, and their mean, on weights and a picture made of waves."""
    state = {name: waves(name, shape) for name, shape in official_shapes(OFFICIAL).items()}
    state["relative_position_index_SA"] = torch.zeros(16, 16)  # a buffer, to be left out
    model = HAT(OFFICIAL, 2).double().eval()
    model.load_state_dict(from_official(state, OFFICIAL))
    found = model(waves("picture", (1, 3, 12, 8)).abs())
    assert found.shape == (1, 3, 24, 16)
    numbers = [
        found[0, 0, 0, 0],
        found[0, 1, 11, 7],
        found[0, 2, 23, 15],
        found.mean(),
        found.std(),
    ]
    expected = [0.414934, 0.262997, 0.162442, 0.308283, 0.241972]
    torch.testing.assert_close(
        torch.stack(numbers), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5
    )
