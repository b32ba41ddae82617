"""Oracles of sigmoid attention, its stabilisers and its Jacobian."""

import math

import pytest
import torch
from torch.nn import functional as F

from reattend.attention.positions import alibi_bias, rotary
from reattend.language_modeling.sigmoid_attention import (
    ACTIVATIONS,
    ELEMENTWISE,
    Attention,
    LayerScale,
    attention_weights,
    chunked_sigmoid_attention,
    jacobian_norm,
    length_bias,
    outlier_tokens,
    sigmoid_attention,
    sigmoid_jacobian_bound,
    single_head,
)
from reattend.trunks.language import FeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention

SEEDS = [0, 1, 2]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lower(length):
    return torch.ones(length, length).tril().bool()


def assert_same_with_gradients(first, second, *inputs):
    """Equal values and equal gradients with respect to `inputs`."""
    torch.testing.assert_close(first, second)
    weights = normal(*first.shape, seed=99)
    for a, b in zip(
        torch.autograd.grad((first * weights).sum(), inputs),
        torch.autograd.grad((second * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# --- the weights


@pytest.mark.parametrize("length", [1, 7, 256])
def test_zero_logits_weigh_one_over_one_plus_n(length):
    scores = torch.zeros(3, length, dtype=torch.float64)
    weights = attention_weights(scores, bias=length_bias(length))
    torch.testing.assert_close(weights, torch.full_like(scores, 1 / (1 + length)))
    rows = torch.full((3,), length / (1 + length), dtype=torch.float64)
    torch.testing.assert_close(weights.sum(-1), rows)


@pytest.mark.parametrize("length", [1, 8, 255])
def test_without_a_bias_zero_logits_sum_to_half_the_length(length):
    weights = attention_weights(torch.zeros(length, dtype=torch.float64)[None])
    assert weights.sum().item() == length / 2


@pytest.mark.parametrize("bias", [0.0, -2.0, -10.0])
def test_weights_are_the_logistic_function_of_score_plus_bias(bias):
    scores = 5 * normal(2, 5, 9)
    expected = 1 / (1 + torch.exp(-(scores + bias)))
    torch.testing.assert_close(attention_weights(scores, bias=bias), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_weight_has_the_slope_sigma_times_one_minus_sigma(seed):
    scores = normal(4, 6, seed=seed).requires_grad_()
    weights = attention_weights(scores, lower(6)[-4:], bias=-1.5)
    upstream = normal(4, 6, seed=seed + 1)
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), scores)
    torch.testing.assert_close(gradient, upstream * weights * (1 - weights))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_keys_weigh_exactly_nothing(activation):
    scores = (100 * normal(2, 7, 7)).requires_grad_()
    bias = 30.0 if activation in ELEMENTWISE else 0.0
    weights = attention_weights(scores, lower(7), activation, bias)
    assert (weights[:, ~lower(7)] == 0).all()
    if activation == "mean":  # knows no scores
        return
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[:, ~lower(7)] == 0).all()


@pytest.mark.parametrize("activation", list(ELEMENTWISE))
def test_a_query_that_sees_nothing_gets_zeros(activation):
    scores = normal(3, 4).requires_grad_()
    visible = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    weights = attention_weights(scores, visible, activation, bias=2.0)
    assert (weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(weights.sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("activation", ["sigmoid", "sigmoid/i", "sigmoid/sqrt(i)", "relu/i"])
def test_length_normalisation_divides_row_i_by_a_power_of_i(activation):
    scores, bias = normal(2, 9, 9), -0.7
    raw = torch.relu(scores + bias) if activation == "relu/i" else torch.sigmoid(scores + bias)
    power = {"sigmoid": 0, "sigmoid/i": 1, "sigmoid/sqrt(i)": 0.5, "relu/i": 1}[activation]
    rows = torch.arange(1, 10, dtype=torch.float64)[:, None]
    # As in the official code: a product with a diagonal matrix of the factors of the rows.
    factors = torch.diag((1 / rows[:, 0]) ** power)
    expected = torch.einsum("ij,bjk->bik", factors, raw.tril())
    torch.testing.assert_close(attention_weights(scores, lower(9), activation, bias), expected)
    full = attention_weights(scores, None, activation, bias)
    torch.testing.assert_close(full, raw / 9**power)


def test_mean_ignores_the_scores_and_softmax_sums_to_one():
    mean = attention_weights(normal(5, 5), lower(5), "mean")
    torch.testing.assert_close(mean, lower(5) / torch.arange(1, 6, dtype=torch.float64)[:, None])
    scores = normal(5, 5)
    softmax = attention_weights(scores, lower(5), "softmax")
    torch.testing.assert_close(softmax, scores.masked_fill(~lower(5), -1e300).softmax(-1))


@pytest.mark.parametrize("seed", SEEDS)
def test_row_normalised_sigmoid_tends_to_softmax(seed):
    """sigma(u + b) exp(-b) -> exp(u) as b -> -inf: the error falls with exp(b)."""
    scores = normal(3, 11, seed=seed)
    errors = []
    for bias in (-6.0, -12.0):
        weights = attention_weights(scores, bias=bias)
        torch.testing.assert_close(
            weights * math.exp(-bias), scores.exp(), atol=0, rtol=20 * math.exp(bias)
        )
        rows = weights / weights.sum(-1, keepdim=True)
        errors.append((rows - scores.softmax(-1)).abs().max().item())
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(math.exp(6), rel=0.1)


def test_softmax_ignores_a_constant_of_the_row_and_sigmoid_does_not():
    scores, shift = normal(4, 6), normal(4, 1, seed=1)
    softmax = attention_weights(scores, None, "softmax")
    torch.testing.assert_close(attention_weights(scores + shift, None, "softmax"), softmax)
    change = attention_weights(scores + shift) - attention_weights(scores)
    assert change.abs().max() > 0.05


def test_the_slopes_of_softmax_cancel_over_the_keys_and_those_of_sigmoid_do_not():
    scores = normal(6)
    jacobian = torch.func.jacrev
    softmax = jacobian(lambda s: attention_weights(s[None], None, "softmax")[0])(scores)
    sigmoid = jacobian(lambda s: attention_weights(s[None])[0])(scores)
    torch.testing.assert_close(softmax.sum(0), torch.zeros(6, dtype=torch.float64))
    weights = attention_weights(scores[None])[0]
    torch.testing.assert_close(sigmoid, torch.diag(weights * (1 - weights)))


# --- the operator


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 3), (7, 7, 4), (3, 9, 5)])
def test_the_operator_is_its_equation(causal, queries, keys, dim):
    q, k, v = normal(2, queries, dim), normal(2, keys, dim, seed=1), normal(2, keys, 6, seed=2)
    for x in (q, k, v):
        x.requires_grad_()
    rows = []
    for i in range(queries):
        seen = keys - queries + i + 1 if causal else keys
        row = 0
        for j in range(seen):
            u = (q[:, i] * k[:, j]).sum(-1, keepdim=True) / math.sqrt(dim)
            row = row + v[:, j] / (1 + keys * torch.exp(-u))  # exp(-b) = n
        rows.append(row)
    mixed = sigmoid_attention(q, k, v, causal=causal)
    assert_same_with_gradients(mixed, torch.stack(rows, 1), q, k, v)


def test_a_single_key_is_gated_by_sigmoid_and_copied_by_softmax():
    q, k, v = normal(1, 4), normal(1, 4, seed=1), normal(1, 4, seed=2)
    gate = torch.sigmoid((q * k).sum() / 2 - 0.3)
    torch.testing.assert_close(sigmoid_attention(q, k, v, bias=-0.3), gate * v)
    softmax = attention_weights(q @ k.mT, None, "softmax")
    torch.testing.assert_close(softmax @ v, v)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 64])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_chunking_of_the_keys_is_the_same_sum(chunk, seed):
    q, k, v = (normal(2, 3, 13, 4, seed=seed + part).requires_grad_() for part in range(3))
    assert_same_with_gradients(
        chunked_sigmoid_attention(q, k, v, chunk), sigmoid_attention(q, k, v), q, k, v
    )


def test_the_bias_stays_that_of_the_training_length():
    """Twice as many keys at a fixed b: the row sum doubles (to first order in the weights)."""
    q = torch.zeros(1, 4, dtype=torch.float64)
    k = torch.zeros(512, 4, dtype=torch.float64)
    ones = torch.ones(512, 1, dtype=torch.float64)
    fixed = sigmoid_attention(q, k, ones, bias=length_bias(256)).item()
    assert fixed == pytest.approx(512 / 257)
    assert sigmoid_attention(q, k, ones).item() == pytest.approx(512 / 513)


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_tokens_permutes_the_output(seed):
    q, k, v = (normal(2, 9, 4, seed=seed + part) for part in range(3))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    mixed = sigmoid_attention(q[:, order], k[:, order], v[:, order])
    torch.testing.assert_close(mixed, sigmoid_attention(q, k, v)[:, order])


def test_alibi_biases_are_exact_not_up_to_a_constant_of_the_row():
    """Softmax may replace -m (i - j) by m j; sigmoid may not."""
    q, k, v = (normal(2, 7, 4, seed=part) for part in range(3))
    position = alibi_bias(2, 7, 7).double()
    distance = torch.arange(7)[:, None] - torch.arange(7)
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)[:, None, None]
    scores = q @ k.mT / 2 - slopes * distance + length_bias(7)
    expected = torch.sigmoid(scores).tril() @ v
    torch.testing.assert_close(sigmoid_attention(q, k, v, position=position, causal=True), expected)
    shifted = position - position[:, :, :1]
    other = sigmoid_attention(q, k, v, position=shifted, causal=True)
    assert (other - expected).abs().max() > 1e-3


# --- the module


def module(width=12, heads=3, seed=0, **options):
    torch.manual_seed(seed)
    layer = Attention(width, heads, **options).double()
    for name, parameter in layer.named_parameters():
        if "norm" in name:  # a norm at its start would hide a forgotten weight
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return layer


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_module_is_its_equation_head_by_head(positions, qk_norm, seed):
    layer = module(seed=seed, bias=-1.3, positions=positions, qk_norm=qk_norm)
    x = normal(2, 7, 12, seed=seed).requires_grad_()
    q, k, v = (part.unflatten(-1, (3, 4)) for part in layer.project(x).split(12, dim=-1))
    if qk_norm:
        q = F.layer_norm(q, (4,), layer.query_norm.weight, layer.query_norm.bias, eps=1e-6)
        k = F.layer_norm(k, (4,), layer.key_norm.weight, layer.key_norm.bias, eps=1e-6)
    outputs = []
    for head in range(3):
        one_q, one_k = q[:, :, head], k[:, :, head]
        if positions == "rotary":
            one_q, one_k = rotary(one_q), rotary(one_k)
        scores = one_q @ one_k.mT / 2
        if positions == "alibi":
            distance = torch.arange(7)[:, None] - torch.arange(7)
            scores = scores - 2.0 ** (-8 * (head + 1) / 3) * distance
        outputs.append(torch.sigmoid(scores - 1.3).tril() @ v[:, :, head])
    expected = layer.out(torch.cat(outputs, -1))
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert_same_with_gradients(layer(x), expected, x, *trained)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_with_softmax_it_is_the_shared_baseline(positions, qk_norm):
    torch.manual_seed(0)
    baseline = SoftmaxAttention(12, 3, positions, qk_norm).double()
    layer = module(activation="softmax", positions=positions, qk_norm=qk_norm)
    layer.load_state_dict(baseline.state_dict())
    if qk_norm:  # otherwise they differ in the eps of the norm
        layer.query_norm.eps = layer.key_norm.eps = baseline.query_norm.eps
    x = normal(2, 9, 12).requires_grad_()
    assert_same_with_gradients(layer(x), baseline(x), x)
    assert layer.state_size(50) == baseline.state_size(50) == 2 * 50 * 12


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_every_activation_is_causal(activation, positions):
    layer = module(activation=activation, positions=positions, hybrid_norm=True)
    x = normal(2, 8, 12).requires_grad_()
    for t in (0, 3, 7):
        (gradient,) = torch.autograd.grad(layer(x)[:, t].square().sum(), x)
        assert (gradient[:, t + 1 :] == 0).all()
        assert gradient[:, t].abs().sum() > 0


def test_without_causality_every_token_sees_every_token():
    layer = module(positions="none", causal=False)
    x = normal(1, 6, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[:, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_normed_queries_and_keys_bound_the_logits():
    """|q . k| / sqrt(d) <= sqrt(d), whatever the size of the input."""
    torch.manual_seed(0)
    layer = Attention(12, 3, bias=0.0, positions="rotary").double()
    weights, _ = layer.weights_and_values(1e4 * normal(2, 20, 12))
    logits = torch.logit(weights[..., lower(20)])
    assert logits.abs().max() <= math.sqrt(4) + 1e-9
    assert logits.abs().max() > 1.5


def test_hybrid_norm_is_a_norm_of_the_output():
    plain, normed = module(), module(hybrid_norm=True)
    x = normal(2, 7, 12).requires_grad_()
    norm = normed.output_norm
    plain.load_state_dict({n: p for n, p in normed.state_dict().items() if "output" not in n})
    expected = F.layer_norm(plain(x), (12,), norm.weight, norm.bias, eps=1e-6)
    assert_same_with_gradients(normed(x), expected, x)


def test_layer_scale_multiplies_each_channel():
    layer = LayerScale(12, module(), start=0.1)
    x = normal(2, 7, 12)
    torch.testing.assert_close(layer(x), layer.gamma * layer.mixer(x))
    torch.testing.assert_close(layer.gamma.data, torch.full((12,), 0.1))
    assert layer.state_size(9) == layer.mixer.state_size(9)


def test_linear_layers_have_no_bias_and_b_is_not_trained():
    names = {name for name, _ in module(hybrid_norm=False).named_parameters()}
    norms = {f"{which}_norm.{part}" for which in ("query", "key") for part in ("weight", "bias")}
    assert names == {"project.weight", "out.weight", *norms}


def test_it_is_a_mixer_of_the_trunk_and_starts_from_the_same_weights_for_every_activation():
    tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))
    models = []
    for activation in ("softmax", "sigmoid"):
        torch.manual_seed(0)
        models.append(
            Trunk(9, 12, [lambda w, a=activation: Attention(w, 3, a)] * 2, feed_forward=FeedForward)
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(models[0](tokens), models[1](tokens))


# --- the Jacobian


def head_matrices(width, seed):
    draw = normal(3, width, width, seed=seed) / math.sqrt(width)
    return draw[0] @ draw[1].mT / math.sqrt(width), draw[2]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_power_iteration_finds_the_largest_singular_value(activation, seed, ratio):
    a, w_v = head_matrices(4, seed)
    bias = length_bias(7) if activation == "sigmoid" else 0.0
    x = outlier_tokens(1, 7, 4, ratio, torch.Generator().manual_seed(seed))[0]

    def head(x):
        return single_head(x, a, w_v, activation, bias)

    exact = torch.linalg.matrix_norm(torch.func.jacrev(head)(x).reshape(28, 28), 2)
    found = jacobian_norm(head, x, normal(7, 4, seed=seed + 9), iterations=400)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    rough = jacobian_norm(head, x, normal(7, 4, seed=seed + 9), iterations=3)
    assert rough <= exact * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_the_jacobian_of_sigmoid_stays_below_its_bound(seed, ratio):
    a, w_v = head_matrices(4, seed)
    x = outlier_tokens(1, 7, 4, ratio, torch.Generator().manual_seed(seed))[0]
    for bias in (0.0, length_bias(7)):
        jacobian = torch.func.jacrev(lambda x, b=bias: single_head(x, a, w_v, bias=b))(x)
        exact = torch.linalg.matrix_norm(jacobian.reshape(28, 28), 2)
        assert exact <= sigmoid_jacobian_bound(x, a, w_v, bias)


def test_the_bound_is_tight_for_one_token_without_scores():
    """n = 1 and A = 0: the Jacobian is sigma(b) W_v."""
    w_v = normal(5, 5)
    bound = sigmoid_jacobian_bound(normal(1, 5), torch.zeros(5, 5).double(), w_v, -0.4)
    expected = torch.sigmoid(torch.tensor(-0.4).double()) * torch.linalg.matrix_norm(w_v, 2)
    torch.testing.assert_close(bound, expected)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 8.0])
def test_outliers_are_the_first_tokens_and_all_else_stays(ratio):
    x = outlier_tokens(5, 6, 9, ratio, torch.Generator().manual_seed(3))
    one = outlier_tokens(5, 6, 9, 1.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(x[:, 0].norm(dim=-1), torch.full((5,), 3.0 * ratio).double())
    torch.testing.assert_close(x[:, 0], ratio * one[:, 0])
    assert torch.equal(x[:, 1:], one[:, 1:])


# --- errors


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="unknown activation 'tanh'; there are: softmax, mean, si"):
        attention_weights(torch.zeros(2, 2), None, "tanh")
    with pytest.raises(ValueError, match="'softmax' takes no bias, got -2"):
        attention_weights(torch.zeros(2, 2), None, "softmax", -2.0)
    with pytest.raises(ValueError, match="width 7 is not a multiple of 2 heads"):
        Attention(7, 2)
    with pytest.raises(ValueError, match="ALiBi needs causal attention"):
        Attention(8, 2, positions="alibi", causal=False)
    with pytest.raises(ValueError, match="a text of 0 tokens has no bias"):
        length_bias(0)


class ReadsTokens(torch.nn.Module):
    reads_tokens = True

    def forward(self, x, tokens):
        self.auxiliary_loss = x.square().mean()
        return x * tokens[..., None]

    def state_size(self, length):
        return length


def test_layer_scale_keeps_what_a_mixer_asks_of_the_trunk():
    tokens = torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(0))
    model = Trunk(5, 8, [lambda width: LayerScale(width, ReadsTokens(), start=0.5)])
    model(tokens)
    assert model.auxiliary_loss() == model.blocks[0].mixer.mixer.auxiliary_loss > 0
    scaled, plain = model.blocks[0].mixer, model.blocks[0].mixer.mixer
    x = normal(2, 6, 8).float()
    torch.testing.assert_close(scaled(x, tokens), 0.5 * plain(x, tokens))
    assert not hasattr(LayerScale(12, module()), "auxiliary_loss")
    with pytest.raises(ValueError, match="ReadsTokens has no cached form"):
        model.start_cache()
