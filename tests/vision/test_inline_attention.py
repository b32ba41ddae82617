"""Oracles of InLine attention: explicit weights, plain loops, invariances, closed forms, official sizes."""

import math
import zlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.trunks.language import parameter_count
from reattend.trunks.vision import multiply_adds
from reattend.vision.inline_attention import (
    KERNELS,
    OUTPUTS,
    QUERIES,
    SCORES,
    SIZES,
    Block,
    DeiTSize,
    InlineAttention,
    InlineDeiT,
    KernelPredictor,
    SharedKernel,
    inline_attention,
    inline_scores,
    linear_attention,
    linear_scores,
    local_residual,
    mean_scores,
    operator_multiply_adds,
    softmax_scores,
    unseen_directions,
)

SEEDS = (0, 1, 2)
# batch, heads, queries, keys, dim: fewer and more keys than channels, as many queries as keys or not
SHAPES = [(2, 3, 7, 7, 5), (1, 2, 5, 11, 4), (3, 1, 9, 3, 6)]
TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **(TOLERANCE | tolerance))


def tensors(seed=0, shape=SHAPES[0], value_dim=4):
    """Queries, keys, values in float64, with gradients."""
    batch, heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(queries, dim), (keys, dim), (keys, value_dim)]
    return [
        torch.randn(batch, heads, *size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]


def tokens(batch=3, count=10, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, width, generator=generator, dtype=torch.float64)


def looped_scores(operator, q, k):
    """Weights of one head by plain loops, from the equations."""
    rows, scale = [], 1 / math.sqrt(q.shape[-1])
    for query in q:
        products = [float(query @ key) for key in k]
        if operator == "softmax":
            powers = [math.exp(scale * p) for p in products]
            rows.append([p / sum(powers) for p in powers])
        elif operator == "linear":
            rows.append([p / (sum(products) + 1e-6) for p in products])
        elif operator == "inline":
            centre = sum(products) / len(k)
            rows.append([scale / len(k) * (p - centre) + 1 / len(k) for p in products])
        else:
            rows.append([1 / len(k)] * len(k))
    return torch.tensor(rows, dtype=torch.float64)


# Two forms of every operator ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", SCORES)
def test_scores_follow_their_equation(operator, shape, seed):
    q, k, _ = (x.detach() for x in tensors(seed, shape))
    if operator == "linear":
        q, k = q.relu(), k.relu()
    ours = SCORES[operator](q, k)
    for place in range(shape[0]):
        for head in range(shape[1]):
            close(ours[place, head], looped_scores(operator, q[place, head], k[place, head]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", SCORES)
def test_cheap_order_of_products_gives_the_same(operator, shape, seed):
    q, k, v = tensors(seed, shape)
    phi = torch.relu if operator == "linear" else nn.Identity()
    explicit = SCORES[operator](phi(q), phi(k)) @ v
    cheap = OUTPUTS[operator](phi(q), phi(k), v)
    close(cheap, explicit)
    weight = torch.randn_like(cheap)
    one, other = (
        torch.autograd.grad((out * weight).sum(), (q, k, v), allow_unused=True)
        for out in (explicit, cheap)
    )
    for left, right in zip(one, other, strict=True):
        if left is not None and right is not None:
            close(left, right)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_sum_to_one_for_any_kernel(kernel):
    torch.manual_seed(0)
    phi = KERNELS[kernel](5).double()
    q, k, _ = tensors()
    sums = inline_scores(phi(q), phi(k)).sum(-1)
    close(sums, torch.ones_like(sums))


def test_inline_weights_may_be_negative_and_need_no_division():
    q, k, v = (x.detach() for x in tensors())
    assert inline_scores(30 * q, k).min() < -0.1
    # 2 s q . k / N around 1 / N: doubling the queries doubles the distance to the mean
    centre = 1 / k.shape[-2]
    close(inline_scores(2 * q, k) - centre, 2 * (inline_scores(q, k) - centre))
    assert inline_attention(0 * q, k, v).isfinite().all()


def test_scale_is_that_of_the_published_code():
    """s / N on q . k: two opposite keys and one query of length 2, by hand."""
    q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    k = torch.tensor([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]])
    close(inline_scores(q, k), torch.tensor([[0.5 + 1.5, 0.5 - 1.5]]))


def test_linear_attention_divides_by_the_signed_sum():
    q, k, _ = (x.detach() for x in tensors())
    products = q @ k.mT
    close(linear_scores(q, k), products / (products.sum(-1, keepdim=True) + 1e-6))
    assert (products < 0).any()


# Invariances ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_query_or_with_equal_keys_it_is_the_mean(seed):
    q, k, v = tensors(seed)
    mean = v.mean(-2, keepdim=True).expand(*q.shape[:-1], -1)
    close(inline_attention(0 * q, k, v), mean)
    close(inline_attention(q, k[..., :1, :].expand_as(k), v), mean)


@pytest.mark.parametrize("seed", SEEDS)
def test_centring(seed):
    q, k, v = tensors(seed)
    shift, constant = torch.randn(5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    close(inline_attention(q, k + shift, v), inline_attention(q, k, v))
    close(softmax_scores(q, k + shift), softmax_scores(q, k))
    close(inline_attention(q, k, v + constant), inline_attention(q, k, v) + constant)
    moved = linear_scores(q.relu(), k.relu() + 1)  # division does not centre
    assert (moved - linear_scores(q.relu(), k.relu())).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", [0.25, 3.0])
def test_length_of_a_query(alpha):
    q, k, v = (x.detach() for x in tensors())
    mean = v.mean(-2, keepdim=True)
    scaled = inline_attention(alpha * q, k, v)
    close(scaled - mean, alpha * (inline_attention(q, k, v) - mean))
    close(
        linear_attention(alpha * q.relu(), k.relu(), v),
        linear_attention(q.relu(), k.relu(), v),
        atol=1e-5,  # the small number in the divisor does not scale
        rtol=1e-5,
    )


@pytest.mark.parametrize("operator", SCORES)
def test_order_of_keys_does_not_matter(operator):
    q, k, v = (x.detach() for x in tensors())
    order = torch.randperm(k.shape[-2], generator=torch.Generator().manual_seed(1))
    phi = torch.relu if operator == "linear" else nn.Identity()
    left = OUTPUTS[operator](phi(q), phi(k), v)
    close(OUTPUTS[operator](phi(q), phi(k[..., order, :]), v[..., order, :]), left)


# Injectivity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_colliding_queries(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (1, 20))
    q, k = q.abs(), k.abs()  # as a kernel without negative values leaves them
    apart = {name: (SCORES[name](q, k) - SCORES[name](2 * q, k)).abs().max() for name in SCORES}
    assert apart["linear"] < 1e-6
    assert apart["inline"] > 1e-2
    assert apart["softmax"] > 1e-2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keys", [1, 4, 6, 7, 20])
def test_unseen_directions_are_those_that_change_no_score(keys, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (1, keys))
    unseen = unseen_directions(k)
    assert len(unseen) == max(0, 6 - (keys - 1))
    close(unseen @ unseen.T, torch.eye(len(unseen), dtype=torch.float64))
    for direction in unseen:
        for score in (inline_scores, softmax_scores):
            close(score(q + 5 * direction, k), score(q, k), atol=1e-9)
    if 0 < len(unseen) < 6:  # a step across to them is seen by both
        across = (k - k.mean(0))[0]
        for score in (inline_scores, softmax_scores):
            assert (score(q + across, k) - score(q, k)).abs().max() > 1e-3


def test_relu_brings_collisions_back():
    q = torch.tensor([[1.0, -1.0, 2.0], [1.0, -5.0, 2.0]])
    k = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    rows = inline_scores(q.relu(), k.relu())
    close(rows[0], rows[1])
    rows = inline_scores(q, k)
    assert (rows[0] - rows[1]).abs().max() > 1e-2


def test_multiply_adds_are_equal_where_tokens_are_as_many_as_channels():
    assert operator_multiply_adds("inline", 64, 64) == operator_multiply_adds("softmax", 64, 64)
    assert operator_multiply_adds("softmax", 6400, 32) == 200 * operator_multiply_adds(
        "inline", 6400, 32
    )
    q, k, v = (torch.randn(1, 1, 50, 8) for _ in range(3))

    class Counted(nn.Module):
        def forward(self, q, k, v):
            return q @ (k.mT @ v)

    assert multiply_adds(Counted(), q, k, v) == operator_multiply_adds("inline", 50, 8)


# Masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", SCORES)
def test_masked_scores_are_those_of_the_visible_keys(operator):
    q, k, _ = (x.detach() for x in tensors(shape=(1, 2, 6, 6, 5)))
    if operator == "linear":
        q, k = q.relu(), k.relu()
    visible = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    visible[:, 0] = True
    ours = SCORES[operator](q, k, visible)
    for row, seen in enumerate(visible):
        close(ours[..., row, :][..., seen], SCORES[operator](q, k[..., seen, :])[..., row, :])
        assert (ours[..., row, :][..., ~seen] == 0).all()
    close(SCORES[operator](q, k, torch.ones_like(visible)), SCORES[operator](q, k))


# Local residual -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_residual_is_a_convolution_of_each_picture_with_its_own_kernel(seed):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(3, 5, 4, 6, generator=generator, dtype=torch.float64)
    kernel = torch.randn(3, 6, 3, 3, generator=generator, dtype=torch.float64)
    ours = local_residual(v, kernel)
    for picture in range(3):
        theirs = F.conv2d(
            v[picture].permute(2, 0, 1)[None], kernel[picture][:, None], padding=1, groups=6
        )
        close(ours[picture], theirs[0].permute(1, 2, 0))


def test_residual_with_one_weight_moves_the_map():
    v = tokens(2, 20, 3).unflatten(1, (4, 5))
    centre, below = torch.zeros(2, 2, 3, 3, 3, dtype=torch.float64)
    centre[:, :, 1, 1] = 1
    below[:, :, 2, 1] = 1
    close(local_residual(v, centre), v)
    moved = local_residual(v, below)
    close(moved[:, :-1], v[:, 1:])
    assert (moved[:, -1] == 0).all()


def test_kernel_is_predicted_from_the_mean_token_head_by_head():
    torch.manual_seed(0)
    predictor, x = KernelPredictor(8, 2).double(), tokens()
    kernel = predictor(x)
    first, second = predictor[0], predictor[2]
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        inner = F.gelu(x.mean(1)[:, part] @ first.weight[part, :, 0].T + first.bias[part])
        rows = slice(36 * head, 36 * head + 36)
        found = inner @ second.weight[rows, :, 0].T + second.bias[rows]
        close(kernel[:, part], found.view(3, 4, 3, 3))
    assert (kernel[0] - kernel[1]).abs().max() > 1e-3
    shared = SharedKernel(8)(x)
    assert shared.shape == (3, 8, 3, 3)
    assert (shared[0] == shared[1]).all()


# Layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", SCORES)
@pytest.mark.parametrize("class_tokens", [0, 1])
def test_layer_is_scores_times_values_plus_residual(operator, class_tokens):
    torch.manual_seed(0)
    layer = InlineAttention(
        8, 2, operator=operator, kernel="relu", class_tokens=class_tokens
    ).double()
    x = tokens(3, 9 + class_tokens)
    v = layer.qkv(x)[..., 16:]
    by_head = layer.scores(x) @ v.unflatten(-1, (2, 4)).transpose(1, 2)
    expected = by_head.transpose(1, 2).flatten(2)
    near = local_residual(v[:, class_tokens:].unflatten(1, (3, 3)), layer.residual(x))
    expected[:, class_tokens:] += near.flatten(1, 2)
    close(layer(x), layer.proj(expected))


def test_layer_by_hand_with_the_published_formula():
    """One head, no residual: o = q (k^T v) s / N + (1 - s q . mean k) mean v from the layer's own weights."""
    torch.manual_seed(1)
    layer, x = InlineAttention(6, 1, residual="none").double(), tokens(2, 7, 6)
    q, k, v = (
        x @ w.T + b for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    scale = 6**-0.5
    attended = scale / 7 * q @ (k.mT @ v)
    attended = attended + (
        1 - scale * (q * k.mean(1, keepdim=True)).sum(-1, keepdim=True)
    ) * v.mean(1, keepdim=True)
    close(layer(x), layer.proj(attended))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_applied_to_queries_and_keys_of_linear_operators(kernel):
    torch.manual_seed(0)
    x = tokens(2, 9)
    layer = InlineAttention(8, 2, kernel=kernel).double()
    phi = {
        "identity": lambda y: y,
        "relu": lambda y: y.clamp(min=0),
        "leaky_relu": lambda y: torch.where(y > 0, y, 0.01 * y),
        "affine_relu": lambda y: (y @ layer.phi[0].weight.T + layer.phi[0].bias).clamp(min=0),
    }[kernel]
    q, k, v = layer.queries_keys_values(x)
    parts = layer.qkv(x).chunk(3, -1)
    for found, plain in ((q, phi(parts[0])), (k, phi(parts[1])), (v, parts[2])):
        close(found, plain.unflatten(-1, (2, 4)).transpose(1, 2))
    softmax = InlineAttention(8, 2, operator="softmax", kernel=kernel)
    assert isinstance(softmax.phi, nn.Identity)


@pytest.mark.parametrize("count", [9, 10])
def test_placebos_read_with_another_query(count):
    torch.manual_seed(0)
    layers = [InlineAttention(8, 2, residual="none", queries=name).double() for name in QUERIES]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    x = tokens(2, count)
    own, rolled, mean = (layer.scores(x) for layer in layers)
    for token in range(count):
        close(rolled[:, :, token], own[:, :, (token - count // 2) % count])
        close(mean[:, :, token], own.mean(2))  # scores are linear in the query


def test_mask_of_the_layer_leaves_the_residual():
    torch.manual_seed(0)
    layer, x = InlineAttention(8, 2).double(), tokens(2, 9)
    close(layer(x, torch.ones(9, 9, dtype=torch.bool)), layer(x))
    own = layer(x, torch.eye(9, dtype=torch.bool))
    v = layer.qkv(x)[..., 16:]
    near = local_residual(v.unflatten(1, (3, 3)), layer.residual(x)).flatten(1, 2)
    close(own, layer.proj(v + near))


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match="10 is not a multiple of 3 heads"):
        InlineAttention(10, 3)
    for what in ("operator", "kernel", "residual", "queries"):
        with pytest.raises(ValueError, match=f"unknown {what} 'cosine'; there are: "):
            InlineAttention(8, 2, **{what: "cosine"})
    with pytest.raises(ValueError, match="8 tokens are no square map: set class_tokens"):
        InlineAttention(8, 2)(torch.randn(1, 8, 8))
    with pytest.raises(ValueError, match="patches of 5 do not divide pictures of 32"):
        InlineDeiT(DeiTSize(8, 1, 2, 32, 5), 3)


# Network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"), [("T", 6_477_736), ("S", 16_734_760), ("B", 23_797_096)]
)
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = InlineDeiT(SIZES[name], 1000)
    assert parameter_count(model) == parameters
    size = SIZES[name]
    assert size.width // size.heads == 32
    branch = size.width * 32 + size.width + 9 * size.width * 32 + 9 * size.width
    assert parameter_count(model.blocks[0].attn.residual) == branch


def test_names_are_those_of_the_official_checkpoints():
    model = InlineDeiT(DeiTSize(8, 1, 2, 32, 16), 3)
    block = ["norm1", "norm2", "attn.qkv", "attn.proj", "attn.residual.0", "attn.residual.2"]
    block += ["mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", "norm", "head", *(f"blocks.0.{name}" for name in block)]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert set(model.state_dict()) == expected | {"cls_token", "pos_embed"}


def waves(name, shape):
    """Numbers of a fixed pattern, another one for every name."""
    phase = zlib.crc32(name.encode()) % 1000
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.3 * torch.sin(phase + 1.7 * count)).view(shape)


def test_official_numbers():
    """Of the official network and its first layer, on weights, tokens and pictures made of waves."""
    model = InlineDeiT(DeiTSize(8, 2, 2, 20, 4), 3, channels=2).double()
    model.load_state_dict({name: waves(name, p.shape) for name, p in model.state_dict().items()})
    out = model.blocks[0].attn(5 * waves("tokens", (2, 26, 8)))
    found = torch.stack([out[0, 0, 0], out[0, 7, 3], out[1, 25, 7], out.mean(), out.std()])
    layer = [-0.1898833, -0.3287778, -0.8704199, -0.0763684, 0.6802367]
    close(found, torch.tensor(layer).double(), atol=2e-7, rtol=0)
    network = [[-0.4549252, 0.3981746, 0.5086849], [-0.4548649, 0.3982506, 0.5087023]]
    logits = model(20 * waves("pictures", (2, 2, 20, 20)))
    close(logits, torch.tensor(network).double(), atol=2e-7, rtol=0)


@pytest.mark.parametrize("class_token", [True, False])
def test_network_by_its_parts(class_token):
    torch.manual_seed(0)
    model = InlineDeiT(DeiTSize(8, 2, 2, 12, 4), 3, channels=2, class_token=class_token).double()
    pixels = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    patches = F.unfold(pixels, 4, stride=4).mT
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    if class_token:
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], 1)
    x = x + model.pos_embed
    close(model.embed(pixels), x)
    inputs = model.attention_inputs(pixels)
    for block, read in zip(model.blocks, inputs, strict=True):
        close(read, F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6))
        x = x + block.attn(read)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    close(model(pixels), model.head(x[:, 0] if class_token else x.mean(1)))
    everything = torch.ones(9 + class_token, 9 + class_token, dtype=torch.bool)
    close(model(pixels, everything), model(pixels))
    assert (model(pixels, everything.tril()) - model(pixels)).abs().max() > 1e-6


def test_start_is_the_published_one():
    torch.manual_seed(0)
    model = InlineDeiT(DeiTSize(192, 1, 6, 224), 10, std=0.02)
    weights = model.blocks[0].attn.qkv.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert (model.blocks[0].attn.qkv.bias == 0).all()
    # the residual's convolutions keep PyTorch's start: uniform within 1 / sqrt(32)
    assert model.blocks[0].attn.residual[0].weight.abs().max() > 0.15


def test_block_takes_the_place_of_a_transformer_block():
    torch.manual_seed(0)
    block, x = Block(8, InlineAttention(8, 2), 2.0), tokens(2, 9).float()
    assert block(x).shape == x.shape
    assert (mean_scores(x, x).sum(-1) - 1).abs().max() < 1e-6
