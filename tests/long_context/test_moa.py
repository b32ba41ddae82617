"""Oracles of MoA."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from reattend.attention.blocks import expand_to_tokens
from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod
from reattend.attention.statistics import block_mass
from reattend.long_context.moa import (
    Infeasible,
    Item,
    MoA,
    Plan,
    Problem,
    Profile,
    Rule,
    candidate_rules,
    influence,
    pareto_choices,
    profile_influence,
)

FULL = Rule(0, 1.0)
MIXED = ((Rule(-8, 0.5), Rule(16, 0.125)), (Rule(0, 0.25), Rule(-8, 0.875)))
SHAPES = [  # batch, query heads, queries, keys, block size
    pytest.param(1, 2, 64, 64, 8, id="H2-T64-b8"),
    pytest.param(2, 6, 101, 101, 8, id="H6-T101-b8"),
    pytest.param(1, 4, 29, 90, 12, id="H4-Q29-T90-b12"),
]
EACH = pytest.mark.parametrize(("batch", "heads", "queries", "keys", "size"), SHAPES)


def tensors(batch, heads, queries, keys, *, key_heads=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, tokens):
        return torch.randn(batch, heads, tokens, 16, generator=generator, dtype=dtype)

    return 2 * normal(heads, queries), normal(key_heads, keys), normal(key_heads, keys)


def llama(seed=0, **other):
    torch.manual_seed(seed)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**(shape | other))).eval()
    return model.requires_grad_(False)


def tokens(length, seed=0):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


# Rules and plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "windows"),  # by hand, at 4, 8, 16 and 32 blocks of 16
    [
        (Rule(0, 0.5), (2, 4, 8, 16)),
        (Rule(48, 0.0), (3, 3, 3, 3)),
        (Rule(-16, 0.5), (1, 3, 7, 15)),
        (Rule(-40, 0.5), (1, 1, 5, 13)),  # -40 // 16 = -3
        (Rule(-24, 0.875), (1, 5, 12, 26)),  # alpha is rounded first: 3.5 - 2, not 3.5 - 1.5
        (Rule(-64, 1.0), (1, 4, 12, 28)),
        (FULL, (4, 8, 16, 32)),
        (Rule(320, 0.0), (4, 8, 16, 20)),  # never more than there is
    ],
)
def test_windows_by_hand(rule, windows):
    assert tuple(rule.window(n, 16) for n in (4, 8, 16, 32)) == windows


def test_density_counts_the_sinks():
    """alpha / N where beta = 0, and one block more."""
    plan = Plan.uniform(Rule(48, 0.0), 3, 2, block_size=16)
    for blocks in (4, 9, 40):
        assert plan.density(16 * blocks) == pytest.approx(min(blocks, 4) / blocks, abs=1e-7)
    uniform = Plan.uniform(Rule(-16, 0.5), 3, 2, block_size=16)
    for length in (256, 512, 768, 1024):
        assert uniform.density(length) == pytest.approx(0.5, abs=1e-7)
    assert Plan.uniform(FULL, 3, 2).density(1000) == 1


def test_a_permuted_plan_has_the_same_rules_elsewhere():
    plan = Plan(tuple((Rule(n, 0.5), Rule(-n, 0.25)) for n in range(1, 9)))
    other = plan.permuted(3)
    assert other != plan
    assert other == plan.permuted(3)
    assert other != plan.permuted(4)
    assert sorted(itertools.chain(*other.rules)) == sorted(itertools.chain(*plan.rules))
    assert {len(layer) for layer in other.rules} == {2}


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = Plan(MIXED, block_size=8, sink=2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert MoA(plan=tmp_path / "plan.json").plan == plan
    for text in ("{", '{"rules": [[[0, 1]]]}', '{"rules": 3, "block_size": 8, "sink": 1}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match="holds no plan"):
            Plan.load(tmp_path / "wrong.json")


def test_plans_and_models_must_agree():
    with pytest.raises(ValueError, match="as many rules in every layer"):
        Plan(((FULL, FULL), (FULL,)))
    for rules in (MIXED[:1], tuple(layer[:1] for layer in MIXED)):
        model = llama()
        attached = attach(model, "moa", plan=Plan(rules, block_size=8))
        with attached, pytest.raises(ValueError, match="make a plan for this model"):
            model(tokens(40)[None])


@pytest.mark.parametrize(
    "rules", [(FULL,), (Rule(-8, 1.0),), (Rule(-16, 1.0),), (Rule(16, 0.0), FULL), (Rule(-4, 0.5),)]
)
def test_saves_from_the_first_length_at_which_a_block_is_left_out(rules):
    method = MoA(plan=Plan((rules,), block_size=8))
    found = next((n for n in range(1, 300) if method.plan.density(n) < 1), None)
    assert method.saves_from("prefill") == method.saves_from("decode") == found


def test_the_grid_of_rules():
    """The official code's: alphas from -N_min to N_max in steps, and spans that fit."""
    rules = candidate_rules([256, 512], 1024, alphas=7)
    assert {rule.alpha for rule in rules} == {-128, 0, 128, 256, 384, 512}  # -256 + beta 256 <= 0
    assert len(set(rules)) == len(rules)
    for alpha, eighths in itertools.product(range(-256, 513, 128), range(9)):
        fits = alpha + 32 * eighths > 0
        fits &= alpha + 64 * eighths <= 512 and alpha + 128 * eighths <= 1024
        assert (Rule(alpha, eighths / 8) in rules) == fits
    shares = candidate_rules([256, 512], 1024, alphas=1)
    assert shares == [Rule(0, eighths / 8) for eighths in range(1, 9)]


# Masks --------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("sink", [0, 1, 2])
def test_masks_equal_a_double_loop(batch, heads, queries, keys, size, sink):
    plan = Plan(MIXED, block_size=size, sink=sink)
    query, key, _ = tensors(batch, heads, queries, keys)
    for layer in range(2):
        mask = MoA(plan=plan).block_mask(query, key, layer=layer)
        seen = expand_to_tokens(mask, size, queries, keys)
        for head in range(heads):
            rule = MIXED[layer][head // (heads // 2)]
            window = rule.window(-(-keys // size), size)
            for i in range(queries):
                mine = (i + keys - queries) // size
                for j in range(keys):
                    near = j // size > mine - window or j // size < sink
                    assert seen[0, head, i, j] == (near and j <= i + keys - queries)
            rows = torch.arange(keys) // size + 1
            counts = mask[0, head].sum(-1)
            whole = rows[-queries:].unique().clamp_max(window + sink)
            torch.testing.assert_close(counts, whole)


@EACH
def test_the_full_rule_is_dense(batch, heads, queries, keys, size):
    query, key, value = tensors(batch, heads, queries, keys)
    method = MoA(plan=Plan.uniform(FULL, 1, 2, block_size=size))
    ours = method.prefill(query, key, value, scale=0.3, layer=0)
    expected = dense_attention(query, key, value, scale=0.3, causal=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert method.density() == 1


@EACH
def test_the_output_is_that_of_the_mask(batch, heads, queries, keys, size):
    query, key, value = tensors(batch, heads, queries, keys)
    method = MoA(plan=Plan(MIXED, block_size=size))
    seen = expand_to_tokens(method.block_mask(query, key, layer=1), size, queries, keys)
    ours = method.prefill(query, key, value, scale=0.3, layer=1)
    expected = dense_attention(query, key, value, mask=seen, scale=0.3, causal=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_spans_follow_the_length_that_is_given():
    query, key, _ = tensors(1, 4, 64, 64)
    plan = Plan(MIXED, block_size=8)
    short, long = (MoA(plan=plan, length=n).block_mask(query, key, layer=0) for n in (16, 640))
    assert short.sum() < MoA(plan=plan).block_mask(query, key, layer=0).sum() < long.sum()


@pytest.mark.parametrize("sink", [1, 2])
def test_decoding_reads_a_ring_buffer_of_the_mask(sink):
    """A whole pass under the mask, token by token; what is not read may be overwritten at once."""
    prompt, steps, size = 61, 30, 8
    plan = Plan(MIXED, block_size=size, sink=sink)
    query, key, value = tensors(2, 4, prompt + steps, prompt + steps, dtype=torch.float64)
    for layer in range(2):
        method = MoA(plan=plan, length=prompt)
        whole = method.prefill(query, key, value, scale=0.3, layer=layer)
        kept_key, kept_value = key.clone(), value.clone()
        call = {"scale": 0.3, "layer": layer}
        method = MoA(plan=plan)  # the length is that of the prompt
        method.begin_decoding(query[:, :, :prompt], key[:, :, :prompt], **call)
        widest = plan.windows(prompt)[layer].max() + sink
        for n in range(prompt, prompt + steps):
            seen = slice(0, n + 1)
            before = method.kv_reads
            ours = method.decode(query[:, :, n : n + 1], key[:, :, seen], value[:, :, seen], **call)
            torch.testing.assert_close(ours, whole[:, :, n : n + 1], atol=1e-12, rtol=0)
            assert 0 < method.kv_reads - before <= 2 * 2 * widest * size
            one = query[:, :, n : n + 1]
            chosen = method.choose(one, key[:, :, seen], prompt, scale=0.3)
            for cache in (kept_key, kept_value):
                cache[:, :, seen][~chosen] = 1e6
            from_ring = dense_attention(
                query[:, :, n : n + 1],
                kept_key[:, :, seen],
                kept_value[:, :, seen],
                mask=chosen.repeat_interleave(2, dim=1)[:, :, None],
                scale=0.3,
            )
            torch.testing.assert_close(from_ring, ours, atol=1e-12, rtol=0)


def test_in_a_model_decoding_goes_on_as_one_pass_would():
    model, text = llama(), tokens(75)[None]
    plan = Plan(MIXED, block_size=8)
    with attach(model, "moa", plan=plan, length=50):
        whole = model(text).logits
        cache = DynamicCache(config=model.config)
        parts = [model(text[:, :32], past_key_values=cache).logits]
        parts += [model(text[:, 32:44], past_key_values=cache).logits]
        parts += [model(text[:, n : n + 1], past_key_values=cache).logits for n in range(44, 75)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert (whole - model(text).logits).abs().max() > 0.1


# Influence ----------------------------------------------------------------------------------------


def maps(seed=0, length=13):
    """Causal attention weights of two heads and the gradient of a linear read-out, <C, A V>."""
    generator = torch.Generator().manual_seed(seed)
    scores, read = (
        torch.randn(2, length, length, generator=generator, dtype=torch.float64) for _ in "ab"
    )
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return (3 * scores).masked_fill(~seen, -torch.inf).softmax(-1), read.tril()


@pytest.mark.parametrize("seed", range(3))
def test_influence_equals_brute_force_where_the_loss_is_linear(seed):
    weights, gradient = maps(seed)
    ours = influence(weights, gradient, epsilon=0.0)
    for head, i in itertools.product(range(2), range(1, 13)):
        for j in range(i + 1):
            row = weights[head, i].clone()
            row[j] = 0.0
            change = gradient[head, i] @ (row / row.sum()) - gradient[head, i] @ weights[head, i]
            torch.testing.assert_close(ours[head, i, j], change, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours[:, 0, 0], -gradient[:, 0, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_of_influences_balances(seed):
    weights, gradient = maps(seed, length=17)
    ours = influence(weights, gradient, epsilon=0.0)
    balance = (ours * (1 - weights)).sum(-1)[:, 1:]
    torch.testing.assert_close(balance, torch.zeros_like(balance), atol=1e-10, rtol=0)


def test_epsilon_tames_entries_near_one():
    weights, gradient = torch.tensor([[1.0, 0.0], [0.999, 0.001]]), torch.tensor([[0, 0], [1.0, 2]])
    near, far = (influence(weights, gradient, e)[1, 0] for e in (1e-6, 0.0078))
    assert near == pytest.approx(0.999 * 0.001 / 0.001, rel=1e-2)
    assert far == pytest.approx(0.999 * 0.001 / 0.0088, rel=1e-2)


class Explicit(AttentionMethod):
    """Dense attention whose weights keep their gradients."""

    def __init__(self):
        super().__init__()
        self.weights = {}

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        _, weights = dense_attention(
            query, key, value, scale=scale, causal=True, return_weights=True
        )
        weights.retain_grad()
        self.weights[layer] = weights
        return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@pytest.mark.parametrize("length", [64, 51])
def test_a_profile_holds_the_gradients_of_autograd(length):
    model = llama().double()
    items = [
        Item(tokens(length, seed), torch.arange(length) >= length - scored)
        for seed, scored in enumerate((5, 11))
    ]
    (profile,) = profile_influence(model, items, block_size=8)
    expected = 0.0
    for item in items:
        explicit = Explicit()
        with attach(model, explicit):
            embedded = model.get_input_embeddings()(item.tokens[None]).requires_grad_()
            logits = model(inputs_embeds=embedded).logits[0, :-1]
        losses = F.cross_entropy(logits, item.tokens[1:], reduction="none")
        losses[item.scored[1:]].mean().backward()
        blocks = [
            block_mass(influence(w.detach(), w.grad.tril()).abs()[0], 8)
            for w in explicit.weights.values()
        ]
        expected = expected + torch.stack(blocks).unflatten(1, (2, 2)).sum(2) / len(items)
    assert expected.max() > 1e-3
    torch.testing.assert_close(profile.influence, expected, atol=1e-9, rtol=1e-6)


def test_a_profile_needs_one_length():
    items = [Item(tokens(n), torch.arange(n) > 3) for n in (16, 24)]
    for wrong in (items, []):
        with pytest.raises(ValueError, match="texts of one length"):
            profile_influence(llama(), wrong, block_size=8)


def some_profile(blocks=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Profile(torch.rand(3, 2, blocks, blocks, generator=generator).tril())


@pytest.mark.parametrize("sink", [0, 1, 2])
def test_costs_equal_a_double_loop(sink):
    profile, windows = some_profile(), torch.tensor([1, 2, 5, 8, 9, 40])
    ours = profile.costs(windows, sink)
    for rule, window in enumerate(windows.tolist()):
        expected = sum(
            profile.influence[:, :, i, j].double()
            for i in range(9)
            for j in range(i + 1)
            if j >= sink and i - j >= window
        )
        torch.testing.assert_close(
            ours[..., rule], expected + torch.zeros(3, 2, dtype=torch.float64), atol=1e-6, rtol=0
        )
    assert (ours.diff(dim=-1) <= 1e-12).all()  # wider spans mask less
    plan = Plan(((Rule(8, 0.0), Rule(0, 0.25)),) * 3, block_size=8, sink=sink)  # 1 and 2 blocks
    both = ours[:, 0, 0].sum() + ours[:, 1, 1].sum()
    assert profile.cost(plan) == pytest.approx(both.item(), rel=1e-6)
    assert (ours[..., -2:] == 0).all()


# The program --------------------------------------------------------------------------------------


def problem(seed=0, layers=1, heads=3, rules=4, objectives=1, **settings):
    generator = np.random.default_rng(seed)
    costs = np.sort(generator.random((objectives, layers, heads, rules)))[..., ::-1].copy()
    densities = np.sort(generator.uniform(0.4, 1.0, (2, rules)))
    densities[:, 0] = 0.35  # alone it keeps to the bounds
    return Problem(costs, densities, gap=1e-9, **({"density": 0.6, "least": 0.5} | settings))


def allowed(made):
    """Every choice within the bounds, by enumeration."""
    _, layers, heads, rules = made.costs.shape
    for flat in itertools.product(range(rules), repeat=layers * heads):
        choice = np.array(flat).reshape(layers, heads)
        mean = made.densities[:, choice].mean(axis=(1, 2))
        few = all(len(set(layer)) <= made.rules_per_layer for layer in choice)
        if few and (mean <= made.density).all() and (mean >= made.least * made.density).all():
            yield choice


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_layer", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_program_equals_brute_force(seed, per_layer, layers):
    made = problem(seed, layers=layers, rules_per_layer=per_layer)
    best = min(made.cost(choice)[0] for choice in allowed(made))
    choice = made.solve(0, [None])
    assert made.cost(choice)[0] == pytest.approx(best, abs=1e-9)
    assert any(np.array_equal(choice, other) for other in allowed(made))


@pytest.mark.parametrize("seed", range(5))
def test_bounds_on_the_other_objective_hold(seed):
    made = problem(seed, layers=2, objectives=2)
    free = made.cost(made.solve(0, [None, None]))
    bound = (free[1] + made.cost(made.solve(1, [None, None]))[1]) / 2
    choice = made.solve(0, [None, bound])
    held = [made.cost(c)[0] for c in allowed(made) if made.cost(c)[1] <= bound + 1e-9]
    assert made.cost(choice)[1] <= bound + 1e-6
    assert made.cost(choice)[0] == pytest.approx(min(held), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_plans_of_the_front_are_of_the_true_front(seed):
    made = problem(seed, layers=2, objectives=2)
    costs = np.stack([made.cost(choice) for choice in allowed(made)])
    found = [made.cost(choice) for choice in pareto_choices(made, intervals=3)]
    assert found
    for cost in found:
        better = (costs <= cost + 1e-9).all(axis=1) & (costs < cost - 1e-9).any(axis=1)
        assert not better.any()
    assert len({tuple(np.round(cost, 9)) for cost in found}) == len(found)


def test_plans_of_a_coarse_search_do_not_beat_each_other():
    """A solver that stops early leaves plans that others of the same front beat."""
    for seed in range(8):
        made = replace(problem(seed, layers=3, objectives=2), gap=0.9)
        costs = np.stack([made.cost(choice) for choice in pareto_choices(made, intervals=4)])
        for cost in costs:
            assert not ((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_has_its_least_density_also_where_less_would_cost_less(seed):
    made = problem(seed, layers=2, least=0.8)
    made = replace(made, costs=made.costs[..., ::-1].copy())
    choice = made.solve(0, [None])
    assert made.cost(choice)[0] == pytest.approx(min(made.cost(c)[0] for c in allowed(made)))
    assert made.densities[:, choice].mean(axis=(1, 2)).min() >= 0.48 - 1e-9


def test_bounds_that_no_plan_keeps():
    with pytest.raises(Infeasible, match="allow more rules, or a lower least density"):
        pareto_choices(problem(density=0.2, least=0.5))


def test_one_objective_has_one_plan():
    made = problem(2, layers=2)
    (choice,) = pareto_choices(made)
    assert np.array_equal(choice, made.solve(0, [None]))
