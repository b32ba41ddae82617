"""The build of MEAP's arms: equal starts, rows and places; what is disturbed; checkpoints; reading back."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained import meap as build
from reattend.backbones.trained.meap import (
    ARMS,
    SETTINGS,
    Arm,
    disturbed_rows,
    fit,
    mixed_rows,
    random_token_loss,
    untrained,
)
from reattend.data.row_language import RowLanguage
from reattend.language_modeling.meap import official_seed_cycle

SMALL = replace(SETTINGS["smoke"], language=RowLanguage(8, 14), seeds=2)


def first(arm, seed=0, setting=SMALL):
    return next(disturbed_rows(arm, setting, seed))


def test_half_of_the_rows_walk_on_one_table_and_the_others_on_their_own():
    language = RowLanguage(8, 200, ((1.0,),))
    batches = list(islice(mixed_rows(language, 6, 3, drawn=6), 4))
    tables = []
    for batch in batches:
        for row in batch:
            pairs = dict(zip(row[:-1].tolist(), row[1:].tolist(), strict=True))
            assert all(
                pairs[a] == b for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)
            )
            tables.append(pairs)
    fixed = [t for i, t in enumerate(tables) if i % 6 >= 3]
    assert all(a[k] == b[k] for a in fixed for b in fixed for k in a.keys() & b.keys())
    own = [t for i, t in enumerate(tables) if i % 6 < 3]
    assert any(a[k] != b[k] for a in own for b in own for k in a.keys() & b.keys())
    assert not any(torch.equal(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize("batch", [0, 5])
def test_a_batch_without_halves_is_refused(batch):
    with pytest.raises(ValueError, match="a batch has two halves of rows"):
        next(mixed_rows(RowLanguage(8, 9), batch, 0))


def test_arms_of_one_seed_read_the_same_rows_and_are_disturbed_at_the_same_places():
    meap, placebo, plain = (first(ARMS[name]) for name in ("MEAP", "Random tokens", "NTP"))
    assert torch.equal(meap[0], placebo[0])
    assert torch.equal(meap[0], plain[0])
    assert torch.equal(meap[1], placebo[1])
    assert meap[1].sum(1).tolist() == [1] * 4
    assert not plain[1].any()
    assert not torch.equal(first(ARMS["MEAP"], seed=1)[0], meap[0])


def test_the_cycle_follows_the_optimiser_step():
    for step, (rows, masked, _) in enumerate(
        islice(disturbed_rows(ARMS["MEAP, 51 masks"], SMALL, 0), 4)
    ):
        assert torch.equal(masked, official_seed_cycle(4, 13, 0.15, step))
        assert rows.shape == (4, 14)


def test_the_placebo_puts_tokens_of_the_language_where_the_method_masks():
    rows, masked, fill = first(Arm(0.4, random_tokens=True))
    seen = []

    def model(inputs):
        seen.append(inputs)
        return F.one_hot(inputs, 9).double()

    loss = random_token_loss(model, rows, masked, fill)
    assert torch.equal(seen[0][masked], fill[masked])
    assert torch.equal(seen[0][~masked], rows[:, :-1][~masked])
    expected = F.cross_entropy(F.one_hot(seen[0], 9).double().mT, rows[:, 1:])
    torch.testing.assert_close(loss, expected)
    assert fill.max() < 8
    assert fill.unique().numel() == 8


def test_all_arms_start_from_one_model_with_the_mask_in_its_vocabulary():
    model = untrained(SMALL, 3)
    assert model.tokens.num_embeddings == model.head.num_embeddings == 9
    assert SMALL.mask_id == 8
    assert torch.equal(model.head.weight, untrained(SMALL, 3).head.weight)
    assert not torch.equal(model.tokens.weight, untrained(SMALL, 4).tokens.weight)
    assert model.tokens.weight is not model.head.weight


def test_the_mask_is_learned_in_masked_arms_alone():
    start = untrained(SMALL, 0).tokens.weight[8]
    setting = replace(SMALL, rate=1e-2)
    moved = {
        arm: (fit(arm, setting, 0)[0][-1]["tokens.weight"][8] - start).norm() / start.norm()
        for arm in ("NTP", "MEAP", "Random tokens")
    }
    assert moved["MEAP"] > 0.01
    assert max(moved["NTP"], moved["Random tokens"]) < 0.003  # weight decay alone


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'MLM'; there are: NTP, MEAP"):
        fit("MLM", SMALL, 0)


def test_training_lowers_the_loss_of_every_arm():
    setting = replace(SMALL, checkpoints=(40, 80), rate=1e-2)
    for arm in setting.arms:
        kept, losses = fit(arm, setting, 0)
        assert len(kept) == 2
        assert len(losses) == 80
        assert losses[-10:].mean() < losses[:10].mean() - 0.2


def test_training_and_reading_back(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "smoke", SMALL)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build.build(tmp_path / name, "smoke")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path / "first")
    found = build.load("smoke")
    assert list(found.models) == list(SMALL.arms)
    assert found.losses["MEAP"].shape == (2, SMALL.steps)
    assert [len(found.models["MEAP"]), len(found.models["MEAP"][0])] == [2, 4]
    kept, _ = fit("MEAP", SMALL, 1)
    for model, checkpoint in zip(found.models["MEAP"][1], kept, strict=True):
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, checkpoint[name])
