"""Oracles of SPES saliency, of cross-attention cut to the speech, of their comparison and of deletion."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import WhisperConfig, WhisperForConditionalGeneration

from reattend.speech import s2t_cross_attention as method
from reattend.speech.s2t_cross_attention import Speech

BINS, WINDOW, END = 6, 26, 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=31,
        num_mel_bins=BINS,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_source_positions=WINDOW // 2,
        max_target_positions=20,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=2,
        attn_implementation="eager",
    )
    made = WhisperForConditionalGeneration(config).double().eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim > 1:  # at the usual initialisation the speech would hardly matter
            parameter.normal_(0, 0.4)
    return made


@pytest.fixture
def speech():
    features = torch.randn(BINS, WINDOW, generator=generator(1)).double()
    return Speech(features, 18, torch.tensor([2, 5]), torch.tensor([7, 11, 4, 9, END]))


# Masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [0.5, 0.2])
@pytest.mark.parametrize("block", [(1, 1), (3, 4), (5, 2), (17, 1)])
def test_every_cell_is_removed_at_the_rate(removed, block):
    masks = method.rectangle_masks(1500, (17, 9), block, generator(), removed)
    assert masks.shape == (3000, 17, 9)
    rate = (~masks).double().mean(0)
    assert (rate - removed).abs().max() < 5 * (removed * (1 - removed) / 3000) ** 0.5


def test_pairs_complement_each_other():
    masks = method.rectangle_masks(40, (13, 7), (3, 2), generator())
    assert (masks[::2] ^ masks[1::2]).all()
    other = method.rectangle_masks(40, (13, 7), (3, 2), generator(), removed=0.3)
    assert not (other[::2] ^ other[1::2]).all()


def test_rectangles_are_kept_or_removed_whole():
    rows, columns = 4, 3
    for mask in method.rectangle_masks(60, (14, 11), (rows, columns), generator(2)):
        fits = []
        for top, left in itertools.product(range(rows), range(columns)):
            cell = (torch.arange(14) + top) // rows, (torch.arange(11) + left) // columns
            label = cell[0][:, None] * 100 + cell[1]
            fits.append(all(len(mask[label == name].unique()) == 1 for name in label.unique()))
        assert any(fits)


def test_the_grid_moves_from_pair_to_pair():
    masks = method.rectangle_masks(400, (12, 1), (4, 1), generator(3))[::2, :, 0]
    borders = (masks[:, 1:] != masks[:, :-1]).double().mean(0)
    assert borders.min() > 0.05
    assert borders.max() < 0.2


# Scores and relevance -------------------------------------------------------------------------------


def test_divergence_is_that_of_torch_and_zero_without_change():
    logs = torch.randn(4, 5, 12, generator=generator()).double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(
        logs, logs[:1].expand_as(logs), reduction="none", log_target=True
    )
    found = method.divergence(logs[0], logs)
    torch.testing.assert_close(found, expected.sum(-1))
    assert found[0].abs().max() == 0
    assert found.min() > -1e-12
    assert found[1:].min() > 0.01


def test_relevance_goes_to_the_removed_cells():
    """With an additive score, the mean over removals finds each cell's own part above a common level."""
    weights = torch.tensor([[3.0, 0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 2.0, 0.0]]).double()
    masks = method.rectangle_masks(6000, (5, 1), (1, 1), generator())[:, :, 0]
    scores = (~masks).double() @ weights.T
    found = method.removal_relevance(masks, scores)
    # E[score | i removed] = w_i + half of all the others.
    expected = weights / 2 + weights.sum(1, keepdim=True) / 2
    torch.testing.assert_close(found, expected, atol=0.06, rtol=0)
    ignored = (found - found.mean(1, keepdim=True))[1, [0, 1, 2, 4]]
    assert (ignored < 0).all()
    assert found[1, [0, 1, 2, 4]].min() > 0.9, "the common level, not zero"


def test_relevance_divides_by_how_often_a_cell_was_removed():
    masks = torch.tensor([[[False, True]], [[False, True]], [[True, False]], [[True, True]]])
    scores = torch.tensor([[1.0], [3.0], [5.0], [100.0]])
    assert method.removal_relevance(masks, scores).tolist() == [[[2.0, 5.0]]]
    assert method.removal_relevance(masks[3:], scores[3:]).tolist() == [[[0.0, 0.0]]]


def test_keeping_all_changes_nothing_and_removing_all_is_the_same_everywhere(model, speech):
    kept = torch.ones(3, 18, BINS, dtype=torch.bool)
    assert method.input_scores(model, speech, kept, 0.3).abs().max() < 1e-12
    assert method.output_scores(model, speech, kept[:, :9, 0]).abs().max() < 1e-12
    scores = method.input_scores(model, speech, ~kept, 0.3, batch=2)
    assert scores.shape == (3, 5)
    assert scores.min() > 1e-4
    relevance = method.removal_relevance(~kept, scores)
    assert (relevance - relevance[:, :1, :1]).abs().max() < 1e-12


def test_input_scores_are_those_of_a_filled_spectrogram(model, speech):
    """Frame by bin, on the frames of speech and the first bins alone; the fill may differ by bin."""
    masks = method.rectangle_masks(3, (18, 4), (4, 2), generator())
    fill = torch.tensor([0.1, -0.4, 0.7, 0.2]).double()
    found = method.input_scores(model, speech, masks, fill, batch=4)
    whole = model(speech.features[None], decoder_input_ids=torch.tensor([[2, 5, 7, 11, 4, 9]]))
    for mask, scores in zip(masks, found, strict=True):
        features = speech.features.clone()
        for frame, row in itertools.product(range(18), range(4)):
            if not mask[frame, row]:
                features[row, frame] = fill[row]
        ids = torch.tensor([[2, 5, 7, 11, 4, 9]])
        changed = model(features[None], decoder_input_ids=ids).logits.log_softmax(-1)[0, 1:]
        reference = whole.logits.log_softmax(-1)[0, 1:]
        expected = (reference.exp() * (reference - changed)).sum(-1)
        torch.testing.assert_close(scores, expected, atol=1e-10, rtol=1e-8)


def test_output_scores_replace_frames_that_the_decoder_reads(model, speech):
    masks = method.rectangle_masks(2, (9, 1), (1, 1), generator())[:, :, 0]
    fill = torch.randn(24, generator=generator(4)).double()
    found = method.output_scores(model, speech, masks, fill, batch=3)
    encoded = method.encode(model, speech.features[None])
    reference = method.forced_log_probabilities(model, encoded, speech.prompt, speech.tokens)[0]
    for mask, scores in zip(masks, found, strict=True):
        states = encoded.clone()
        states[0, :9][~mask] = fill
        logs = method.forced_log_probabilities(model, states, speech.prompt, speech.tokens)
        torch.testing.assert_close(scores, method.divergence(reference, logs)[0])


def test_a_model_that_reads_one_frame_has_its_saliency_there():
    """A score that depends on one position alone peaks there, and reliability nears 1."""
    masks = method.rectangle_masks(300, (11, 1), (1, 1), generator())[:, :, 0]
    scores = (~masks[:, [4, 7]]).double() * torch.tensor([2.0, 0.5]).double()
    relevance = method.removal_relevance(masks, scores)
    assert relevance.argmax(1).tolist() == [4, 7]
    assert method.reliability(masks, scores) > 0.97


def test_pooled_input_saliency_is_output_saliency_where_the_encoder_mixes_nothing():
    """Score additive over positions: removing frames of the input or of the output is the same."""
    positions = 8
    weights = torch.rand(3, positions, generator=generator(5)).double()
    cells = method.rectangle_masks(6000, (2 * positions, 5), (2, 5), generator(6))
    whole = (
        cells[:, ::2, 0] & cells[:, 1::2, 0]
    )  # a position is intact where both of its frames are
    frames = method.rectangle_masks(6000, (positions, 1), (1, 1), generator(7))[:, :, 0]
    x = method.removal_relevance(cells, (~whole).double() @ weights.T)
    h = method.removal_relevance(frames, (~frames).double() @ weights.T)
    assert method.row_correlation(method.pool(x), h) > 0.9
    assert method.row_correlation(method.pool(x, "mean"), h) > 0.95


# The model ----------------------------------------------------------------------------------------------


def test_forced_probabilities_are_those_of_decoding_step_by_step(model, speech):
    encoded = method.encode(model, speech.features[None])
    found = method.forced_log_probabilities(model, encoded, speech.prompt, speech.tokens)
    assert found.shape == (1, 5, 31)
    for step in range(5):
        read = torch.cat([speech.prompt, speech.tokens[:step]])[None]
        logits = model(encoder_outputs=(encoded,), decoder_input_ids=read).logits[:, -1]
        torch.testing.assert_close(found[:, step], logits.log_softmax(-1), atol=1e-9, rtol=1e-8)


def test_greedy_transcripts_follow_the_forced_probabilities(model):
    features = torch.randn(6, BINS, WINDOW, generator=generator(8)).double()
    prompt = torch.tensor([2, 5])
    found = method.transcribe(model, features, prompt, END, 7)
    lengths = set()
    for one, tokens in zip(features, found, strict=True):
        lengths.add(len(tokens))
        forced = torch.cat([tokens, torch.tensor([END])])
        logs = method.forced_log_probabilities(
            model, method.encode(model, one[None]), prompt, forced
        )
        best = logs[0].argmax(-1)
        assert best[: len(tokens)].tolist() == tokens.tolist()
        assert len(tokens) == 7 or best[-1] == END
    assert all(END not in tokens.tolist() for tokens in found)


def test_cross_attention_equals_a_softmax_by_hand(model, speech):
    found = method.cross_attention(model, speech)
    assert found.shape == (3, 2, 5, WINDOW // 2)
    inputs, handles = [], []
    decoder = model.get_decoder()

    def record(_module, args, kwargs):
        inputs.append(args[0] if args else kwargs["hidden_states"])

    for layer in decoder.layers:
        handles.append(layer.encoder_attn.register_forward_pre_hook(record, with_kwargs=True))
    encoded = method.encode(model, speech.features[None])
    decoder(torch.tensor([[2, 5, 7, 11, 4, 9]]), encoder_hidden_states=encoded)
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(decoder.layers):
        block = layer.encoder_attn
        q = block.q_proj(inputs[number])[0].view(6, 2, 12).transpose(0, 1)
        k = block.k_proj(encoded)[0].view(-1, 2, 12).transpose(0, 1)
        expected = (q @ k.mT / 12**0.5).softmax(-1)[:, 1:]
        torch.testing.assert_close(found[number], expected, atol=1e-9, rtol=1e-7)


def test_cut_rows_sum_to_one_and_the_mass_is_reported(model, speech):
    attention = method.cross_attention(model, speech)
    kept, mass = method.cut_to_speech(attention, speech.positions)
    assert kept.shape == (3, 2, 5, 9)
    torch.testing.assert_close(kept.sum(-1), torch.ones(3, 2, 5).double())
    torch.testing.assert_close(mass, attention[..., 9:].sum(-1))
    torch.testing.assert_close(kept * (1 - mass)[..., None], attention[..., :9])
    assert 0.1 < mass.mean() < 0.9


def test_attention_leaves_the_model_as_it_was(model, speech):
    expected = method.cross_attention(model, speech)
    model.set_attn_implementation("sdpa")
    try:
        torch.testing.assert_close(method.cross_attention(model, speech), expected)
        assert model.config._attn_implementation == "sdpa"
    finally:
        model.set_attn_implementation("eager")


def test_value_norms_are_those_of_a_heads_contribution(model, speech):
    encoded = method.encode(model, speech.features[None])[0]
    found = method.value_norms(model, encoded)
    assert found.shape == (3, 2, WINDOW // 2)
    block = model.get_decoder().layers[1].encoder_attn
    values = block.v_proj(encoded)
    for head in range(2):
        alone = torch.zeros_like(values)
        alone[:, 12 * head : 12 * (head + 1)] = values[:, 12 * head : 12 * (head + 1)]
        contribution = block.out_proj(alone) - block.out_proj.bias
        torch.testing.assert_close(found[1, head], contribution.norm(dim=-1))


def test_gradient_times_input_matches_finite_differences(model, speech):
    found = method.gradient_times_input(model, speech, fill=0.2)
    assert found.shape == (5, 18, BINS)
    step = 1e-5
    for token, frame, row in ((0, 3, 2), (2, 17, 5), (4, 0, 0)):
        values = []
        for sign in (1, -1):
            moved = speech.features.clone()
            moved[row, frame] += sign * step
            logs = method.forced_log_probabilities(
                model, method.encode(model, moved[None]), speech.prompt, speech.tokens
            )
            values.append(logs[0, token, speech.tokens[token]])
        slope = (values[0] - values[1]) / (2 * step)
        expected = (slope * (speech.features[row, frame] - 0.2)).abs()
        torch.testing.assert_close(found[token, frame, row], expected, atol=1e-8, rtol=1e-4)


# Comparison -----------------------------------------------------------------------------------------------


def test_pooling_takes_two_frames_and_all_bins():
    relevance = torch.arange(2 * 6 * 3).view(2, 6, 3).double()
    assert method.pool(relevance).tolist() == [[5, 11, 17], [23, 29, 35]]
    assert method.pool(relevance, "mean").tolist() == [[2.5, 8.5, 14.5], [20.5, 26.5, 32.5]]
    with pytest.raises(ValueError, match="max, mean"):
        method.pool(relevance, "sum")


def test_correlation_is_pearsons_row_by_row():
    a, b = torch.randn(2, 4, 13, generator=generator(9)).double()
    expected = np.mean([stats.pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)])
    found = method.row_correlation(a, b)
    assert found.item() == pytest.approx(expected)
    scale = torch.rand(4, 1, generator=generator(10)).double() + 0.1
    torch.testing.assert_close(method.row_correlation(a * scale + 3, b), found)
    torch.testing.assert_close(method.row_correlation(-a, b), -found)
    constant = a.clone()
    constant[2] = 1.5
    assert method.row_correlation(constant, constant).item() == pytest.approx(0.75)
    maps = torch.stack([a, b]).view(1, 2, 4, 13)
    torch.testing.assert_close(
        method.row_correlation(maps, b)[0], torch.stack([found, torch.tensor(1.0).double()])
    )


def test_rows_standardised_and_laid_flat_give_the_same_number():
    """What the row-wise measure is: one correlation over cells after each token is standardised."""
    a, b = torch.rand(2, 5, 11, generator=generator(11)).double() ** 3
    a *= torch.tensor([1.0, 9.0, 0.1, 4.0, 2.0])[:, None]
    even = [method.standardise(m) for m in (a, b)]
    assert method.flat_correlation(*even).item() == pytest.approx(
        method.row_correlation(a, b).item()
    )
    expected = stats.pearsonr(a.flatten(), b.flatten())[0]
    assert method.flat_correlation(a, b).item() == pytest.approx(expected)
    assert abs(expected - method.row_correlation(a, b).item()) > 0.02


def test_standardised_rows_have_mean_zero_and_sample_variance_one():
    relevance = torch.rand(3, 6, 4, generator=generator()).double()
    relevance[1] = 2.0
    even = method.standardise(relevance)
    torch.testing.assert_close(even.mean((1, 2)), torch.zeros(3).double())
    torch.testing.assert_close(even.flatten(1).var(1), torch.tensor([1.0, 0.0, 1.0]).double())


def test_reliability_foresees_the_agreement_of_two_full_maps():
    """Spearman-Brown: the halves' correlation, brought to all masks, is that of two independent maps."""
    weights = torch.rand(4, 30, generator=generator(12)).double()
    runs = []
    for seed in range(30):
        masks = method.rectangle_masks(60, (30, 1), (1, 1), generator(seed))[:, :, 0]
        noise = torch.randn(60, 4, generator=generator(100 + seed)).double()
        noise = noise.repeat_interleave(2, 0)  # antithetic pairs would take the rest out
        scores = (~masks).double() @ weights.T + 2 * noise * (~masks[:, :1]).double().sub(0.5)
        runs.append((method.reliability(masks, scores), method.removal_relevance(masks, scores)))
    predicted = np.mean([run[0] for run in runs])
    pairs = itertools.pairwise([run[1] for run in runs])
    agreed = np.mean([method.row_correlation(a, b).item() for a, b in pairs])
    assert 0.1 < agreed < 0.98
    assert predicted == pytest.approx(agreed, abs=0.05)
    with pytest.raises(ValueError, match="at least 4"):
        method.reliability(masks[:2], scores[:2])


# Words in time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "positions"), [(2, 5), (3, 8), (4, 4), (4, 10)])
def test_starts_are_those_of_the_best_cut(tokens, positions):
    """Against every cut of the positions into one piece a token."""
    for seed in range(6):
        relevance = torch.rand(tokens, positions, generator=generator(seed)).double()
        even = (relevance - relevance.mean(0)) / relevance.std(0)

        def total(cut, even=even):
            edges = [0, *cut, positions]
            pieces = itertools.pairwise(edges)
            return sum(even[token, a:b].sum().item() for token, (a, b) in enumerate(pieces))

        cuts = itertools.combinations(range(1, positions), tokens - 1)
        assert method.token_starts(relevance) == [0, *max(cuts, key=total)]


def test_starts_of_a_clear_map_and_of_peaks():
    relevance = torch.zeros(3, 12)
    relevance[0, :5] = relevance[1, 5:7] = relevance[2, 7:] = 1
    assert method.token_starts(relevance) == [0, 5, 7]
    relevance[0, 1] = relevance[1, 5] = relevance[2, 9] = 2
    assert method.token_middles(relevance) == [0, 3, 7]
    with pytest.raises(ValueError, match="4 tokens do not fit 3 positions"):
        method.token_starts(torch.zeros(4, 3))


# Deletion -------------------------------------------------------------------------------------------------


def test_a_map_over_positions_covers_its_frames_and_bins():
    spread = method.spread(torch.tensor([[1.0, 2.0, 3.0]]), 4)
    assert spread.shape == (1, 6, 4)
    assert spread[0, :, 2].tolist() == [1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(method.pool(spread), torch.tensor([[1.0, 2.0, 3.0]]))


def test_the_map_of_the_utterance_gives_every_token_its_say():
    """A token with small relevance counts as much as one with large relevance."""
    small = torch.zeros(2, 3, 4).double()
    small[0, 0, 0], small[1, 2, 3] = 1e-3, 1e3
    found = method.sentence_map(small)
    assert found[0, 0].item() == pytest.approx(found[2, 3].item(), rel=1e-5)
    others = found.flatten()[[1, 5, 10]]
    assert others.min() >= 0
    assert others.max() < found[0, 0] <= 1
    torch.testing.assert_close(method.sentence_map(5 * small + 2), found, rtol=1e-4, atol=1e-6)


def test_deletion_takes_the_most_important_cells_first():
    features = torch.rand(5, 9, generator=generator()) + 1
    importance = torch.rand(6, 4, generator=generator(1))
    shares = [0.0, 0.25, 0.5, 1.0]
    found = method.deleted(features, importance, shares, -7.0, generator())
    assert torch.equal(found[0], features)
    gone = found == -7.0
    assert gone.flatten(1).sum(1).tolist() == [0, 6, 12, 24]
    for level in (1, 2):
        inside = gone[level, :4, :6].T
        assert importance[inside].min() > importance[~inside].max()
    assert not gone[:, 4].any(), "nothing outside of the map"
    assert not gone[:, :, 6:].any()
    assert torch.equal(found[~gone], features.expand_as(found)[~gone])


def test_ties_are_broken_at_random_and_all_maps_end_alike():
    features, flat = torch.rand(4, 8), torch.ones(8, 4)
    first, second = (method.deleted(features, flat, [0.5, 1.0], 0.0, generator(s)) for s in (0, 1))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert (first[1] == 0).all()


@pytest.mark.parametrize(
    ("said", "meant", "errors"),
    [
        ("press one", "press one", 0),
        ("press a one", "press one", 1),
        ("press", "press one", 1),
        ("dress won", "press one", 2),
        ("", "press one for help", 4),
        ("one press", "press one", 2),
        ("a b c d", "b c d e", 2),
    ],
)
def test_word_errors(said, meant, errors):
    assert method.word_errors(said.split(), meant.split()) == errors


def test_area_is_the_mean_height_of_the_curve():
    assert method.area([0.0, 0.5, 1.0], [0.0, 100.0, 100.0]) == pytest.approx(75)
    assert method.area([0.0, 0.2, 1.0], [40.0, 40.0, 40.0]) == pytest.approx(40)


def test_frames_must_be_whole_positions_within_the_window():
    features, ids = torch.zeros(BINS, WINDOW), torch.tensor([END])
    for frames in (7, 0, WINDOW + 2):
        with pytest.raises(ValueError, match=f"got {frames}"):
            Speech(features, frames, ids, ids)
