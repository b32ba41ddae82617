"""DMT-JEPA: neighbours, the head in its two modes, masks, the architecture; official numbers where there are any."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.vision import multiply_adds
from reattend.vision.dmt_jepa import (
    BlockMasks,
    Encoder,
    Jepa,
    JepaSize,
    LocalAggregationHead,
    Predictor,
    choose_neighbours,
    gather_patches,
    mean_of_chosen,
    momentum_at,
    neighbour_similarity,
    neighbour_table,
    step_multiply_adds,
)

TINY = JepaSize(48, 8, 12, 2, 3, 12, 2, channels=2)


def waves(*shape):
    """Numbers of which those of the official code below were computed."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(1.3 * steps**1.05).view(shape)


def filled(module):
    """The module with trained parameters that follow from their names' order, in double precision."""
    for number, (_, parameter) in enumerate(sorted(module.named_parameters())):
        if parameter.requires_grad:
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            values = 0.3 * torch.sin(0.7 * steps**1.1 + number)
            parameter.data = values.view(parameter.shape).to(parameter.dtype)
    return module.double()


def shaken(module, seed=0):
    """The module in double precision with every parameter (norms and biases too) moved by noise."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module.double()


def tokens(batch=3, patches=35, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, patches, width, generator=generator, dtype=torch.float64)


# Neighbours ---------------------------------------------------------------------------------------------


def test_a_corner_has_three_neighbours_an_edge_five_the_rest_eight():
    table, present = neighbour_table(5, 7)
    counts = present.sum(1).view(5, 7)
    assert counts[0, 0] == counts[4, 6] == 3
    assert counts[0, 3] == counts[2, 0] == 5
    assert (counts[1:-1, 1:-1] == 8).all()
    assert set(table[2 * 7 + 3].tolist()) == {9, 10, 11, 16, 18, 23, 24, 25}
    assert set(table[0][present[0]].tolist()) == {1, 7, 8}


def test_wrapped_windows_take_the_opposite_border():
    table, present = neighbour_table(4, 5, wrap=True)
    assert present.all()
    assert set(table[0].tolist()) == {1, 5, 6, 4, 9, 15, 16, 19}


def test_a_wider_window_has_more_slots():
    table, present = neighbour_table(7, 7, window=5)
    assert table.shape == (49, 24)
    assert present[24].all()
    assert present[0].sum() == 8


@pytest.mark.parametrize(
    ("window", "wrap", "says"), [(4, False, "odd"), (1, False, "odd"), (7, True, "itself")]
)
def test_refuses_windows_that_are_none(window, wrap, says):
    with pytest.raises(ValueError, match=says):
        neighbour_table(5, 6, window, wrap)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chooses_the_most_similar_neighbours_of_a_loop(seed):
    x = tokens(2, 35, seed=seed)
    table, present = neighbour_table(5, 7)
    index, exists = choose_neighbours(neighbour_similarity(x, table), table, present, 4)
    for picture in range(2):
        for patch in (0, 3, 16, 34):
            beside = table[patch][present[patch]].tolist()
            cosine = {
                j: F.cosine_similarity(x[picture, patch], x[picture, j], dim=0) for j in beside
            }
            wanted = sorted(cosine, key=cosine.get, reverse=True)[:4]
            found = index[picture, patch][exists[picture, patch]].tolist()
            assert found == wanted


def test_a_missing_slot_is_chosen_last_whatever_its_score():
    table, present = neighbour_table(3, 3)
    index, exists = choose_neighbours(torch.ones(1, 9, 8) - 2 * present.float(), table, present, 4)
    assert exists[0, 0].tolist() == [True, True, True, False]
    assert set(index[0, 0, :3].tolist()) == {1, 3, 4}


def test_refuses_more_neighbours_than_slots():
    table, present = neighbour_table(3, 3)
    with pytest.raises(ValueError, match=r"1\.\.8"):
        choose_neighbours(torch.zeros(1, 9, 8), table, present, 9)


def test_the_plain_mean_leaves_out_what_does_not_exist():
    x = tokens(1, 9)
    table, present = neighbour_table(3, 3)
    mean = mean_of_chosen(x, *choose_neighbours(torch.zeros(1, 9, 8), table, present, 8))
    assert torch.allclose(mean[0, 0], x[0, [1, 3, 4]].mean(0), atol=1e-12)
    assert torch.allclose(mean[0, 4], (x[0].sum(0) - x[0, 4]) / 8, atol=1e-12)


def test_gathers_as_indexing_does():
    x, index = tokens(2, 10), torch.tensor([[[3, 1], [0, 9]], [[2, 2], [5, 7]]])
    assert torch.equal(gather_patches(x, index), torch.stack([x[0][index[0]], x[1][index[1]]]))


# The head -----------------------------------------------------------------------------------------------


def head(**options):
    return shaken(LocalAggregationHead(12, 3, **options))


def test_equals_the_official_head_on_stored_numbers():
    official = filled(LocalAggregationHead(12, 3, wrap=True, swapped_queries=True))
    x = waves(3, 36, 12)
    found = official.targets(x, (6, 6))
    assert found[1, [0, 17, 35], 2].tolist() == pytest.approx(
        [0.254164, 0.253252, 0.252613], abs=2e-6
    )
    assert found.square().mean().item() == pytest.approx(0.107944, abs=2e-6)
    assert found.abs().mean().item() == pytest.approx(0.271361, abs=2e-6)
    seen = official.context(x[:, :20])
    assert seen[2, [0, 7, 19], 5].tolist() == pytest.approx(
        [-0.543601, -0.360091, -0.510206], abs=2e-6
    )
    assert seen.abs().mean().item() == pytest.approx(0.270647, abs=2e-6)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_target_is_what_one_query_reads_of_its_neighbours(seed):
    aggregate, x = head(), tokens(2, seed=seed)
    found = aggregate.targets(x, (5, 7))
    table, present = neighbour_table(5, 7)
    index, exists = choose_neighbours(neighbour_similarity(x, table), table, present, 4)
    for picture, patch in ((0, 0), (1, 17), (1, 34)):
        query = x[picture].mean(0)[None]
        others = x[picture][index[picture, patch][exists[picture, patch]]]
        for block in aggregate.cls_blocks:
            read = block.norm1(torch.cat([query, others]))
            q, k, v = block.attn.q(read[:1]), block.attn.k(read), block.attn.v(read)
            parts = []
            for part in range(3):
                use = slice(4 * part, 4 * part + 4)
                weight = (q[:, use] @ k[:, use].T / math.sqrt(4)).softmax(-1)
                parts.append(weight @ v[:, use])
            query = query + block.attn.proj(torch.cat(parts, 1))
            query = query + block.mlp(block.norm2(query))
        assert torch.allclose(aggregate.norm(query)[0], found[picture, patch], atol=1e-12)


def test_targets_of_a_picture_do_not_depend_on_its_batch():
    x = tokens(4)
    aggregate = head()
    assert torch.allclose(
        aggregate.targets(x, (5, 7))[2:3], aggregate.targets(x[2:3], (5, 7)), atol=1e-12
    )


def test_the_official_pairing_mixes_pictures():
    x = tokens(4, 36)
    swapped, own = head(swapped_queries=True), head()
    swapped.load_state_dict(own.state_dict())
    same = (swapped.targets(x, (6, 6)) - own.targets(x, (6, 6))).abs().amax(-1) < 1e-10
    # Row i of all patches gets the mean of picture i mod 4; 36 is a multiple of 4.
    wanted = torch.arange(36)[None] % 4 == torch.arange(4)[:, None]
    assert torch.equal(same, wanted)


def test_the_order_of_neighbours_does_not_matter_and_all_eight_need_no_choice():
    x = tokens(2, 36)
    aggregate = head(k=8)
    by_chance = torch.rand(2, 36, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        aggregate.targets(x, (6, 6)), aggregate.targets(x, (6, 6), by_chance), atol=1e-12
    )
    four = head(k=4)
    assert (four.targets(x, (6, 6)) - four.targets(x, (6, 6), by_chance)).abs().max() > 0.01


def test_a_patch_chooses_its_neighbours_and_is_not_read():
    x = tokens(1, 25)
    moved = x.clone()
    moved[0, 12] = x[0, 12].flip(0)
    moved[0, 24] += x[0, 12] - moved[0, 12]  # the mean of the picture stays
    scores = torch.rand(1, 25, 8)  # given, so that the patch does not choose either
    left_out, kept = head(), head(own=True)
    kept.load_state_dict(left_out.state_dict())

    def change(aggregate):
        difference = aggregate.targets(moved, (5, 5), scores) - aggregate.targets(x, (5, 5), scores)
        return difference[0, 12].abs().max()

    assert change(left_out) < 1e-12 < 0.001 < change(kept)


def test_constant_features_have_one_target():
    x = torch.ones(2, 35, 12, dtype=torch.float64) * torch.arange(12)
    assert torch.allclose(neighbour_similarity(x, neighbour_table(5, 7)[0]), torch.ones(1).double())
    found = head(k=3).targets(x, (5, 7))  # as many as a corner has
    assert torch.allclose(found, found[:, :1].expand_as(found), atol=1e-12)


def test_in_context_one_reading_is_added_to_all_tokens():
    aggregate, x = head(), tokens(2, 9)
    block = aggregate.cls_blocks[0]
    query = x.mean(1, keepdim=True)
    read = block.attn(block.norm1(torch.cat([query, x], 1)))
    state = x + read
    state = state + block.mlp(block.norm2(state))
    assert torch.allclose(block(x, query, x), state, atol=1e-12)
    second = aggregate.cls_blocks[1]
    out = aggregate.norm(second(state, state.mean(1, keepdim=True), state))
    assert torch.allclose(aggregate.context(x), out, atol=1e-12)
    order = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    assert torch.allclose(
        aggregate.context(x[:, order]), aggregate.context(x)[:, order], atol=1e-12
    )


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="5 heads"):
        LocalAggregationHead(12, 5)


# Masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "share", "target", "context"),
    [
        (14, 0.0, (5, 6), 13),
        (14, 0.5, (6, 5), 13),
        (14, 0.75, (7, 5), 13),
        (14, 0.99, (8, 5), 13),
        (8, 0.0, (3, 3), 7),  # 9.6 patches are nine
        (8, 0.5, (4, 3), 7),
    ],
)
def test_block_sizes_are_the_official_ones(side, share, target, context):
    masks = BlockMasks(side, side)
    assert masks.block_size(share, masks.target_scale, masks.target_aspect) == target
    assert masks.block_size(share, masks.context_scale, (1.0, 1.0)) == (context, context)


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_blocks_apart_from_a_context_of_one_size(seed):
    masks = BlockMasks(9, 7, fewest=5)
    context, targets = masks.sample(11, torch.Generator().manual_seed(seed))
    assert targets.shape[:2] == (11, 4)
    assert len(context) == 11
    assert context.shape[1] > 5
    for picture in range(11):
        hidden = set()
        for block in targets[picture]:
            rows, columns = block // 7, block % 7
            height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
            assert height * width == len(block) == len(set(block.tolist()))
            hidden |= set(block.tolist())
        seen = context[picture].tolist()
        assert not hidden & set(seen)
        assert seen == sorted(set(seen))


def test_every_patch_lies_in_a_target_and_in_a_context():
    masks, generator = BlockMasks(8, 8, fewest=4), torch.Generator().manual_seed(0)
    drawn = [masks.sample(8, generator) for _ in range(40)]
    assert len(torch.cat([t.flatten() for _, t in drawn]).unique()) == 64
    assert len(torch.cat([c.flatten() for c, _ in drawn]).unique()) == 64


def test_the_context_is_cut_to_the_smallest_of_the_batch():
    masks = BlockMasks(8, 8, fewest=4)
    context, targets = masks.sample(64, torch.Generator().manual_seed(5))
    # The batch's smallest context cannot be larger than the grid without its own targets.
    most = min(64 - len(blocks.unique()) for blocks in targets)
    assert 4 < context.shape[1] <= most


def test_refuses_a_context_that_no_draw_reaches():
    with pytest.raises(ValueError, match="lower 'fewest'"):
        BlockMasks(6, 6, fewest=36).sample(2, torch.Generator().manual_seed(0))


# Encoder, predictor and the whole -------------------------------------------------------------------------


def some_masks(batch=3):
    context = torch.arange(0, 33, 3).expand(batch, -1)
    targets = torch.tensor([[1, 2, 7, 8], [4, 5, 10, 11]]).expand(batch, -1, -1)
    return context, targets


def official(head_too=True):
    """The whole on the numbers of the official code, wrapped and with its pairing of queries."""
    aggregate = LocalAggregationHead(12, 3, wrap=True, swapped_queries=True) if head_too else None
    model = Jepa(TINY, aggregate).double()
    filled(model.encoder), filled(model.predictor)
    model.target_encoder.load_state_dict(model.encoder.state_dict())
    if head_too:
        model.target_head.load_state_dict(filled(model.head).state_dict())
    return model


def test_equals_official_encoder_predictor_and_loss_on_stored_numbers():
    model, images = official(), waves(3, 2, 48, 48)
    context, targets = some_masks()
    seen = model.encoder(images, context)
    assert seen[1, [0, 5, 10], 3].tolist() == pytest.approx([0.668778, 0.241488, 0.57698], abs=2e-6)
    found = model.predictions(images, context, targets)[2, 1, :, 4]
    assert found.tolist() == pytest.approx([0.470775, 0.433456, 0.461122, 0.419953], abs=2e-6)
    assert model.loss(images, context, targets).item() == pytest.approx(0.1280285, abs=1e-6)
    plain = official(head_too=False).loss(images, context, targets)
    assert plain.item() == pytest.approx(0.3406967, abs=1e-6)


def test_published_sizes():
    with torch.device("meta"):
        encoder, predictor = Encoder(JepaSize()), Predictor(JepaSize())
        aggregate = LocalAggregationHead(768, 12)

    def trained(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert trained(encoder) == 85_646_592
    assert trained(predictor) == 11_238_912
    assert trained(aggregate) == 14_177_280


def test_all_patches_kept_is_no_mask():
    encoder, images = filled(Encoder(TINY)), waves(2, 2, 48, 48)
    every = torch.arange(36).expand(2, -1)
    assert torch.allclose(encoder(images, every), encoder(images), atol=1e-12)


def test_the_encoder_does_not_see_what_is_masked():
    encoder, images = filled(Encoder(TINY)), waves(1, 2, 48, 48)
    changed = images.clone()
    changed[..., :8, :8] = 5.0  # patch 0
    kept = torch.arange(1, 36)[None]
    assert torch.equal(encoder(images, kept), encoder(changed, kept))
    assert not torch.allclose(encoder(images), encoder(changed))


def test_targets_before_a_head_are_normalised():
    model = official(head_too=False)
    found = model.targets(waves(2, 2, 48, 48))
    assert found.mean(-1).abs().max() < 1e-5
    assert found.var(-1, unbiased=False) == pytest.approx(torch.ones(2, 36).double(), abs=1e-3)


def test_a_head_that_changes_nothing_gives_the_loss_of_i_jepa():
    class Nothing(LocalAggregationHead):
        def targets(self, tokens, grid, scores=None):
            return tokens

        def context(self, tokens):
            return tokens

    images, (context, targets) = waves(3, 2, 48, 48), some_masks()
    plain = official(head_too=False)
    same = Jepa(TINY, Nothing(12, 3)).double()
    for name in ("encoder", "target_encoder", "predictor"):
        getattr(same, name).load_state_dict(getattr(plain, name).state_dict())
    assert torch.equal(same.loss(images, context, targets), plain.loss(images, context, targets))


def test_averaged_targets_are_means_of_similar_neighbours():
    plain, averaged = official(head_too=False), Jepa(TINY, averaged=4).double()
    averaged.target_encoder.load_state_dict(plain.target_encoder.state_dict())
    images = waves(2, 2, 48, 48)
    x, (table, present) = plain.targets(images), neighbour_table(6, 6)
    wanted = mean_of_chosen(
        x, *choose_neighbours(neighbour_similarity(x, table), table, present, 4)
    )
    assert torch.allclose(averaged.targets(images), wanted, atol=1e-12)
    assert not torch.allclose(averaged.targets(images, torch.rand(2, 36, 8).double()), wanted)


def test_refuses_a_head_with_averaged_targets():
    with pytest.raises(ValueError, match="not both"):
        Jepa(TINY, LocalAggregationHead(12, 3), averaged=4)


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = official()
    model.loss(waves(3, 2, 48, 48), *some_masks()).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("target_") or name.endswith("pos_embed")
        assert (parameter.grad is None) == frozen, name
        if not frozen:
            assert parameter.grad.abs().max() > 0 or name.endswith("k.bias"), name


def test_only_the_trained_side_moves_in_a_step_and_the_head_is_decayed_where_it_should():
    model = official()
    before = copy.deepcopy(model)
    batch = (waves(3, 2, 48, 48), *some_masks())
    train(model, [batch], lambda net, b: net.loss(*b), TrainingPlan(1, 0.01), groups=decay_matrices)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        still = name.startswith("target_") or name.endswith("pos_embed")
        assert torch.equal(new, old) == still, name
    decayed, rest = decay_matrices(model)
    sets = [{id(p) for p in group["params"]} for group in (decayed, rest)]
    assert id(model.head.cls_blocks[0].attn.q.weight) in sets[0]
    assert id(model.head.cls_blocks[0].attn.q.bias) in sets[1]
    for side in (model.target_encoder, model.target_head):
        assert not any(p.requires_grad or id(p) in sets[0] | sets[1] for p in side.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_the_target_side_is_a_moving_average_of_the_trained_one(momentum):
    model = official()
    shaken(model.encoder, 1), shaken(model.head, 2)
    pairs = [(model.encoder, model.target_encoder), (model.head, model.target_head)]
    wanted = [
        [
            momentum * old + (1 - momentum) * new
            for new, old in zip(a.parameters(), b.parameters(), strict=True)
        ]
        for a, b in pairs
    ]
    model.update_targets(momentum)
    for (_, average), values in zip(pairs, wanted, strict=True):
        for found, value in zip(average.parameters(), values, strict=True):
            assert torch.allclose(found, value, atol=1e-12)


def test_momentum_rises_on_a_line():
    assert [momentum_at(step, 4, 0.6) for step in range(5)] == pytest.approx(
        [0.6, 0.7, 0.8, 0.9, 1.0]
    )
    assert momentum_at(0, 100) == 0.996


def test_linear_layers_start_small_and_are_not_rescaled_by_depth():
    model = Jepa(JepaSize(32, 8, 96, 4, 3, 48, 2), LocalAggregationHead(96, 3))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any()


# Costs --------------------------------------------------------------------------------------------------


class _Forward(nn.Module):
    """One side of a training step of a model, for torch's count."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *inputs):
        return self.run(*inputs)


@pytest.mark.parametrize("with_head", [False, True])
def test_counts_the_multiply_adds_that_run(with_head):
    model = Jepa(TINY, LocalAggregationHead(12, 3) if with_head else None)
    images, (context, targets) = torch.randn(1, 2, 48, 48), some_masks(1)
    table, _ = neighbour_table(6, 6)
    scores = torch.rand(1, 36, 8)
    frozen = multiply_adds(_Forward(lambda x: model.targets(x, scores)), images)
    trained = multiply_adds(_Forward(lambda x: model.predictions(x, context, targets)), images)
    counted = step_multiply_adds(TINY, context.shape[1], 2, 4, with_head)
    assert len(table) == 36
    assert counted == frozen + 3 * trained
