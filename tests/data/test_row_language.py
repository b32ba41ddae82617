"""Rows that walk on tables of their own, and what counting in them achieves."""

import itertools
import math

import pytest
import torch
from torch import Generator

from reattend.data.row_language import RowLanguage, best_counts_nats, counts_nats, fresh_rows

KINDS = ((1.0,), (0.5, 0.5), (0.4, 0.3, 0.1, 0.1, 0.05, 0.05))


def test_a_walk_follows_its_table_with_its_chances():
    language = RowLanguage(12, 400, KINDS)
    generator = Generator().manual_seed(0)
    tables = language.tables(50, generator)
    tokens = language.walk(tables, generator)
    here, following = tokens[:, :-1], tokens[:, 1:]
    places = tables.gather(1, here[..., None].expand(-1, -1, 6)) == following[..., None]
    assert (places.sum(-1) == 1).all()  # a successor, and successors are distinct
    for kind, chances in enumerate(KINDS):
        shares = places[here % 3 == kind].double().mean(0)
        expected = torch.tensor([*chances, *[0.0] * (6 - len(chances))], dtype=torch.float64)
        torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)


def test_tables_are_the_rows_own_and_random():
    tables = RowLanguage(8, 5).tables(4000, Generator().manual_seed(1))
    assert tables.shape == (4000, 8, 3)
    shares = tables[:, 0].flatten().bincount(minlength=8) / tables[:, 0].numel()
    torch.testing.assert_close(shares, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    assert not torch.equal(tables[0], tables[1])


def test_draws_repeat_by_seed_and_fixed_tables_are_shared():
    language = RowLanguage(10, 300, ((0.9, 0.1),))
    assert torch.equal(language.draw(4, 3), language.draw(4, 3))
    assert not torch.equal(language.draw(4, 3), language.draw(4, 4))
    one, other = (language.draw_fixed(30, 5, seed) for seed in (0, 1))
    assert not torch.equal(one, other)
    moves = torch.cat([rows.unfold(1, 2, 1).flatten(0, 1) for rows in (one, other)])
    assert len(moves.unique(dim=0)) <= 20  # two successors of each of ten tokens


def test_entropy_is_that_of_the_chances():
    by_hand = -sum(p * math.log(p) for p in (0.8, 0.15, 0.05))
    assert RowLanguage().entropy == pytest.approx(by_hand)
    assert RowLanguage(9, 4, ((1.0,), (0.5, 0.5))).entropy == pytest.approx(math.log(2) * 4 / 9)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_counts_equal_a_loop(smoothing):
    tokens = RowLanguage(5, 17, ((0.7, 0.3),)).draw(3, 0)
    found = counts_nats(tokens, 5, smoothing)
    assert found.shape == (3, 16)
    for row, t in [(0, 0), (1, 7), (2, 15)]:
        x = tokens[row].tolist()
        followers = [x[s + 1] for s in range(t) if x[s] == x[t]]
        share = (followers.count(x[t + 1]) + smoothing) / (len(followers) + 5 * smoothing)
        assert found[row, t].item() == pytest.approx(-math.log(share), rel=1e-5)


def test_counting_beats_chance_and_stays_above_the_entropy():
    language = RowLanguage()
    nats = best_counts_nats(language.draw(200, 0), 32)
    assert language.entropy < nats < 1.5 < math.log(32)


@pytest.mark.parametrize(
    ("chances", "message"),
    [(((0.5, 0.4),), "sum to 1"), (((1.2, -0.2),), "sum to 1"), (((0.25,) * 4,), "4 successors")],
)
def test_bad_languages_are_refused(chances, message):
    with pytest.raises(ValueError, match=message):
        RowLanguage(3, 9, chances)


def test_rows_never_come_again_and_seeds_differ():
    language = RowLanguage(8, 24)
    rows = torch.cat(list(itertools.islice(fresh_rows(language, 4, 0, drawn=8), 6)))
    assert len(rows.unique(dim=0)) == 24
    again, other = (next(fresh_rows(language, 4, seed, drawn=8)) for seed in (0, 1))
    assert torch.equal(again, rows[:4])
    assert not torch.equal(other, rows[:4])
