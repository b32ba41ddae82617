"""Times, slopes and counts for TransNormerLLM."""

import math

import pytest
import torch

from reattend.language_modeling.transnormer import GatedLinearAttention, decay_slopes
from reattend.studies.transnormer import bigram_nats, operator_runs, token_milliseconds
from reattend.trunks.language import Trunk
from reattend.trunks.mixers import SoftmaxAttention


def test_linear_forms_agree_on_gradients():
    runs = operator_runs(50, 2, 4, 16)
    left, *others = (runs[name]() for name in ("left product", "lightning", "one block"))
    for other in others:
        for mine, theirs in zip(left, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(runs["softmax"]()[0], left[0])


def test_every_context_is_decoded_from_its_own_cache(monkeypatch):
    torch.manual_seed(0)
    models = {
        "linear": Trunk(7, 8, [lambda w: GatedLinearAttention(w, 2, decay_slopes(2, 2)[0])]),
        "softmax": Trunk(7, 8, [lambda w: SoftmaxAttention(w, 2)]),
    }
    lengths = []
    for model in models.values():
        model.register_forward_hook(lambda m, args, out: lengths.append(args[1].length))
    tokens = torch.zeros(1, 20, dtype=torch.long)
    found = token_milliseconds(models, tokens, [5, 20], rounds=2, repeats=2)
    assert {name: x.shape for name, x in found.items()} == {"linear": (2, 2), "softmax": (2, 2)}
    assert sorted(lengths) == sorted(2 * ([5, 20] + 6 * [6, 7, 21, 22]))


def test_counted_pairs_predict_what_they_counted():
    pairs = torch.tensor([[0, 90, 10], [50, 0, 50], [0, 0, 0]])
    rows = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    sure = -(2 * math.log(0.9) + math.log(0.1) + math.log(0.5)) / 4
    assert bigram_nats(pairs, rows, (1e-9,)) == pytest.approx(sure, rel=1e-6)
    unseen = torch.tensor([[2, 1]])
    unigram = (90 + 1) / (200 + 3)
    assert bigram_nats(pairs, unseen, (5.0,)) == pytest.approx(-math.log(unigram))
    assert bigram_nats(pairs, rows, (1e-9, 100.0)) == pytest.approx(sure, rel=1e-6)
