"""The small decoder of KaLM-Embedding's study: its language loss, what is trained, and the four readings."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from reattend.backbones.trained import kalm_decoders
from reattend.backbones.trained.kalm_decoders import (
    READINGS,
    WIDTH,
    SmallDecoder,
    fit_reading,
    language_loss,
    narrow_table,
    read,
)
from reattend.trunks.decoders import decoder_states
from reattend.trunks.encoders import Tokens


def entries(rows=70, length=6, seed=0):
    ids = torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) < torch.randint(
        2, length + 1, (rows, 1), generator=torch.Generator().manual_seed(seed)
    )
    return Tokens(ids.masked_fill(~mask, 0), mask, torch.zeros_like(ids))


def small_decoder():
    torch.manual_seed(0)
    return SmallDecoder(0.5 * torch.randn(40, WIDTH))


def test_the_language_loss_is_the_cross_entropy_of_the_next_piece_among_those_present():
    model, tokens = small_decoder(), entries(5)
    states = model.head(decoder_states(model.body, tokens.ids, tokens.mask, causal=True))
    present, terms = tokens.ids.unique(), []
    for i in range(5):
        for t in range(int(tokens.mask[i].sum()) - 1):
            logits = states[i, t] @ model.body.embed_tokens.weight[present].T
            place = (present == tokens.ids[i, t + 1]).nonzero()[0]
            terms.append(F.cross_entropy(logits[None], place))
    torch.testing.assert_close(language_loss(model, tokens), torch.stack(terms).mean())


def test_input_vectors_stay_as_they_are_and_the_start_is_not_changed():
    start = small_decoder().body
    before = {name: value.clone() for name, value in start.state_dict().items()}
    reading = READINGS["free mask, mean"]
    model, _ = fit_reading(start, entries(), entries(seed=1), reading, 3, 0, 66)
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())
    assert torch.equal(model.embed_tokens.weight, start.embed_tokens.weight)
    assert not torch.equal(model.layers[0].mlp.up_proj.weight, start.layers[0].mlp.up_proj.weight)


def test_readings_differ_in_mask_and_pooling():
    model, tokens = small_decoder().body.eval(), entries(4)
    with torch.no_grad():
        found = [read(model, tokens, reading) for reading in READINGS.values()]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert (a - b).abs().max() > 1e-3


def test_narrow_vectors_keep_the_nearest_neighbours_of_low_rank_vectors():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 40, generator=generator) @ torch.randn(40, 200, generator=generator)
    narrow = narrow_table(wide)
    assert narrow.shape == (300, WIDTH)
    assert narrow.std().item() == pytest.approx(0.5, rel=1e-4)
    before, after = (torch.cdist(t, t).fill_diagonal_(torch.inf).argmin(1) for t in (wide, narrow))
    assert (before == after).float().mean() > 0.95


def test_the_build_gives_the_same_numbers_twice(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        kalm_decoders.build(tmp_path / name, "smoke")
    first, second = (load_file(tmp_path / n / "decoders.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
