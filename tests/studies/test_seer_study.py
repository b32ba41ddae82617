"""Equal numbers of blocks, recall in its bounds, positions of other lengths, questions behind a sparse prompt."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.blocks import causal_block_mask, density
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod
from reattend.backbones.trained import seer_attention as seer_gates
from reattend.backbones.trained.seer_attention import Setting, Trained, rows_blocks, rows_density
from reattend.data.needles import NeedleSample
from reattend.studies import seer
from reattend.studies.prefill import Capture

SIZE, LENGTH = 8, 96
BLOCKS = LENGTH // SIZE


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16, "initializer_range": 0.3}
    config = LlamaConfig(**shape, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    gates = {
        name: seer_gates.new_gates(model, SIZE, seed, name)
        for seed, name in enumerate(seer.ARMS.values())
    }
    made = seer.GatedModel(model, Trained(Setting(1, LENGTH, SIZE, 1, 0), gates, {}, []))
    made.set_lines(tokens(0), (0.3, 0.6))
    return made


def tokens(seed, length=LENGTH):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed))


def captured(gated, seed, stride=seer_gates.THINNED):
    with torch.no_grad(), attach(gated.model, Capture(stride)) as made:
        gated.model(tokens(seed)[None])
    return made


@pytest.mark.parametrize("name", ["gates", *seer.HEURISTICS, "random", "best possible"])
def test_every_method_computes_as_many_blocks_in_every_head(gated, name):
    k = seer_gates.kept(0.3, BLOCKS)
    for layer, (query, key, scale) in captured(gated, 1, 1).seen.items():
        mask = gated.build(name, 0.3, LENGTH).block_mask(query, key, scale=scale, layer=layer)
        assert (mask.sum((-2, -1)) == rows_blocks(k, BLOCKS)).all()
        torch.testing.assert_close(
            density(mask), torch.full((1, 4), rows_density(k, BLOCKS)), atol=1e-6, rtol=0
        )


def test_lines_come_by_their_mass_in_the_given_proportion():
    columns = torch.tensor([[[0.0, 5.0, 1.0, 2.0]]])
    diagonals = torch.tensor([[[0.0, 1.0, 9.0, 2.0]]])
    order = seer.line_order(columns, diagonals, torch.tensor([0.5]).double())[0, 0]
    inf = torch.inf
    # Ranks: columns 0, 1, 3, 2 and diagonals 0, 3, 1, 2; a line of rank r comes at 2 r.
    want = [[0, inf, inf, inf], [0, 0, inf, inf], [0, 2, 0, inf], [0, 2, 6, 0]]
    assert order.tolist() == want
    few = seer.line_order(columns, diagonals, torch.tensor([0.25]).double())[0, 0]
    assert few[2, 1] == pytest.approx(3 / 0.75)  # the diagonal (rank 3) and the column at 4: equal
    assert few[3, 1] == pytest.approx(1 / 0.75)  # now the diagonal is first


def test_a_line_that_does_not_fit_keeps_its_lowest_rows():
    columns, diagonals = torch.tensor([[[9.0, 1, 5, 2]]]), torch.tensor([[[9.0, 0, 0, 0]]])
    order = seer.line_order(columns, diagonals, torch.tensor([0.9]).double())
    base = torch.eye(4, dtype=torch.bool)
    base[:, 0] = True
    assert torch.equal(seer.earliest(order, 7)[0, 0], base)
    base[3, 2] = True  # column 2 has the next mass
    assert torch.equal(seer.earliest(order, 8)[0, 0], base)
    base[3, 1] = True  # then column 1 is the last one, from below
    assert torch.equal(seer.earliest(order, 9)[0, 0], base)
    assert torch.equal(seer.earliest(order, 10)[0, 0], causal_block_mask(4, 4))


def test_the_division_into_lines_is_the_one_that_covers_most(gated):
    seen = captured(gated, 0, 1).seen
    for layer, (query, key, scale) in seen.items():
        mass = seer.exact_block_mass(query, key, SIZE, scale)

        def covered(shares, q=query, k=key, s=scale, m=mass, n=layer):
            method = seer.EqualVerticalSlash(seer_gates.kept(0.6, BLOCKS), {n: shares}, SIZE)
            return (m * method.block_mask(q, k, scale=s, layer=n)).sum((0, -2, -1))

        chosen = covered(gated.shares[0.6][layer])
        for share in seer.COLUMN_SHARES:
            assert (chosen >= covered(torch.full((4,), share).double()) - 1e-4).all()


def test_recall_lies_between_nothing_and_the_best(gated):
    arms = (*seer.ARMS, seer.STRETCHED)
    rows = gated.recall(captured(gated, 1), LENGTH, (0.3, 1.0), arms, seer.HEURISTICS[:2])
    found = {(row["method"], row["density"]): row for row in rows}
    assert {name for name, _ in found} == {"best possible", *arms, *seer.HEURISTICS[:2]}
    best = found["best possible", 0.3]["recall"]
    assert all(0 < row["recall"] <= best + 1e-4 for (_, d), row in found.items() if d == 0.3)
    assert found["gates", 1.0]["recall"] == pytest.approx(100, abs=1e-3)


def test_stretched_positions_are_the_true_ones_at_the_training_length_alone(gated):
    arms, seen = ("gates", seer.STRETCHED), captured(gated, 2)
    for length, same in ((LENGTH, True), (LENGTH // 2, False)):
        ours, other = (seer_scores(gated, gated.gates(name, length), seen, length) for name in arms)
        assert torch.allclose(ours, other) == same
    own, factor = gated.trained.gates["gates"], LENGTH / (LENGTH // 2)
    twin = seer.stretched(own, factor)
    torch.testing.assert_close(twin.inv_freq, 2 * own.inv_freq)
    assert not torch.equal(twin.inv_freq, own.inv_freq)
    assert torch.equal(twin.key_map, own.key_map)


def seer_scores(gated, gates, seen, length):
    query, key, _ = seen.seen[0]
    query, key = query[:, :, :length], key[:, :, :length]
    method = gated.build("gates", 0.3, length)
    method.gates = gates
    return method.gate_scores(query, key, layer=0)


def test_following_is_that_of_the_maps_that_training_sees(gated):
    example = seer_gates.collect(gated.model, gated.trained.gates["gates"], tokens(3))
    predicted = gated.trained.gates["gates"](*example[:2])
    layers = slice(None, None, seer_gates.THINNED)
    choice, correlation = gated.follows(captured(gated, 3), LENGTH, (0.3,), seed=0)
    ours, truth = predicted[:, layers], example.truth[:, layers]
    want = seer_gates.map_correlation(ours.softmax(-1), truth)
    assert correlation == pytest.approx(want, abs=1e-5)
    assert choice < 1


def test_gates_that_are_their_teacher_follow_it_to_the_end(gated, monkeypatch):
    seen = captured(gated, 3)
    maps = iter(
        seer.truth_map(query, key, SIZE, scale).log() for query, key, scale in seen.seen.values()
    )
    monkeypatch.setattr(seer.GatedModel, "_scores", lambda *args: next(maps))
    choice, correlation = gated.follows(seen, LENGTH, (0.1, 0.3), seed=0)
    assert choice == pytest.approx(1, abs=1e-6)
    assert correlation == pytest.approx(1, abs=1e-5)


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
