"""Placebos take as much as their method; budgets hold; answers equal the decode loop; cells of the law."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.quest import Quest
from reattend.attention.decoding import decode, read_prompt
from reattend.attention.method import AttentionMethod
from reattend.long_context.sparse_frontier import VerticalSlashTokens, line_density
from reattend.studies.sparse_frontier import (
    Answers,
    Calibration,
    LawCells,
    RandomEntries,
    RandomLines,
    RandomPages,
    Sizes,
    decoders,
    largest,
    relative_loss,
    small_llamas_at,
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


def test_lines_of_everything_answer_as_dense_attention(model, answers):
    dense = answers.scores(model, AttentionMethod())
    everything = VerticalSlashTokens(lines=70, **SIZES.lines)
    full = answers.scores(model, everything, draws=2)
    assert len(full) == 2
    np.testing.assert_allclose(full.probability, dense.probability[:2], atol=1e-5)
    assert full.density.tolist() == [1.0, 1.0]


def test_budgets_are_the_largest_within(model, answers):
    calibration = Calibration(model, answers.prompts, SIZES)
    made = calibration.vertical_slash(3.0)
    more = VerticalSlashTokens(lines=made.kept + 1, **SIZES.lines)
    assert calibration.density(made) <= 1 / 3 < calibration.density(more)
    assert calibration.density(calibration.flex(3.0)) <= 1 / 3
    assert largest(lambda n: n, range(1, 9), lambda n: n / 10, 0.55) == 5
    columns, diagonals = made.best(*calibration.masses[0])
    assert line_density(columns, diagonals).shape == (3, 4)


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
