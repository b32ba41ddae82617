"""Oracles of CrossFormer: groups by index arithmetic, masked dense attention, official outputs, closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.attention.dense import dense_attention
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import Stage, VisionTrunk, multiply_adds
from reattend.vision.crossformer import (
    VARIANTS,
    Block,
    CrossFormer,
    DynamicPositionBias,
    GroupAttention,
    Layout,
    PatchEmbedding,
    PatchMerging,
    PositionTable,
    RandomGroupAttention,
    ShiftedWindowAttention,
    SpatialReductionAttention,
    channel_shares,
    dense_cost,
    group_cost,
    grouped,
    lsda,
    offset_index,
    offsets,
    reduced_offsets,
    ungrouped,
)

SEEDS = (0, 1, 2)
# height, width, size, interval: windows, one LDA square, several squares, maps that are not square
MAPS = [(6, 9, 3, 1), (6, 6, 3, 2), (12, 8, 2, 2), (9, 18, 3, 3), (5, 5, 5, 1), (10, 20, 5, 2)]
IDS = [f"{h}x{w}-G{g}-I{i}" for h, w, g, i in MAPS]


@pytest.fixture(autouse=True)
def _double_and_seeded():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shaken(module, seed=0):
    """A module in evaluation mode whose weights are far from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def places(height, width):
    """Row and column of every token, row by row."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(1)


def group_numbers(height, width, size, interval):
    """Which group a token belongs to, by arithmetic: its square, and its remainder in the square."""
    square = size * interval
    codes = [(place // square) * interval + place % interval for place in places(height, width)]
    return codes[0] * 10_000 + codes[1]


def reference(attention, x, seen, offset_rows=None):
    """Dense attention under a mask over all tokens of a map, with a bias [heads, tokens, tokens]."""
    flat = x.flatten(2).mT
    q, k, v = attention.qkv(flat).chunk(3, -1)
    split = (y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (q, k, v))
    q, k, v = split
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if offset_rows is not None:
        scores = scores + offset_rows
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return attention.proj(mixed).mT.unflatten(2, x.shape[2:])


# Embedding ----------------------------------------------------------------------------------------


def test_shares_of_channels():
    assert channel_shares(64, 4) == [32, 16, 8, 8]
    assert channel_shares(96, 2) == [48, 48]
    assert channel_shares(7, 1) == [7]
    for width, kernels in ((32, 1), (48, 3), (80, 5)):
        assert sum(channel_shares(width, kernels)) == width
    with pytest.raises(ValueError, match="width 12 cannot be shared by 4 kernels"):
        channel_shares(12, 4)


def test_tokens_concatenate_patches_around_one_centre():
    embedding = shaken(PatchEmbedding(3, 16, (2, 4, 8, 16), 2))
    pictures = random(2, 3, 10, 14)
    tokens = []
    for convolve in embedding.projs:
        side = convolve.kernel_size[0]
        margin = (side - 2) // 2
        padded = F.pad(pictures, (margin,) * 4)
        rows = []
        for row in range(5):
            patches = [
                padded[:, :, 2 * row : 2 * row + side, 2 * column : 2 * column + side]
                for column in range(7)
            ]
            rows.append(
                torch.stack(
                    [torch.einsum("bchw,ochw->bo", p, convolve.weight) for p in patches], -1
                )
            )
        tokens.append(torch.stack(rows, 2) + convolve.bias[:, None, None])
    expected = torch.cat(tokens, 1).movedim(1, -1)
    expected = F.layer_norm(expected, (16,), embedding.norm.weight, embedding.norm.bias, 1e-5)
    close(embedding(pictures), expected.movedim(-1, 1))
    assert [c.out_channels for c in embedding.projs] == [8, 4, 2, 2]


def test_one_kernel_is_a_plain_patch_embedding():
    embedding = shaken(PatchEmbedding(1, 6, (4,), 4))
    pictures = random(2, 1, 8, 12)
    patches = F.unfold(pictures, 4, stride=4).mT @ embedding.projs[0].weight.flatten(1).T
    patches = patches + embedding.projs[0].bias
    expected = F.layer_norm(patches, (6,), embedding.norm.weight, embedding.norm.bias, 1e-5)
    close(embedding(pictures).flatten(2).mT, expected)


def test_merging_norms_first_and_doubles_the_channels():
    merging = shaken(PatchMerging(4, (2, 4)))
    x = random(2, 4, 6, 10)
    normed = F.layer_norm(x.movedim(1, -1), (4,), merging.norm.weight, merging.norm.bias, 1e-5)
    normed = normed.movedim(-1, 1)
    small, large = merging.reductions
    expected = [
        F.conv2d(normed, small.weight, small.bias, stride=2),
        F.conv2d(normed, large.weight, large.bias, stride=2, padding=1),
    ]
    close(merging(x), torch.cat(expected, 1))
    assert merging(x).shape == (2, 8, 3, 5)


@pytest.mark.parametrize("kernels", [(4, 7), (4, 2), (3, 8)])
def test_kernels_that_cannot_be_centred_are_refused(kernels):
    with pytest.raises(ValueError, match="must exceed the stride 4 by even numbers"):
        PatchEmbedding(1, 8, kernels, 4)


# Groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size", "interval"), MAPS, ids=IDS)
def test_groups_hold_the_tokens_that_arithmetic_names(height, width, size, interval):
    numbers = torch.arange(height * width).view(1, height, width, 1)
    groups = grouped(numbers.double(), size, interval)[0, :, :, 0].long()
    assert groups.shape == (height * width // size**2, size**2)
    assert groups.flatten().sort().values.tolist() == list(range(height * width))
    codes = group_numbers(height, width, size, interval)
    for tokens in groups:
        assert len(codes[tokens].unique()) == 1
        rows, columns = tokens // width, tokens % width
        local = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        assert torch.equal(rows - rows[0], interval * local[:, 0])
        assert torch.equal(columns - columns[0], interval * local[:, 1])


@pytest.mark.parametrize(("height", "width", "size", "interval"), MAPS, ids=IDS)
def test_groups_go_back(height, width, size, interval):
    x = random(2, height, width, 3)
    assert torch.equal(ungrouped(grouped(x, size, interval), size, interval, height, width), x)


def test_maps_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"6 \(size x interval\) does not divide 6 x 8 tokens"):
        grouped(random(1, 6, 8, 1), 3, 2)


# Position bias ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_offsets_lead_from_key_to_query(size):
    found = offsets(size)[offset_index(size)]
    rows, columns = places(size, size)
    assert torch.equal(found[..., 0].long(), rows[:, None] - rows)
    assert torch.equal(found[..., 1].long(), columns[:, None] - columns)


def wave(module):
    """Fill parameters in the order of their names with a reproducible wave; gains of LN lie around 1."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            filled = torch.sin(0.37 * torch.arange(parameter.numel()) ** 2 + number)
            gain = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            parameter.copy_(0.4 * filled.view(parameter.shape) + gain)
    return module.eval()


OFFICIAL_BIAS = {
    False: [
        [-0.4480988144, -0.5029861208, -0.3934491021],
        [-0.4523878255, -0.5057206884, -0.381715707],
        [-0.4479029728, -0.5024129677, -0.3849577665],
    ],
    True: [
        [-0.5822439636, -0.61466803, -0.5568759164],
        [-0.6164416378, -0.64237743, -0.5826674286],
        [-0.5541219736, -0.5805024421, -0.2980013694],
    ],
}
"""What the official module gives for three offsets, its weights filled by `wave`."""


@pytest.mark.parametrize("residual", [False, True])
def test_bias_is_the_official_one(residual):
    bias = wave(DynamicPositionBias(3, 6, residual=residual))
    some = torch.tensor([[0.0, 0], [2, -3], [-1, 4]])
    close(bias(some), torch.tensor(OFFICIAL_BIAS[residual]), 1e-9)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bias_depends_on_the_offset_alone_and_grows_with_the_group(size):
    bias = shaken(DynamicPositionBias(2, 5))
    small, large = bias.group(size), bias.group(2 * size)
    rows, columns = places(size, size)
    for query in range(size**2):
        for key in range(size**2):
            offset = torch.tensor([rows[query] - rows[key], columns[query] - columns[key]])
            close(small[:, query, key], bias(offset.double()))
    inside = (rows * 2 * size + columns).long()
    close(large[:, inside][:, :, inside], small)
    assert (small - small.transpose(1, 2)).abs().max() > 1e-3  # up is not down


def test_at_its_start_the_bias_reads_directions_only():
    torch.manual_seed(0)
    layer = CrossFormer(Layout(32, (1,), (2,)), intervals=(1,), std=0.5).layers[0].blocks[0].attn
    some = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    close(layer.pos(4 * some), layer.pos(some), 1e-3)  # LN removes the length, but for its epsilon
    assert (layer.pos(-some) - layer.pos(some)).abs().max() > 1e-2
    with torch.no_grad():
        layer.pos.pos_proj.bias += torch.arange(4)
    assert (layer.pos(4 * some) - layer.pos(some)).abs().max() > 1e-2


def test_clamped_offsets():
    bias = shaken(DynamicPositionBias(2, 5))
    far, edge = torch.tensor([[7.0, -9.0]]), torch.tensor([[2.0, -2.0]])
    assert (bias(far) - bias(edge)).abs().max() > 1e-3
    bias.clamp = 2
    close(bias(far), bias(edge))


def test_a_table_filled_by_the_mlp_is_the_mlp():
    dynamic = shaken(GroupAttention(12, 3, 4, 2, hidden=5))
    table = GroupAttention(12, 3, 4, 2, position="table").eval()
    table.load_state_dict(dynamic.state_dict(), strict=False)
    with torch.no_grad():
        table.pos.table.copy_(dynamic.pos(offsets(4).double()).T.unflatten(1, (7, 7)))
    x = random(2, 12, 8, 16)
    close(table(x), dynamic(x))


def test_a_resized_table_keeps_what_is_linear():
    table = PositionTable(2, 4)
    with torch.no_grad():
        slope = torch.linspace(-1, 1, 7)
        table.table.copy_(slope[:, None] + 2 * slope + torch.zeros(2, 1, 1))
    same = table.group(4)
    close(same[0, 0, 15], torch.tensor(-3.0))  # query at the top left, key at the bottom right
    grown = table.group(7)
    close(grown[0, 0, 48], torch.tensor(-3.0))
    close(grown[1, 24, 24], torch.tensor(0.0))
    assert grown.shape == (2, 49, 49)


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size", "interval"), MAPS[:4], ids=IDS[:4])
@pytest.mark.parametrize("seed", SEEDS)
def test_group_attention_is_masked_dense_attention(height, width, size, interval, seed):
    attention = shaken(GroupAttention(6, 2, size, interval, hidden=4), seed)
    x = random(2, 6, height, width, seed=seed).requires_grad_()
    codes = group_numbers(height, width, size, interval)
    seen = codes[:, None] == codes
    rows, columns = places(height, width)
    between = torch.stack([rows[:, None] - rows, columns[:, None] - columns], -1) / interval
    bias = attention.pos(between).movedim(-1, 0)
    ours, theirs = attention(x), reference(attention, x, seen, bias)
    close(ours, theirs)
    weights = random(*x.shape, seed=9)
    gradients = [
        torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (ours, theirs)
    ]
    close(*gradients)


@pytest.mark.parametrize("attention", [(5, 1), (9, 3), (5, 4)], ids=["SDA", "wide", "LDA"])
def test_one_group_is_full_attention_without_bias(attention):
    size, interval = attention
    layer = shaken(GroupAttention(8, 2, size, interval, position="none"))
    x = random(3, 8, 5, 5)
    flat = x.flatten(2).mT
    heads = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in layer.qkv(flat).chunk(3, -1))
    mixed = dense_attention(*heads).transpose(1, 2).flatten(2)
    close(layer(x), layer.proj(mixed).mT.unflatten(2, (5, 5)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("side", "size", "interval"), [(5, 4, 1), (7, 3, 2), (7, 2, 3)])
def test_padding_is_not_seen(side, size, interval, seed):
    attention = shaken(GroupAttention(4, 1, size, interval, position="none"), seed)
    x = random(2, 4, side, side, seed=seed)
    codes = group_numbers(side, side, size, interval)
    close(attention(x), reference(attention, x, codes[:, None] == codes))


def test_a_constant_bias_changes_nothing():
    attention = shaken(GroupAttention(6, 2, 3, 2, hidden=4))
    x = random(2, 6, 6, 12)
    before = attention(x)
    with torch.no_grad():
        attention.pos.pos3[-1].bias += 3.0
    close(attention(x), before, 1e-11)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 4), (6, 9, 3), (10, 5, 5)])
def test_shifted_windows_are_masked_dense_attention(height, width, size):
    attention = shaken(ShiftedWindowAttention(6, 2, size, hidden=4))
    x = random(2, 6, height, width)
    rows, columns = places(height, width)
    shift = size // 2 if min(height, width) > size else 0
    codes = [(place - shift) // size for place in (rows, columns)]  # -1: the part before the border
    if not shift:
        codes = [place // size for place in (rows, columns)]
    seen = (codes[0][:, None] == codes[0]) & (codes[1][:, None] == codes[1])
    between = torch.stack([rows[:, None] - rows, columns[:, None] - columns], -1).double()
    close(attention(x), reference(attention, x, seen, attention.pos(between).movedim(-1, 0)))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_groups_are_a_deal_with_offsets_of_the_map(seed):
    attention = RandomGroupAttention(6, 2, 2, 2, side=4, seed=seed, hidden=4)
    shaken(attention, seed)
    assert attention.order.flatten().sort().values.tolist() == list(range(16))
    regular = grouped(torch.arange(16.0).view(1, 4, 4, 1), 2, 2)[0, :, :, 0].long()
    assert not torch.equal(attention.order.sort(0).values, regular.sort(0).values)
    number = torch.empty(16, dtype=torch.long)
    number[attention.order] = torch.arange(4)[:, None].expand(4, 4)
    rows, columns = places(4, 4)
    between = torch.stack([rows[:, None] - rows, columns[:, None] - columns], -1) / 2
    x = random(2, 6, 4, 4, seed=seed)
    seen = number[:, None] == number
    expected = reference(attention, x, seen, attention.pos(between).movedim(-1, 0))
    close(attention(x), expected, 1e-6)  # offsets are kept in single precision


@pytest.mark.parametrize(("size", "side", "each"), [(3, 9, 1), (4, 8, 4), (2, 4, 1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_groups_take_as_many_tokens_of_every_window_as_lda(size, side, each, seed):
    dealt = RandomGroupAttention(4, 1, size, side // size, side=side, seed=seed, hidden=4).order
    regular = grouped(torch.arange(float(side**2)).view(1, side, side, 1), size, side // size)
    for order in (dealt, regular[0, :, :, 0].long()):
        windows = order // side // size * (side // size) + order % side // size
        for group in windows:
            assert group.bincount().tolist() == [each] * (side // size) ** 2


def test_windows_that_cannot_be_dealt_evenly_are_refused():
    with pytest.raises(ValueError, match="9 tokens of a window cannot be dealt evenly to 4 groups"):
        RandomGroupAttention(4, 1, 3, 2, side=6, seed=0)


def test_random_groups_with_the_interval_are_lda():
    attention = shaken(GroupAttention(6, 2, 2, 2, hidden=4))
    dealt = RandomGroupAttention(6, 2, 2, 2, side=4, seed=0, hidden=4)
    dealt.load_state_dict(attention.state_dict())
    regular = grouped(torch.arange(16.0).view(1, 4, 4, 1), 2, 2)[0, :, :, 0].long()
    dealt.order.copy_(regular)
    spots = torch.stack([regular // 4, regular % 4], -1).double()
    dealt.between = (spots[:, :, None] - spots[:, None]) / 2
    x = random(2, 6, 4, 4)
    close(dealt(x), attention(x))


@pytest.mark.parametrize(("height", "width", "reduction"), [(4, 6, 2), (6, 6, 3)])
def test_reduced_attention_by_loops(height, width, reduction):
    attention = shaken(SpatialReductionAttention(4, 1, reduction, hidden=3))
    x = random(1, 4, height, width)
    keys, centres = [], []
    for row in range(0, height, reduction):
        for column in range(0, width, reduction):
            patch = x[0, :, row : row + reduction, column : column + reduction]
            token = torch.einsum("chw,ochw->o", patch, attention.sr.weight) + attention.sr.bias
            keys.append(attention.kv(attention.norm(token)))
            middle = (reduction - 1) / 2
            centres.append(torch.tensor([row + middle, column + middle]))
    k, v = torch.stack(keys).chunk(2, -1)
    found = attention(x)
    for row in range(height):
        for column in range(width):
            q = attention.q(x[0, :, row, column])
            between = (torch.tensor([float(row), column]) - torch.stack(centres)) / reduction
            scores = k @ q / 2 + attention.pos(between)[:, 0]
            close(found[0, :, row, column], attention.proj(scores.softmax(0) @ v))
    assert reduced_offsets(height, width, reduction).shape[:2] == (height * width, len(keys))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide the width 8"):
        GroupAttention(8, 3, 4)


def test_attention_fits_another_trunk():
    def mixer(width, stride):
        return GroupAttention(width, 2, 4, 2)

    trunk = VisionTrunk(5, [Stage(8, 2, mixer)], channels=1, stem_stride=4)
    assert trunk(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 5)


# Reach --------------------------------------------------------------------------------------------


def sources(attentions, side, token):
    """Which tokens of a map an output token depends on after these layers, each with a shortcut."""
    x = random(1, 4, side, side).requires_grad_()
    y = x
    for attention in attentions:
        y = y + attention(y)
    gradient = torch.autograd.grad(y[0, :, token // side, token % side].sum(), x)[0]
    return gradient[0].abs().sum(0) > 1e-14


@pytest.mark.parametrize(("size", "interval"), [(3, 3), (4, 3), (4, 4)])
def test_short_then_long_reaches_every_token(size, interval):
    side = size * interval
    # as they start: weights far from there saturate the softmax, and what is heard is lost in rounding
    short, long = (GroupAttention(4, 1, size, i, hidden=4) for i in (1, interval))
    shifted = ShiftedWindowAttention(4, 1, size, hidden=4)
    for token in (0, side + 1, side**2 // 2):
        assert sources([short, long], side, token).all()
        assert sources([long, long], side, token).sum() == size**2
        assert sources([short, short], side, token).sum() == size**2
        assert sources([short, shifted], side, token).sum() < side**2


# The model ----------------------------------------------------------------------------------------

OFFICIAL_LOGITS = {
    # pixels a side, G, intervals: maps that divide; padded ones (12 to 20, 6 to 10); R > 1 and padded
    (64, 4, (4, 2, 1)): [3.8994430695, 5.4700916932, 1.9691200509],
    (48, 5, (2, 2, 1)): [4.6926523905, 5.9218497698, -0.35044763],
    (96, 4, (3, 2, 1)): [4.6266584003, 3.2871984638, 0.8256640318],
}
"""Logits of the official model, weights filled by `wave`."""


@pytest.mark.parametrize("setting", OFFICIAL_LOGITS)
def test_logits_are_the_official_ones(setting):
    side, size, intervals = setting
    layout = Layout(64, (2, 2, 1), (2, 4, 8))
    model = wave(CrossFormer(layout, classes=3, intervals=intervals, attention=lsda(size)))
    picture = torch.cos(0.11 * torch.arange(3 * side**2) ** 2).view(1, 3, side, side)
    close(model(picture), torch.tensor([OFFICIAL_LOGITS[setting]]), 1e-9)


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("T", 27_776_794, 2.9),
        ("S", 30_657_394, 4.9),
        ("B", 51_971_554, 9.2),
        ("L", 91_971_184, 16.1),
    ],
)
def test_published_sizes(name, parameters, giga):
    with torch.device("meta"):
        model = CrossFormer(VARIANTS[name]).eval()
        counted = multiply_adds(model, torch.empty(1, 3, 224, 224))
    assert parameter_count(model) == parameters
    assert counted / 1e9 == pytest.approx(giga, abs=0.05)


def test_the_papers_width_of_the_bias_makes_another_model():
    def wide(width, heads, interval, block):
        return GroupAttention(width, heads, 7, interval if block % 2 else 1, hidden=width // 4)

    with torch.device("meta"):
        model = CrossFormer(VARIANTS["S"], attention=wide)
    assert parameter_count(model) == 30_931_858


@pytest.mark.parametrize(("side", "size", "interval"), [(12, 3, 4), (12, 4, 1), (14, 7, 2)])
def test_counted_cost_is_the_closed_form(side, size, interval):
    channels = 16
    with torch.device("meta"):
        x = torch.empty(1, channels, side, side)
        layer = GroupAttention(channels, 2, size, interval, position="none")
        full = GroupAttention(channels, 2, side, position="none")
        projections = 4 * side**2 * channels**2
        counted, dense = (multiply_adds(a, x) - projections for a in (layer, full))
    assert counted == group_cost(side, side, size, channels)
    assert dense == dense_cost(side, side, channels)
    assert counted * side**2 == dense * size**2


def test_blocks_alternate_and_start_short():
    model = CrossFormer(VARIANTS["T"])
    found = [[block.attn.interval for block in stage.blocks] for stage in model.layers]
    assert found == [[1], [1], [1, 2] * 4, [1] * 6]
    rates = [block.drop_path for stage in model.layers for block in stage.blocks]
    close(torch.tensor(rates), torch.linspace(0, 0.1, 16), 1e-6)


def test_block_adds_attention_then_mlp():
    block = shaken(Block(4, GroupAttention(4, 1, 2), ratio=3, drop_path=0.0))
    x = random(2, 4, 4, 4)

    def norm(x, layer):
        return F.layer_norm(x.movedim(1, -1), (4,), layer.weight, layer.bias, 1e-5)

    y = x + block.attn(norm(x, block.norm1).movedim(-1, 1))
    hidden = F.gelu(block.mlp.fc1(norm(y, block.norm2)))
    close(block(x), y + block.mlp.fc2(hidden).movedim(-1, 1))
    assert block.mlp.fc1.out_features == 12


def test_drop_path_skips_half_blocks_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(2, nn.Identity(), ratio=1, drop_path=0.4)
    block.train()
    kept = block._kept(torch.ones(20_000, 1, 1, 1))
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 1 / 0.6])
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    block.eval()
    assert (block._kept(torch.ones(5, 1, 1, 1)) == 1).all()


def test_start_is_the_published_one():
    torch.manual_seed(0)
    model = CrossFormer(Layout(128, (2,), (4,)), intervals=(1,))
    attention = model.layers[0].blocks[0].attn
    for layer in (attention.qkv, attention.proj, model.layers[0].blocks[0].mlp.fc1):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (layer.bias == 0).all()
    assert attention.pos.pos_proj.weight.abs().max() < 0.08
    assert attention.pos.pos_proj.out_features == 8
    assert model.patch_embed.projs[0].weight.abs().max() > 0.1  # convolutions keep PyTorch's start
