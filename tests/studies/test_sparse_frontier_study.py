"""Placebos take as much as their method; budgets hold; answers equal the decode loop; cells of the law."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.quest import Quest
from reattend.attention.decoding import decode, read_prompt
from reattend.attention.method import AttentionMethod
from reattend.data.needles import NeedleSample
from reattend.long_context.sparse_frontier import VerticalSlashTokens, line_density
from reattend.studies.sparse_frontier import (
    DECODE,
    Answers,
    Calibration,
    Draws,
    Exchange,
    LawCells,
    RandomEntries,
    RandomLines,
    RandomPages,
    Sizes,
    answers_to,
    decoders,
    exchange_scores,
    exchanges,
    largest,
    limits_table,
    mean_loss,
    methods_table,
    nearly_every_worst,
    quick_to_read,
    relative_loss,
    shortened,
    small_llamas_at,
    tasks_table,
    worst_beyond_median,
)

SIZES = Sizes(last_queries=16, sink=2, local=4, chunk=4, page=8, kernel=5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def answers(model):
    tokens = torch.randint(0, 50, (3, 75), generator=torch.Generator().manual_seed(1))
    given, scored = tokens[:, 70:], torch.tensor([True, False, True, True, False]).repeat(3, 1)
    return Answers(tokens[:, :70], given, scored, read_prompt(model, tokens[:, :70]))


def test_random_lines_keep_the_forced_ones_and_as_many():
    masses = [torch.rand(1, 4, 60, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    placebo = RandomLines(lines=9, seed=0, **SIZES.lines)
    kept = placebo.best(*masses)
    for lines, forced in zip(kept, (2, 4), strict=True):
        assert (lines.sum(-1) == 9).all()
        assert lines[..., :forced].all()
        assert not torch.equal(lines[:, 0], lines[:, 1])
    again = placebo.best(*(100 * mass for mass in masses))
    assert not torch.equal(kept[0], again[0])


def test_random_entries_and_pages_read_as_much_as_their_methods(model, answers):
    made = decoders(70, 2.5, SIZES, seed=0)
    assert isinstance(made["random entries"], RandomEntries)
    assert isinstance(made["random pages"], RandomPages)
    densities = {n: answers.scores(model, m).density.to_numpy() for n, m in made.items()}
    np.testing.assert_allclose(densities["random entries"], densities["SnapKV"])
    np.testing.assert_allclose(densities["random pages"], densities["Quest"])
    assert densities["SnapKV"][0] == pytest.approx(28 / 70, abs=0.05)


def test_draws_are_answered_where_a_test_asks():
    draws = Draws(70, {50: 4, 70: 8, 90: 2}, {2.0: 4, 5.0: 2}, {2.0: 8, 5.0: 4, 10.0: 4}, 2.0, 5.0)
    cells = [("Vertical-Slash", 2.0), ("Vertical-Slash", 5.0), ("random lines", 2.0)]
    readers = [(name, c, AttentionMethod()) for name, c in cells]
    methods = {c: decoders(70, c, SIZES, seed=0) for c in draws.written}

    def names(length, first):
        arms = draws.arms(length, first, readers, methods)
        return sorted(f"{name} {c:g}" for name, c, _ in arms)

    written = [f"{name} {c}" for name in DECODE for c in (2, 5, 10)]
    chance = [f"random {what} {c}" for what in ("entries", "pages") for c in (2, 5)]
    read = ["Vertical-Slash 2", "Vertical-Slash 5", "random lines 2"]
    assert names(70, 0) == sorted(["dense 1", *written, *chance, *read])
    # The placebos at 5 go with the fewest draws of a length, those at 2 with the prefill methods.
    assert names(70, 2) == sorted(
        ["dense 1", *written, *chance[::2], "Vertical-Slash 2", "random lines 2"]
    )
    assert names(70, 4) == ["Ada-SnapKV 2", "Quest 2", "SnapKV 2", "dense 1"]
    # Fewer draws of the methods leave those that two lengths share.
    fewer = replace(draws, written={2.0: 8, 5.0: 2, 10.0: 2})
    made = {first: fewer.arms(70, first, readers, methods) for first in (2, 4)}
    lengths = [name for name, c, _ in made[2] if c == 5]
    assert sorted(lengths) == ["Quest", "SnapKV"]
    assert [c for _, c, _ in made[4]] == [1.0, 2.0, 2.0, 2.0]
    elsewhere = ["Quest 5", "SnapKV 5", "dense 1"]
    assert names(90, 0) == sorted([*elsewhere, "random entries 5", "random pages 5"])
    assert names(50, 2) == elsewhere
    assert str(draws) == "prompts of a task: prefill 4 at 1/2, 2 at 1/5; " + (
        "decoding 8 at 1/2, 4 at 1/5, 4 at 1/10"
    )


def test_random_pages_are_drawn_anew_with_the_current_one():
    key = torch.rand(1, 2, 67, 8, generator=torch.Generator().manual_seed(0))
    placebo = RandomPages(budget=16, page=8, seed=0)
    query = key[:, :, -1:].repeat_interleave(2, 1)
    want = Quest(budget=16, page=8)
    pages = want.begin(query, key, scale=1.0)
    chosen = [placebo.choose(query, key, pages, scale=1.0) for _ in range(2)]
    real = want.choose(query, key, pages, scale=1.0)
    assert not torch.equal(*chosen)
    for entries in chosen:
        assert torch.equal(entries.sum(-1), real.sum(-1))
        assert entries[..., 64:].all()


def test_answers_under_a_cache_method_equal_the_decode_loop(model, answers):
    ours = answers.scores(model, Quest(budget=24, page=8))
    done = decode(model, answers.read, Quest(budget=24, page=8), given=answers.given)
    probability = done.log_likelihood.exp()[:, [0, 2, 3]].mean(1)
    np.testing.assert_allclose(ours.probability, probability, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_answers_are_read_with_the_method_too(model, tokens):
    drawn = torch.randint(0, 50, (2, 70 + tokens), generator=torch.Generator().manual_seed(2))
    parts = ((tuple(x[:70].tolist()), tuple(x[70:].tolist())) for x in drawn)
    samples = [NeedleSample("a", p, a, (True,) * tokens, (False,) * 70, 0.5) for p, a in parts]
    found = answers_to(model, samples)
    ours = found.scores(model, Quest(budget=8, page=8)).probability
    done = decode(model, found.read, Quest(budget=8, page=8), given=drawn[:, 70:])
    np.testing.assert_allclose(ours, done.log_likelihood.exp().mean(1), rtol=1e-5)
    dense = found.scores(model, AttentionMethod()).probability
    assert np.allclose(ours, dense, rtol=1e-6) == (tokens == 1)  # the first token is the prompt's


def test_lines_of_everything_answer_as_dense_attention(model, answers):
    dense = answers.scores(model, AttentionMethod())
    everything = VerticalSlashTokens(lines=70, **SIZES.lines)
    full = answers.scores(model, everything)
    np.testing.assert_allclose(full.probability, dense.probability, atol=1e-5)
    np.testing.assert_allclose(full.density, 1.0)


def test_budgets_are_the_largest_within(model, answers):
    calibration = Calibration(model, answers.prompts, SIZES)
    made = calibration.vertical_slash(3.0)
    more = VerticalSlashTokens(lines=made.kept + 1, **SIZES.lines)
    assert calibration.density(made) <= 1 / 3 < calibration.density(more)
    assert calibration.density(calibration.flex(3.0)) <= 1 / 3
    assert largest(lambda n: n, range(1, 9), lambda n: n / 10, 0.55) == 5
    columns, diagonals = made.best(*calibration.masses[0])
    assert line_density(columns, diagonals, 70).shape == (3, 4)


# Two stretches of prose, 10 to 29 and 40 to 49, between facts.
LONG = NeedleSample(
    task="a",
    prompt=tuple(range(60)),
    answer=(7,),
    scored=(True,),
    prose=tuple(10 <= i < 30 or 40 <= i < 50 for i in range(60)),
    depth=30 / 60,
)


def test_a_shortened_prompt_keeps_all_but_the_ends_of_its_prose():
    short = shortened(LONG, 45)
    facts = [*range(10), *range(30, 40), *range(50, 60)]
    assert sorted({*short.prompt} - {*facts}) == [*range(10, 20), *range(40, 45)]
    assert list(short.prompt) == sorted(short.prompt)
    assert [i for i, prose in zip(short.prompt, short.prose, strict=True) if not prose] == facts
    assert short.prompt[round(short.depth * 45)] == 30  # where the answer's fact stands
    assert (short.answer, short.scored) == (LONG.answer, LONG.scored)
    assert shortened(LONG, 60) == LONG
    assert len(shortened(LONG, 37).prompt) == 37
    assert shortened(LONG, 30).prompt == tuple(facts)
    for length in (29, 61):
        with pytest.raises(ValueError, match=r"30\.\.60"):
            shortened(LONG, length)


def test_a_quick_model_answers_alike(model, answers):
    quick = quick_to_read(copy.deepcopy(model))
    changed = Answers(
        answers.prompts, answers.given, answers.scored, read_prompt(quick, answers.prompts)
    )
    probability = changed.scores(quick, AttentionMethod()).probability
    np.testing.assert_allclose(
        probability, answers.scores(model, AttentionMethod()).probability, rtol=0.02
    )
    assert {
        m.weight.dtype for m in quick.model.layers[0].mlp.children() if hasattr(m, "weight")
    } == {torch.bfloat16}
    strides = []
    quick.lm_head.register_forward_hook(
        lambda head, states, _: strides.append(states[0].is_contiguous())
    )
    read_prompt(quick, answers.prompts)
    assert strides == [True]


def test_relative_loss_is_by_task():
    dense, sparse = np.array([[1.0, 0.5], [1.0, 0.5]]), np.array([[0.5, 0.5], [0.7, 0.3]])
    np.testing.assert_allclose(relative_loss(dense, sparse), [0.4, 0.2])


def test_a_law_is_found_again_and_the_largest_compression_is_held_out(model):
    cells = LawCells({32: model, 16: model}, [64, 128], [2.0, 3.0, 5.0])
    assert len(cells.cells) == 16
    sizes, lengths, compressions = (np.log(feature) for feature in cells.features)
    logits = -1 + 0.5 * sizes - 0.7 * lengths - 0.2 * compressions
    logits[~cells.seen] -= 0.3
    found = cells.fit(1 / (1 + np.exp(-logits)))
    assert found["b_N"] == pytest.approx(0.5)
    assert found["b_L"] == pytest.approx(-0.7)
    assert found["b_C"] == pytest.approx(-0.2)
    assert found["R^2, fitted"] == pytest.approx(1)
    assert found["R^2, held out"] < 0.9


def test_small_llamas_cost_less_where_they_read_less(model):
    rows, scores = small_llamas_at({32: model}, 64, [2.0, 5.0], 3, 4, 8, seed=0)
    reads = rows[rows.method == "Quest"].set_index("compression")
    assert reads.cost.is_monotonic_decreasing
    assert rows.density.between(0, 1).all()
    assert scores["Vertical-Slash", 32, 64, 1.0].shape == (3,)
    np.testing.assert_allclose(
        scores["Vertical-Slash", 32, 64, 1.0], scores["Quest", 32, 64, 1.0], atol=1e-6
    )


def by_budget(losses, draws=6):
    """Scores of one method that loses so much of each task, without noise; the dense scores are 1 and 0.5."""
    dense = np.tile([1.0, 0.5, 1.0], (draws, 1))
    return {"dense": dense} | {f"Quest {c:g}": dense * (1 - np.array(x)) for c, x in losses.items()}


def test_mean_loss_is_over_tasks_and_compressions():
    arrays = by_budget({2.0: [0.0, 0.03, 0.0], 5.0: [0.1, 0.2, 0.0]})
    assert mean_loss(arrays, "Quest", [2.0]) == pytest.approx(0.01)
    assert mean_loss(arrays, "Quest", [2.0, 5.0]) == pytest.approx((0.01 + 0.1) / 2)


def test_limits_are_by_task_and_method():
    arrays = by_budget({2.0: [0.0, 0.03, 0.5], 5.0: [0.02, 0.2, 0.0]})
    table = limits_table(arrays, ["Quest"], [2.0, 5.0], ["a", "b", "c"])
    assert table["task"].tolist() == ["a", "b", "c"]
    assert table["Quest"].tolist() == [5, 2, 1]


def test_the_worst_task_is_set_against_three_times_the_middle_one():
    arrays = by_budget({2.0: [0.01, 0.02, 0.5]})
    values = worst_beyond_median(arrays, ["Quest"], 2.0)
    np.testing.assert_allclose(values, [0.5 - 3 * 0.02] * 6)
    twice = arrays | {"SnapKV 2": arrays["dense"] * (1 - np.array([0.1, 0.0, 0.05]))}
    both = worst_beyond_median(twice, ["Quest", "SnapKV"], 2.0)
    np.testing.assert_allclose(both, [(0.44 + 0.1 - 3 * 0.05) / 2] * 6)


def test_methods_table_puts_placebos_beside_their_methods():
    rows = [("Quest", 2.0, 0.5, 0.8), ("Quest", 2.0, 0.5, 0.6), ("random pages", 2.0, 0.5, 0.1)]
    rows += [("Vertical-Slash", 5.0, 0.2, 0.3)]
    results = pd.DataFrame(rows, columns=["method", "compression", "density", "probability"])
    table = methods_table(results, [2.0, 5.0], chunk=16, page=8).set_index("method")
    assert len(table) == 6
    assert table.loc["Quest", "score, 1/2"] == pytest.approx(0.7)
    assert table.loc["Quest", "placebo's score, 1/2"] == pytest.approx(0.1)
    assert table.loc["Quest", "unit"] == "pages of 8, for every token"
    assert table.loc["Vertical-Slash", "density, 1/5"] == pytest.approx(0.2)
    assert "placebo's score, 1/5" not in table  # nothing was read there


def test_tasks_table_is_of_dense_answers_in_the_given_order():
    rows = [("dense", "b", 128, 0.5, True), ("dense", "b", 128, 0.7, False)]
    rows += [("dense", "a", 128, 0.1, False), ("Quest", "a", 128, 0.9, True)]
    columns = ["method", "task", "length", "probability", "right"]
    table = tasks_table(pd.DataFrame(rows, columns=columns), ["b", "a"])
    assert table["task"].tolist() == ["b", "a"]
    assert table["answer probability, 128"].tolist() == pytest.approx([0.6, 0.1])
    assert table["share right, 128"].tolist() == pytest.approx([0.5, 0.0])


def test_a_larger_model_gets_the_largest_budget_that_the_smaller_ones_cost_allows():
    costs = {(16, 1.0): 10.0, (16, 2.0): 6.0, (32, 1.0): 30.0, (32, 2.0): 10.0, (32, 5.0): 4.0}
    costs |= {(64, 1.0): 90.0, (64, 2.0): 50.0, (64, 5.0): 31.0}
    rows = [("Vertical-Slash", w, 128, c, cost) for (w, c), cost in costs.items()]
    rows += [("Quest", w, 128, c, 1.0) for w, c in costs]
    rows += [("Vertical-Slash", w, 64, c, 1.0) for w, c in costs]
    small = pd.DataFrame(rows, columns=["method", "width", "length", "compression", "cost"])
    cheap, dear = exchanges(small, 128)
    assert (cheap.smaller, cheap.larger, dear.smaller, dear.larger) == (16, 32, 32, 64)
    assert cheap.affordable
    assert cheap.compression == 2.0  # the larger one at as much as the smaller one costs
    assert cheap.offered == ((16, 1.0), (16, 2.0), (32, 2.0), (32, 5.0))
    assert not dear.affordable
    assert dear.compression == 5.0  # none is cheap enough: the sparsest
    assert dear.offered == ((32, 1.0), (32, 2.0), (32, 5.0))


def test_what_is_best_is_chosen_on_prompts_apart():
    exchange = Exchange(128, 16, 32, 5.0, True, ((16, 1.0), (16, 2.0), (16, 3.0), (32, 5.0)))
    means = {(16, 1.0): 0.5, (16, 2.0): 0.9, (16, 3.0): 0.6, (32, 1.0): 0.8, (32, 5.0): 0.7}
    scores = {("Vertical-Slash", w, 128, c): np.full(4, s) for (w, c), s in means.items()}
    chance = {("random lines", 32, 128, 5.0): np.full(4, 0.2)}
    apart = {key: value[:2] for key, value in scores.items()}
    apart["Vertical-Slash", 16, 128, 2.0] = np.zeros(
        2
    )  # the best by luck, which other prompts do not know
    made = exchange_scores(exchange, scores | chance, apart)
    assert {name: values.mean().round(6) for name, values in made.items()} == {
        "smaller, dense": 0.5,
        "larger, dense": 0.8,
        "larger, sparse": 0.7,
        "smaller, best": 0.6,
        "best sparse": 0.7,
        "larger, random lines": 0.2,
    }
    assert "larger, random lines" not in exchange_scores(exchange, scores, apart)


def test_small_llamas_are_read_with_random_lines_of_the_same_density(model):
    given = {32: model}, 64, [2.0, 5.0], 3, 4, 8
    plain, without = small_llamas_at(*given, seed=0)
    rows, scores = small_llamas_at(*given, seed=0, placebo=True)
    pd.testing.assert_frame_equal(rows, plain)
    chance = {key for key in scores if key[0] == "random lines"}
    assert chance == {("random lines", 32, 64, 2.0), ("random lines", 32, 64, 5.0)}
    assert set(scores) - chance == set(without)
    same = [
        np.array_equal(scores[key], scores["Vertical-Slash", *key[1:]]) for key in sorted(chance)
    ]
    assert same == [False, False]


def test_all_methods_but_one_lose_as_much_on_some_task():
    dense = np.tile([1.0, 0.5, 1.0], (6, 1))
    losses = {"a": [0.0, 0.01, 0.0], "b": [0.3, 0.0, 0.1], "c": [0.0, 0.2, 0.1], "d": [0.4, 0, 0]}
    arrays = {"dense": dense}
    arrays |= {f"{m} 5": dense * (1 - np.array(x)) for m, x in losses.items()}
    np.testing.assert_allclose(nearly_every_worst(arrays, "abcd", 5.0), [0.2] * 6)
    np.testing.assert_allclose(nearly_every_worst(arrays, "b", 5.0), [0.3] * 6)
