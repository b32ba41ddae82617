"""Oracles of efficient probing and of the probes it is compared with."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from reattend.vision.efficient_probing import (
    AbMilp,
    AimProbe,
    BatchStandardisation,
    CrossAttention,
    CrossAttentionBlock,
    EfficientProbing,
    MeanPooling,
    Probe,
    SimPool,
    ep_macs,
    ep_parameters,
    ep_pool_first_macs,
    foreground_mass,
    knn_predict,
    linear_parameters,
    mean_correlation_across,
    mean_pairwise_correlation,
    mean_pairwise_cosine,
    mhca_macs,
    poolings,
)

# batch, tokens, width, queries: awkward sizes on purpose.
SHAPES = [(1, 1, 4, 2), (3, 7, 12, 4), (2, 63, 60, 5), (5, 17, 24, 24), (4, 49, 40, 1)]
IDS = [f"B{b}-N{n}-D{d}-Q{q}" for b, n, d, q in SHAPES]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tokens_of(batch: int, count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, count, dim, generator=generator)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with weights large enough for its attention to be far from uniform."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]) * 2)
    return module


def gradients(output: Tensor, module: nn.Module) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    return list(torch.autograd.grad((output * weight).sum(), list(module.parameters())))


def assert_same(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The method against an independent computation ----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "d_out"), [(shape, 1) for shape in SHAPES] + [((3, 7, 12, 2), 3), ((2, 5, 40, 4), 2)]
)
def test_equals_the_equations_written_as_loops(shape, d_out):
    batch, count, dim, queries = shape
    probe = seeded(lambda: EfficientProbing(dim, queries, d_out))
    tokens = tokens_of(batch, count, dim)
    width = dim // d_out // queries
    for b in range(batch):
        expected = []
        for j in range(queries):
            scores = torch.stack([tokens[b, n] @ probe.queries[j] for n in range(count)])
            weights = (scores / dim**0.5).exp()
            weights = weights / weights.sum()
            group = probe.v.weight[j * width : (j + 1) * width]
            expected.append(sum(weights[n] * (group @ tokens[b, n]) for n in range(count)))
        torch.testing.assert_close(probe(tokens)[b], torch.cat(expected))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pooling_first_equals_projecting_first(shape, seed):
    batch, count, dim, queries = shape
    probe = seeded(lambda: EfficientProbing(dim, queries), seed)
    tokens = tokens_of(batch, count, dim, seed)
    first, second = probe(tokens), probe.project_then_pool(tokens)
    assert_same([first, *gradients(first, probe)], [second, *gradients(second, probe)])


def test_single_query_equals_scaled_dot_product_attention():
    probe = seeded(lambda: EfficientProbing(20, 1))
    with torch.no_grad():
        probe.v.weight.copy_(torch.eye(20))
    tokens = tokens_of(3, 11, 20)
    reference = functional.scaled_dot_product_attention(
        probe.queries.expand(3, -1, -1), tokens, tokens
    )
    first, second = probe(tokens), reference.squeeze(1)
    assert_same([first], [second])
    assert_same(
        list(torch.autograd.grad(first.square().sum(), probe.queries)),
        list(torch.autograd.grad(second.square().sum(), probe.queries)),
    )


def test_zero_queries_give_the_mean_of_the_values():
    probe = seeded(lambda: EfficientProbing(24, 6))
    with torch.no_grad():
        probe.queries.zero_()
    tokens = tokens_of(4, 9, 24)
    torch.testing.assert_close(probe(tokens), tokens.mean(1) @ probe.v.weight.T)
    with torch.no_grad():
        probe.v.weight.copy_(torch.eye(24))
    torch.testing.assert_close(probe(tokens), MeanPooling(24)(tokens))


def test_starts_close_to_the_mean():
    """Queries start at 0.02 and the scale is D^-1/2, so the first maps are nearly uniform."""
    torch.manual_seed(0)
    probe = EfficientProbing(384, 32)
    tokens = torch.randn(4, 64, 384)
    assert (probe.maps(tokens) * 64 - 1).abs().max() < 0.15
    assert 0.018 < probe.queries.std() < 0.022


def test_order_of_tokens_does_not_matter():
    probe = seeded(lambda: EfficientProbing(24, 4))
    tokens = tokens_of(3, 13, 24)
    shuffled = tokens[:, torch.randperm(13)]
    torch.testing.assert_close(probe(shuffled), probe(tokens))


def test_permuting_queries_with_their_channels_permutes_the_output():
    probe, other = (seeded(lambda: EfficientProbing(24, 4)) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        other.queries.copy_(probe.queries[order])
        other.v.weight.copy_(probe.v.weight.unflatten(0, (4, 6))[order].flatten(0, 1))
    tokens = tokens_of(3, 13, 24)
    expected = probe(tokens).unflatten(-1, (4, 6))[:, order].flatten(-2)
    torch.testing.assert_close(other(tokens), expected)


def test_gradient_is_that_of_finite_differences():
    probe = seeded(lambda: EfficientProbing(8, 2))
    tokens = tokens_of(2, 5, 8)

    def run(queries: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(probe, {"queries": queries, "v.weight": weight}, tokens)

    inputs = [p.detach().clone().requires_grad_() for p in (probe.queries, probe.v.weight)]
    assert torch.autograd.gradcheck(run, inputs)


def test_refuses_queries_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="5 queries must divide the output width 24"):
        EfficientProbing(24, 5)
    with pytest.raises(ValueError, match="must divide the width 24"):
        EfficientProbing(24, 4, d_out=5)


# Multi-head cross-attention ------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "heads"), [(1, 4), (1, 1), (3, 4), (5, 2)])
@pytest.mark.parametrize("output", [True, False])
def test_folded_cross_attention_equals_the_usual_order(queries, heads, output):
    attention = seeded(lambda: CrossAttention(24, heads, queries, output_projection=output))
    tokens = tokens_of(3, 11, 24)
    first, second = attention(tokens), attention.project_then_pool(tokens)
    assert_same([first, *gradients(first, attention)], [second, *gradients(second, attention)])


def test_cross_attention_equals_torch():
    attention = seeded(lambda: CrossAttention(24, 4, queries=3))
    reference = nn.MultiheadAttention(24, 4, bias=False, batch_first=True)
    with torch.no_grad():
        weights = [layer.weight for layer in (attention.q, attention.k, attention.v)]
        reference.in_proj_weight.copy_(torch.cat(weights))
        reference.out_proj.weight.copy_(attention.o.weight)
    tokens = tokens_of(5, 9, 24)
    queries = attention.queries.expand(5, -1, -1)
    expected, maps = reference(queries, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(attention(tokens), expected.mean(1))
    # Directions run over queries first, heads fastest.
    ours = attention.maps(tokens).unflatten(1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(ours, maps)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_cross_attention_of_one_query_folds_into_ep(heads):
    """MHCA without W_O is EP with Q = heads: U_h = sqrt(D / d_head) W_K^h q_h."""
    dim, width = 24, 24 // heads
    attention = seeded(lambda: CrossAttention(dim, heads, output_projection=False))
    probe = EfficientProbing(dim, heads)
    with torch.no_grad():
        query = attention.q(attention.queries[0])
        for h in range(heads):
            block = slice(h * width, (h + 1) * width)
            probe.queries[h] = (dim / width) ** 0.5 * attention.k.weight[block].T @ query[block]
        probe.v.weight.copy_(attention.v.weight)
    tokens = tokens_of(4, 15, dim)
    torch.testing.assert_close(probe(tokens), attention.project_then_pool(tokens))
    torch.testing.assert_close(probe.maps(tokens), attention.maps(tokens))


# The other baselines --------------------------------------------------------------------------------------


def test_simpool_equals_its_equations():
    pool = seeded(lambda: SimPool(20))
    tokens = tokens_of(3, 9, 20)
    normal = pool.norm(tokens)
    query, keys = pool.q(tokens.mean(1, keepdim=True)), pool.k(normal)
    expected = functional.scaled_dot_product_attention(query, keys, normal).squeeze(1)
    first = pool(tokens)
    assert_same([first, *gradients(first, pool)], [expected, *gradients(expected, pool)], 1e-9)


def test_abmilp_equals_its_equations():
    pool = seeded(lambda: AbMilp(20))
    tokens = tokens_of(3, 9, 20)
    scores = pool.score(pool.hidden(tokens).tanh()).softmax(1)
    torch.testing.assert_close(pool(tokens), (scores * tokens).sum(1))


def test_aim_equals_its_equations():
    probe = seeded(lambda: AimProbe(24, 4)).train()
    tokens = tokens_of(3, 9, 24)
    reference = nn.BatchNorm1d(24, affine=False, eps=1e-6)
    normal = reference(tokens.transpose(1, 2)).transpose(1, 2)
    attention = probe.attention
    q = attention.queries.view(1, 4, 1, 6).expand(3, -1, -1, -1)
    k, v = (f(normal).view(3, 9, 4, 6).transpose(1, 2) for f in (attention.k, attention.v))
    expected = functional.scaled_dot_product_attention(q, k, v).flatten(1)
    torch.testing.assert_close(probe(tokens), expected)
    torch.testing.assert_close(probe.norm.running_var, reference.running_var)


def test_jepa_block_equals_its_equations():
    block = seeded(lambda: CrossAttentionBlock(24, 4))
    tokens = tokens_of(3, 9, 24)
    attended = block.attention.project_then_pool(block.norm_tokens(tokens))
    state = block.attention.queries + attended
    expected = state + block.fc2(functional.gelu(block.fc1(block.norm_query(state))))
    first = block(tokens)
    assert_same([first, *gradients(first, block)], [expected, *gradients(expected, block)], 1e-9)


def test_batch_standardisation_equals_batch_norm():
    ours = BatchStandardisation(7)
    reference = nn.BatchNorm1d(7, affine=False, eps=1e-6)
    for seed in range(4):
        features = tokens_of(1, 5, 7, seed)[0].requires_grad_()
        first, second = ours(features), reference(features)
        grads = [torch.autograd.grad(out.cos().sum(), features)[0] for out in (first, second)]
        assert_same([first, grads[0]], [second, grads[1]])
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)
    torch.testing.assert_close(ours.eval()(features), reference.eval()(features))
    assert not list(ours.parameters())
    with pytest.raises(ValueError, match="at least two items"):
        ours.train()(features[:1])


# A stack of probes trained together is the same probes trained alone --------------------------------------


@pytest.mark.parametrize("name", ["mean", *poolings(24, 4, [1, 4])])
def test_stack_equals_probes_one_by_one(name):
    make = {"mean": lambda: MeanPooling(24), **poolings(24, 4, [1, 4])}[name]
    probes = [seeded(lambda: Probe(make(), 5), seed).train() for seed in range(3)]
    tokens = tokens_of(6, 9, 24)
    parameters, buffers = torch.func.stack_module_state(probes)
    stacked = torch.func.functional_call(probes[0], (parameters, buffers), tokens)
    alone = torch.stack([probe(tokens) for probe in probes])
    torch.testing.assert_close(stacked, alone)
    stacked.cos().sum().backward()
    alone.cos().sum().backward()
    for key, parameter in parameters.items():
        expected = torch.stack([probe.get_parameter(key).grad for probe in probes])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-9)
    for key, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([p.get_buffer(key) for p in probes]))


# Costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "queries", "d_out", "expected"), [(768, 32, 1, 1_383_400), (384, 32, 1, 544_744)]
)
def test_parameters_are_those_of_the_official_logs(dim, queries, d_out, expected):
    probe = Probe(EfficientProbing(dim, queries, d_out), 1000)
    assert sum(p.numel() for p in probe.parameters() if p.requires_grad) == expected
    assert ep_parameters(dim, queries, 1000, d_out) == expected


def test_parameters_of_linear_probing():
    probe = Probe(MeanPooling(768), 1000)
    counted = sum(p.numel() for p in probe.parameters())
    assert counted == linear_parameters(768, 1000) == 769_000
    assert ep_parameters(384, 8, 9, 4) == 8 * 384 + 384 * 96 + 97 * 9


def counted_macs(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("count", "dim", "queries", "d_out"), [(63, 96, 8, 1), (10, 48, 4, 2)])
def test_multiply_adds_of_ep_are_those_that_run(count, dim, queries, d_out):
    probe = EfficientProbing(dim, queries, d_out)
    tokens = torch.randn(1, count, dim)
    project_first = counted_macs(lambda: probe.project_then_pool(tokens))
    assert project_first == ep_macs(count, dim, queries, d_out)
    pool_first = counted_macs(lambda: probe(tokens))
    assert pool_first == ep_pool_first_macs(count, dim, queries, d_out)


@pytest.mark.parametrize(("count", "dim", "queries", "heads"), [(63, 96, 8, 12), (10, 48, 1, 4)])
def test_multiply_adds_of_cross_attention_are_those_that_run(count, dim, queries, heads):
    attention = CrossAttention(dim, heads, queries)
    tokens = torch.randn(1, count, dim)
    counted = counted_macs(lambda: attention.project_then_pool(tokens))
    assert counted == mhca_macs(count, dim, queries)


# Maps, neighbours, and the frozen encoder -----------------------------------------------------------------


def test_pairwise_cosine_equals_all_pairs():
    maps = tokens_of(4, 5, 9).softmax(-1)
    for image, value in zip(maps, mean_pairwise_cosine(maps), strict=True):
        pairs = [
            functional.cosine_similarity(image[i], image[j], dim=0)
            for i in range(5)
            for j in range(5)
            if i != j
        ]
        torch.testing.assert_close(value, torch.stack(pairs).mean())
    same = torch.full((2, 3, 4), 0.25)
    torch.testing.assert_close(mean_pairwise_cosine(same), torch.ones(2))
    apart = torch.eye(4)[None]
    torch.testing.assert_close(mean_pairwise_cosine(apart), torch.zeros(1))
    with pytest.raises(ValueError, match="two maps"):
        mean_pairwise_cosine(same[:, :1])


def test_foreground_mass_of_a_uniform_map_is_the_area():
    coverage = torch.rand(3, 8)
    uniform = torch.full((3, 2, 8), 1 / 8)
    torch.testing.assert_close(foreground_mass(uniform, coverage), coverage.mean(1))


def test_nearest_neighbour_finds_itself_and_votes_by_weight():
    features = tokens_of(1, 12, 6)[0]
    labels = torch.arange(12) % 3
    assert torch.equal(knn_predict(features, labels, features, 1, 0.1), labels)
    # Two far votes for class 1 against one near vote for class 0: temperature decides.
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, -2.0]])
    query = torch.tensor([[1.0, 0.1]])
    votes = torch.tensor([0, 1, 1, 2])
    assert knn_predict(bank, votes, query, 3, 0.07).item() == 0
    assert knn_predict(bank, votes, query, 3, 100.0).item() == 1
    with pytest.raises(ValueError, match="5 neighbours of only 4"):
        knn_predict(bank, votes, query, 5, 0.1)


def test_training_a_probe_leaves_the_encoder_alone():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(10, 24), nn.LayerNorm(24)).requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    probe = Probe(EfficientProbing(24, 4), 3).train()
    optimiser = torch.optim.AdamW([*probe.parameters()], lr=1e-2)
    losses = []
    images, labels = torch.randn(30, 7, 10), torch.arange(30) % 3
    for _ in range(60):
        loss = functional.cross_entropy(probe(encoder(images)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_pairwise_correlation_equals_all_pairs_and_ignores_flatness():
    maps = torch.rand(3, 4, 11, dtype=torch.float64).softmax(-1)
    for image, value in zip(maps, mean_pairwise_correlation(maps), strict=True):
        pairs = torch.corrcoef(image)[torch.triu_indices(4, 4, 1).unbind()]
        torch.testing.assert_close(value, pairs.mean())
    flat = 0.01 * maps + 0.99 / 11
    assert (mean_pairwise_cosine(flat) > 0.99).all()
    torch.testing.assert_close(mean_pairwise_correlation(flat), mean_pairwise_correlation(maps))


@pytest.mark.parametrize("queries", [(4, 4), (3, 5)])
def test_correlation_across_equals_all_pairs(queries):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(3, q, 9, generator=generator, dtype=torch.float64) for q in queries)
    found = mean_correlation_across(first, second)
    for value, a, b in zip(found, first, second, strict=True):
        pairs = [np.corrcoef(x, y)[0, 1] for x in a.numpy() for y in b.numpy()]
        assert value.item() == pytest.approx(np.mean(pairs), abs=1e-9)


def test_correlation_across_holds_that_within_and_every_map_with_itself():
    maps = torch.rand(3, 16, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    within = (16 * mean_correlation_across(maps, maps) - 1) / 15
    torch.testing.assert_close(within, mean_pairwise_correlation(maps))
