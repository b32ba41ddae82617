"""Equal densities, recall in its bounds, gates that learn, questions behind a sparse prompt."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod
from reattend.data.needles import NeedleSample
from reattend.studies import seer
from reattend.studies.prefill import Capture
from reattend.training.loop import TrainingPlan

SIZE, LENGTH = 8, 96


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16, "initializer_range": 0.3}
    config = LlamaConfig(**shape, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    made = seer.GatedModel(model, SIZE, thinned=range(0, 4, 2))
    made.trained += [made.new_gates(seed) for seed in range(2)]
    made.unplaced.append(made.new_gates(9, positions=False))
    made.set_budgets(tokens(0), (0.3,), stride=2)
    return made


def tokens(seed, length=LENGTH):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("blocks", [5, 16, 64])
def test_kept_is_the_nearest_number(blocks):
    measured = seer.rows_density(np.arange(1, blocks + 1), blocks)
    assert measured[-1] == 1
    for share in (0.1, 0.3, 0.8):
        k = seer.kept(share, blocks)
        assert abs(measured[k - 1] - share) == np.abs(measured - share).min()


def test_recall_lies_between_nothing_and_the_best(gated):
    with torch.no_grad(), attach(gated.model, Capture(2)) as captured:
        gated.model(tokens(1)[None])
    rows = gated.recall(captured, LENGTH, (0.3, 1.0), 1, 2, seer.HEURISTICS[:2])
    found = {(row["method"], row["density"]): row for row in rows}
    assert {name for name, _ in found} == {
        "best possible",
        "gates",
        "no positions",
        "random",
        "block top-k",
        "StreamingLLM",
    }
    best = found["best possible", 0.3]["recall"]
    assert all(0 < row["recall"] <= best + 1e-4 for (_, d), row in found.items() if d == 0.3)
    assert found["gates", 1.0]["recall"] == pytest.approx(100, abs=1e-3)
    assert found["gates", 0.3]["measured"] == pytest.approx(
        seer.rows_density(seer.kept(0.3, 12), 12), abs=0.05
    )


def test_vertical_slash_has_at_least_the_density(gated):
    with torch.no_grad(), attach(gated.model, gated.build("vertical-slash", 0.3, LENGTH)) as made:
        gated.model(tokens(0)[None])
    assert made.density() >= seer.rows_density(seer.kept(0.3, 12), 12) - 0.05


def test_distilling_lowers_the_loss(gated):
    examples = [gated.collect(tokens(seed)) for seed in range(2)]
    gates = gated.new_gates(3)
    before = seer.gate_loss(gates, examples[0]).item()
    losses = seer.distil(gates, examples, TrainingPlan(30, 3e-3, 0.0, warmup=2), 0)
    assert len(losses) == 30
    assert seer.gate_loss(gates, examples[0]).item() < 0.9 * before
    assert not any(p.requires_grad for p in gates.parameters())
    thin = gated.thin(examples[0])
    torch.testing.assert_close(thin.truth, examples[0].truth[:, ::2])


def test_only_the_context_is_read_sparsely(gated):
    text, question = tokens(4).tolist(), [7, 8, 9]
    prompt = (*text[: LENGTH - 4], 7, 8, 9, 3)
    prose = (True,) * (LENGTH - 4) + (False,) * 4
    sample = NeedleSample("toy", prompt, (11, 12, 13), (True, False, True), prose, 0.5)
    dense = seer.read(gated.model, AttentionMethod(), sample, question)
    with torch.no_grad():
        logits = gated.model(torch.tensor([[*prompt, 11, 12]])).logits[0]
    want = logits[[LENGTH - 1, LENGTH + 1]].log_softmax(-1)
    torch.testing.assert_close(dense.answers, want, atol=1e-4, rtol=1e-4)
    assert dense.tokens.tolist() == [11, 13]
    assert dense.compared(dense)["answer KL"] == pytest.approx(0, abs=1e-7)
    sparse = seer.read(gated.model, gated.build("StreamingLLM", 0.3, LENGTH), sample, question)
    assert sparse.compared(dense)["answer KL"] > 0
    assert sparse.essay_nll != dense.essay_nll
