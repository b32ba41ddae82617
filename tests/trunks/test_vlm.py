"""The vision-language model: packing, caching, dropping and putting back tokens, attention rows, LoRA."""

from dataclasses import replace

import pytest
import torch

from reattend.trunks.vlm import (
    COMMON,
    NO_PATCH,
    PADDING,
    LoRALinear,
    Rows,
    VisionLanguageModel,
    VLMShape,
    add_lora,
    last_asked,
    rotate,
    turns,
)

BOS, PAD = 1, 0
SHAPE = VLMShape(vocabulary=23, grid=(3, 5), tower=7, width=24, layers=3, heads=3, hidden=20)


def model_of(seed=0):
    torch.manual_seed(seed)
    model = VisionLanguageModel(SHAPE).double().eval()
    for parameter in model.parameters():  # large enough for attention to be far from uniform
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def tokens_of(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 15, 7, generator=generator, dtype=torch.float64)


QUESTIONS = torch.tensor(
    [
        [[5, 6, 7, 8], [9, 8, PAD, PAD], [5, 9, 8, PAD]],
        [[4, 8, PAD, PAD], [3, 3, 7, 8], [7, 8, PAD, PAD]],
    ]
)


def prompt_of(model, questions=QUESTIONS, tokens=None, **changes):
    tokens = tokens_of(len(questions)) if tokens is None else tokens
    return model.prompt(BOS, model.project(tokens), questions, PAD, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_packed_questions_are_answered_as_if_asked_alone(seed):
    model = model_of(seed)
    packed = model.answers(model.read(prompt_of(model))).view(2, 3, -1)
    for number in range(3):
        for picture in range(2):
            words = QUESTIONS[picture : picture + 1, number : number + 1]
            words = words[:, :, : int((words != PAD).sum())]
            alone = prompt_of(model, words, tokens_of()[picture : picture + 1])
            expected = model.answers(model.read(alone))[0]
            torch.testing.assert_close(packed[picture, number], expected, atol=1e-10, rtol=0)


def test_layers_are_those_of_the_equations():
    """One layer of one prompt, by a loop over queries with rotations written out as complex numbers."""
    model = model_of()
    prompt = prompt_of(model, QUESTIONS[:1, :1])
    layer, width, heads, dim = model.layers[0], 24, 3, 8
    x = layer.attention_norm(prompt.states[0])
    angle = prompt.positions[0, :, None] * SHAPE.base ** (-torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k, v = (f(x).view(-1, heads, dim) for f in (layer.q, layer.k, layer.v))
    q, k = (torch.complex(y[..., :4], y[..., 4:]) * turn for y in (q, k))
    mixed = torch.zeros(len(x), heads, dim, dtype=torch.float64)
    for i in range(len(x)):
        scores = (q[i] * k[: i + 1].conj()).real.sum(-1) / dim**0.5
        mixed[i] = (scores.softmax(0)[..., None] * v[: i + 1]).sum(0)
    states = prompt.states[0] + layer.o(mixed.view(-1, width))
    y = layer.feed_forward_norm(states)
    gate = layer.feed_forward.gate(y)
    states = states + layer.feed_forward.down(gate * gate.sigmoid() * layer.feed_forward.up(y))
    seen = []
    model.read(prompt, before_layer=lambda number, p, rows: seen.append(p.states[0]) or p)
    torch.testing.assert_close(seen[1], states, atol=1e-10, rtol=0)


def test_the_sequence_is_bos_then_patches_then_questions_that_all_start_behind_the_picture():
    prompt = prompt_of(model_of())
    assert prompt.patches[0].tolist() == [NO_PATCH, *range(15), *[NO_PATCH] * 12]
    assert prompt.positions[0].tolist() == [*range(16), *list(range(16, 20)) * 3]
    assert prompt.segments[1].tolist() == [COMMON] * 16 + [
        1,
        1,
        PADDING,
        PADDING,
        2,
        2,
        2,
        2,
        3,
        3,
        PADDING,
        PADDING,
    ]
    assert prompt.asked[0].nonzero()[:, 0].tolist() == [19, 21, 26]
    assert last_asked(prompt).tolist() == [[26], [25]]


@pytest.mark.parametrize("cut", [1, 7, 16])
def test_a_cache_continues_what_was_read(cut):
    model = model_of()
    prompt = prompt_of(model, QUESTIONS[:, 1:2, :])
    whole = model.read(prompt)
    cache, parts = {}, []
    for start, end in ((0, cut), (cut, 17), (17, prompt.length)):
        index = torch.arange(start, end).expand(2, -1)
        parts.append(model.read(prompt.take(index), cache=cache).states)
    real = prompt.segments != PADDING
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole.states[real], atol=1e-10, rtol=0)


def test_generation_says_what_greedy_reading_without_a_cache_says():
    model = model_of(1)
    model.norm.bias.data.zero_()  # else it says one word always
    model.words.weight.data *= 3
    said = model.generate(prompt_of(model, QUESTIONS[:, :1]), 4)
    for picture in range(2):
        words = QUESTIONS[picture, 0]
        words = words[words != PAD]
        for step in range(4):
            prompt = prompt_of(model, words[None, None], tokens_of()[picture : picture + 1])
            word = model.answers(model.read(prompt)).argmax()
            assert said[picture, step] == word
            words = torch.cat([words, word[None]])
    assert len(said.unique()) > 1


def test_generation_continues_a_prompt_whose_tokens_were_dropped_inside():
    model = model_of(2)
    kept = torch.tensor([[2, 9], [11, 3]])
    questions = QUESTIONS[:, 2:]

    def drop(layer, prompt, _):
        return prompt.keep_patches(kept) if layer == 1 else prompt

    said = model.generate(prompt_of(model, questions), 3, before_layer=drop)
    longer = [torch.cat([q[0][q[0] != PAD], s[:2]]) for q, s in zip(questions, said, strict=True)]
    for picture, words in enumerate(longer):
        prompt = prompt_of(model, words[None, None], tokens_of()[picture : picture + 1])
        read = model.read(
            prompt,
            before_layer=lambda n, p, _, k=picture: (
                p.keep_patches(kept[k : k + 1]) if n == 1 else p
            ),
        )
        assert model.answers(read).argmax() == said[picture, 2]
    with pytest.raises(ValueError, match="one question each"):
        model.generate(prompt_of(model), 1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_keeping_every_patch_changes_nothing_and_dropping_some_does(layer):
    model = model_of()
    everything = torch.stack([torch.randperm(15), torch.randperm(15)])

    def keep(kept):
        return lambda number, prompt, _: prompt.keep_patches(kept) if number == layer else prompt

    dense = model.answers(model.read(prompt_of(model)))
    same = model.answers(model.read(prompt_of(model), before_layer=keep(everything)))
    torch.testing.assert_close(same, dense, atol=1e-12, rtol=0)
    other = model.answers(model.read(prompt_of(model), before_layer=keep(everything[:, :5])))
    assert (other - dense).abs().max() > 0.05


def test_patches_dropped_before_a_layer_are_patches_hidden_from_it():
    """Against the full sequence with the dropped patches as padding from that layer on."""
    model = model_of()
    kept = torch.tensor([[14, 0, 6], [7, 8, 1]])

    def drop(number, prompt, _):
        return prompt.keep_patches(kept) if number == 1 else prompt

    def hide(number, prompt, _):
        gone = (prompt.patches[..., None] != kept[:, None]).all(2) & (prompt.patches != NO_PATCH)
        return (
            replace(prompt, segments=prompt.segments.masked_fill(gone, PADDING))
            if number == 1
            else prompt
        )

    dropped = model.answers(model.read(prompt_of(model), before_layer=drop))
    hidden = model.answers(model.read(prompt_of(model), before_layer=hide))
    torch.testing.assert_close(dropped, hidden, atol=1e-12, rtol=0)


def test_keeping_patches_before_the_model_is_projecting_kept_tokens_alone():
    model = model_of()
    kept = torch.tensor([[2, 5, 13], [0, 6, 7]])
    masked = prompt_of(model).keep_patches(kept)
    tokens = tokens_of().gather(1, kept[..., None].expand(-1, -1, 7))
    alone = model.prompt(BOS, model.project(tokens, kept), QUESTIONS, PAD, kept)
    compacted = masked.compacted()
    real = alone.segments != PADDING
    for name in ("states", "positions", "segments", "patches", "asked"):
        # products of other shapes round differently on some processors
        torch.testing.assert_close(
            getattr(compacted, name)[real], getattr(alone, name)[real], atol=1e-12, rtol=0, msg=name
        )
    assert masked.positions[0, :4].tolist() == [0, 3, 6, 14]
    assert masked.picture_tokens().tolist() == [[1, 2, 3]] * 2
    moved = model.answers(model.read(masked)) - model.answers(model.read(compacted))
    assert moved.abs().max() > 0.01  # position ids matter


def test_keeping_refuses_a_patch_that_is_not_there():
    prompt = prompt_of(model_of())
    for kept in ([[1, 15], [1, 2]], [[1, 1], [1, 2]]):
        with pytest.raises(ValueError, match="not in the prompt, or is named twice"):
            prompt.keep_patches(torch.tensor(kept))


def test_recovered_tokens_take_their_places_with_the_states_they_had():
    model = model_of()
    full = prompt_of(model)
    kept = torch.tensor([[2, 9, 4], [11, 3, 0]])
    few = full.keep_patches(kept)
    back = replace(few, states=few.states + 1).recover(full)
    gone = (full.patches[..., None] != kept[:, None]).all(2) & (full.patches != NO_PATCH)
    real = full.segments != PADDING
    torch.testing.assert_close(back.states[gone], full.states[gone], atol=0, rtol=0)
    stays = ~gone & real
    torch.testing.assert_close(back.states[stays], full.states[stays] + 1, atol=0, rtol=0)


@pytest.mark.parametrize("layer", [0, 2])
def test_rows_are_softmax_weights_of_the_queries_asked_for(layer):
    model = model_of()
    rows = Rows([layer], last_asked)
    values = []
    hook = model.layers[layer].v.register_forward_hook(lambda m, i, out: values.append(out))
    outs = []
    model.layers[layer].o.register_forward_pre_hook(lambda m, i: outs.append(i[0]))
    prompt = prompt_of(model)
    model.read(prompt, rows=rows)
    hook.remove()
    found = rows.found[layer]
    assert found.shape == (2, 3, 1, prompt.length)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 1).double(), atol=1e-12, rtol=0)
    end = last_asked(prompt)[:, 0]
    # What attention put out at that place is these weights times the values.
    v = values[0].unflatten(2, (3, 8)).transpose(1, 2)
    expected = (found @ v).transpose(1, 2).flatten(2)[:, 0]
    torch.testing.assert_close(outs[0][torch.arange(2), end], expected, atol=1e-10, rtol=0)
    other = (prompt.segments[0] != COMMON) & (prompt.segments[0] != prompt.segments[0, end[0]])
    assert found[0, ..., other].abs().max() == 0
    assert found[0, ..., : int(end[0])].std() > 0.01


def test_a_second_picture_counts_on_behind_the_first():
    model = model_of()
    two = torch.cat([tokens_of(seed=1), tokens_of(seed=2)], 1)
    prompt = prompt_of(model, tokens=two)
    assert prompt.patches[0, :32].tolist() == [NO_PATCH, *range(30), NO_PATCH]
    projected = model.project(two)
    second = model.project(tokens_of(seed=2))
    torch.testing.assert_close(projected[:, 15:], second, atol=1e-12, rtol=0)
    kept = prompt.keep_patches(torch.tensor([[3, 18], [4, 29]]))
    assert torch.equal(kept.states[:, 2], torch.stack([projected[0, 18], projected[1, 29]]))
    assert model.answers(model.read(prompt)).isfinite().all()


def test_without_a_picture_nothing_of_it_is_read():
    model = model_of()
    blind = model.prompt(BOS, None, QUESTIONS, PAD)
    assert blind.length == 13
    assert (blind.patches == NO_PATCH).all()
    seen = prompt_of(model)
    none = torch.zeros(2, 0, dtype=torch.long)
    emptied, real = seen.keep_patches(none).compacted(), blind.segments != PADDING
    torch.testing.assert_close(emptied.states, blind.states, atol=1e-12, rtol=0)
    assert torch.equal(emptied.positions[real], blind.positions[real])


def test_rotation_depends_on_the_distance_alone_and_keeps_lengths():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def product(i, j):
        turn = (turns(torch.tensor([[p]]), 8, 10_000.0, torch.float64) for p in (i, j))
        return (rotate(q, next(turn)) * rotate(k, next(turn))).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), atol=1e-10, rtol=0)
    assert (product(9, 4) - product(4, 9)).abs() > 1e-3
    turned = rotate(q, turns(torch.tensor([[3]]), 8, 10_000.0, torch.float64))
    torch.testing.assert_close(turned.norm(), q.norm(), atol=1e-12, rtol=0)
    expected = (
        q[..., 0] * torch.tensor(3.0).double().cos() - q[..., 4] * torch.tensor(3.0).double().sin()
    )
    torch.testing.assert_close(turned[..., 0], expected, atol=1e-12, rtol=0)


def test_lora_starts_as_the_identity_and_then_adds_a_product_of_low_rank():
    model = model_of()
    before = model.answers(model.read(prompt_of(model)))
    added = add_lora(model, rank=2, alpha=6.0)
    torch.testing.assert_close(model.answers(model.read(prompt_of(model))), before, atol=0, rtol=0)
    assert len(added) == 2 * 2 * SHAPE.layers
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in added}
    adapted = model.layers[1].q
    assert isinstance(adapted, LoRALinear)
    torch.nn.init.normal_(adapted.up.weight)
    x = torch.randn(5, 24).double()
    change = adapted.up.weight @ adapted.down.weight
    assert torch.linalg.matrix_rank(change) == 2
    torch.testing.assert_close(
        adapted(x), x @ (adapted.linear.weight + 3 * change).T, atol=1e-12, rtol=0
    )
    model.answers(model.read(prompt_of(model))).sum().backward()
    assert all(p.grad is not None for p in added)
    with pytest.raises(ValueError, match="no linear layers named nothing"):
        add_lora(model, 2, 1.0, ["nothing"])
