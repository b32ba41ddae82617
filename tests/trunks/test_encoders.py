"""Encoders on MiniLM: parity with transformers, caching, padding, and a fine-tuning that learns."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from reattend.backbones.pretrained.minilm import load
from reattend.trunks.encoders import (
    BiEncoder,
    CrossEncoder,
    TextEncoder,
    fine_tune,
    index_batches,
    length_batches,
    masked_mean,
    outputs,
    tokenise,
)

FIRST = ["A dog runs.", "The bank of the river was green, wide and very quiet.", "Yes"]
SECOND = ["An animal moves quickly.", "Money.", "No, never again"]


@pytest.fixture(scope="module")
def tokenizer():
    return load(1)[0]


def encoder(layers=2, frozen=0):
    return TextEncoder(load(layers)[1], frozen).eval()


def test_states_are_those_of_transformers(tokenizer):
    model = load(3)[1]
    tokens = tokenise(tokenizer, FIRST, length=32)
    with torch.no_grad():
        expected = model(tokens.ids, tokens.mask.long(), output_hidden_states=True).hidden_states
        found = TextEncoder(model)(tokens)
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[tokens.mask], theirs[tokens.mask], rtol=1e-5, atol=1e-5)


def test_a_cross_encoder_is_a_sequence_classifier(tokenizer):
    model = load(2)[1]
    cross = CrossEncoder(TextEncoder(model), outputs=3).eval()
    reference = BertForSequenceClassification(
        model.config.__class__(**(model.config.to_dict() | {"num_labels": 3}))
    )
    reference.bert.load_state_dict(model.state_dict())
    reference.classifier.load_state_dict(cross.head.state_dict())
    reference.eval()
    pairs = tokenise(tokenizer, FIRST, SECOND, length=32)
    assert pairs.segments.max() == 1
    with torch.no_grad():
        expected = reference(pairs.ids, pairs.mask.long(), pairs.segments).logits
        torch.testing.assert_close(cross(pairs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_cached_states_give_the_same_output(tokenizer, frozen):
    bi = BiEncoder(encoder(2, frozen))
    tokens = tokenise(tokenizer, FIRST, length=32)
    cached = bi.encoder.cache(tokens, batch=2)
    torch.testing.assert_close(bi(cached), bi(tokens), rtol=2e-3, atol=2e-3)


def test_padding_changes_nothing(tokenizer):
    bi = BiEncoder(encoder())
    alone = bi(tokenise(tokenizer, FIRST[:1], length=32))
    together = bi(tokenise(tokenizer, FIRST, length=32))[:1]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_indexing_cuts_common_padding(tokenizer):
    tokens = tokenise(tokenizer, FIRST, length=32)
    assert tokens[torch.tensor([0, 2])].ids.shape == (2, 6)


def test_frozen_parts_get_no_gradient_and_no_dropout(tokenizer):
    bi = BiEncoder(encoder(2, frozen=1)).train()
    bi(tokenise(tokenizer, FIRST, length=32)).sum().backward()
    with_gradient = {n for n, p in bi.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("encoder.layer.1" in name for name in with_gradient)
    assert not bi.encoder.model.encoder.layer[0].training
    assert bi.encoder.model.encoder.layer[1].training


def test_masked_mean_by_hand():
    states = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(masked_mean(states, mask), torch.tensor([[3.0, 4, 5]]))


def test_a_bi_encoder_is_symmetric(tokenizer):
    bi = BiEncoder(encoder())
    a, b = (tokenise(tokenizer, texts, length=32) for texts in (FIRST, SECOND))
    torch.testing.assert_close(bi.similarity(a, b), bi.similarity(b, a))
    torch.testing.assert_close(bi.similarity(a, a), torch.ones(3))


def test_fine_tuning_learns_and_repeats(tokenizer):
    texts = [f"{['dog', 'cat', 'horse'][i % 3]} number {i}" for i in range(48)]
    tokens = tokenise(tokenizer, texts, length=16)
    labels = torch.arange(48) % 3
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        model = CrossEncoder(encoder(2, frozen=1), outputs=3)
        states = model.encoder.cache(tokens)

        def loss(model, index, states=states):
            return F.cross_entropy(model(states[index]), labels[index])

        log = fine_tune(model, 48, loss, epochs=15, batch=16, learning_rate=2e-3)
        curves.append(log.losses)
        assert sum(log.losses[-3:]) < 0.5 * sum(log.losses[:3])
        assert (outputs(model, states).argmax(1) == labels).float().mean() > 0.9
    assert curves[0] == curves[1]


def test_batches_cover_all_items():
    source = index_batches(10, 5, seed=0)
    assert sorted(torch.cat([next(source), next(source)]).tolist()) == list(range(10))
    with pytest.raises(ValueError, match="do not fill"):
        next(index_batches(3, 5, seed=0))


def test_wrong_numbers_of_layers():
    with pytest.raises(ValueError, match=r"1\.\.6"):
        load(7)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        encoder(2, frozen=3)


@pytest.mark.parametrize(("items", "batch", "seed"), [(40, 4, 0), (37, 5, 1)])
def test_batches_by_length_cover_all_items_with_less_padding(items, batch, seed):
    lengths = torch.randint(3, 60, (items,), generator=torch.Generator().manual_seed(seed))
    whole = items // batch

    def padded(source):
        drawn = [next(source) for _ in range(whole)]
        assert len(set(torch.cat(drawn).tolist())) == whole * batch
        return sum(len(rows) * lengths[rows].max().item() for rows in drawn)

    sorted_ones = padded(length_batches(lengths, batch, seed))
    assert sorted_ones < 0.8 * padded(index_batches(items, batch, seed))
    with pytest.raises(ValueError, match="do not fill"):
        next(length_batches(lengths, items + 1, seed))


def test_fine_tuning_ends_with_the_best_of_its_checks():
    weights = []

    def score(model):
        weights.append(model.weight.item())
        return -abs(len(weights) - 2)  # the second check is the best

    model = torch.nn.Linear(1, 1, bias=False)

    def loss(model, index):
        return model.weight.sum() * len(index)

    fine_tune(model, 8, loss, epochs=4, batch=1, learning_rate=0.1, score=score, checks=4)
    assert len(weights) == 4
    assert model.weight.item() == weights[1] != weights[3]


def test_outputs_keep_their_order(tokenizer):
    model, tokens = BiEncoder(encoder()), tokenise(tokenizer, [*FIRST, *SECOND], length=32)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, tokens, batch=2), model(tokens))
