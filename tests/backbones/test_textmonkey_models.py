"""The arms of TextMonkey's study: what is frozen and shared, what placebos cannot do, how sequences are shortened."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained.textmonkey import (
    BARE,
    CHOICES,
    CROPS,
    SETTINGS,
    WHOLE,
    WINDOW_ARMS,
    LinearReader,
    PlaceReader,
    ShortReader,
    add_windows,
    entered,
    fit_arm,
    fit_readers,
    fit_whole_page,
    left,
    merged,
    opened,
    page_loss,
    pages_of,
    place_loss,
    token_loss,
    untrained,
    untrained_readers,
)
from reattend.data.digit_pages import BORDER, UNASKED
from reattend.multimodal_llm.textmonkey import least_similar
from reattend.trunks.language import parameter_count

SMALL = replace(SETTINGS["smoke"], arm_steps=2)
PAGES = SMALL.draw(6, torch.Generator().manual_seed(0))


def network(arm=None, grid=CROPS, seed=0):
    made = untrained(SMALL, grid, seed)
    if arm:
        add_windows(made, arm, SMALL, seed)
    return made.eval()


def tokens(count=72, width=8, seed=0):
    return torch.randn(3, count, width, generator=torch.Generator().manual_seed(seed))


def reaches_right(model):
    """Whether a token beside the border in the left crop depends on pixels of the right one."""
    pixels = PAGES.pixels[:1].clone().requires_grad_()
    model(pixels)[0, 2, 5].sum().backward()
    return bool(pixels.grad[0, :, 24:].abs().max() > 1e-9)


@pytest.mark.parametrize(
    ("arm", "reaches"), [("no module", False), ("shift 0", False), ("default init", True)]
)
def test_only_shifted_windows_carry_pixels_across_the_border(arm, reaches):
    model = network(arm)
    for module in model.windows.values():
        torch.nn.init.normal_(module.shift_attn.mlp.fc2.weight)
    assert reaches_right(model) == reaches
    assert reaches_right(network(grid=WHOLE))


def test_three_arms_start_as_plain_crops():
    plain = network()(PAGES.pixels)
    same = {arm: torch.equal(network(arm)(PAGES.pixels), plain) for arm in WINDOW_ARMS}
    assert same == {arm: arm != "default init" for arm in WINDOW_ARMS}


def test_modules_of_a_seed_share_their_numbers_and_their_size():
    states = {arm: network(arm).windows.state_dict() for arm in WINDOW_ARMS if arm != "no module"}
    zero = states["zero init"]
    for arm, state in states.items():
        differ = {k for k in state if not torch.equal(state[k], zero[k])}
        expected = {
            "default init": {"1.shift_attn.mlp.fc2.weight"},
            "zero scale": {"1.shift_attn.mlp.fc2.weight", "1.shift_attn.mlp.scale"},
        }
        assert differ == expected.get(arm, set())
    counts = {parameter_count(network(arm)) for arm in states}
    assert len(counts) == 1
    with pytest.raises(ValueError, match="there are: no module, shift 0"):
        network("nothing")


def test_an_arm_trains_module_and_head_alone():
    base = network()
    pages = entered(base, SMALL, SMALL.arm_steps, 2000)
    trained, losses = fit_arm("default init", SMALL, base, pages, 0)
    assert len(losses) == 2
    start = base.state_dict()
    for name, value in trained.state_dict().items():
        if name in start:
            assert torch.equal(value, start[name]) != name.startswith("head"), name
    fresh = network("default init").windows.state_dict()
    moved = [k for k, v in trained.windows.state_dict().items() if not torch.equal(v, fresh[k])]
    assert "1.shift_attn.downsample.weight" in moved


def test_pages_that_are_read_once_are_those_that_a_network_reads():
    model = network("default init")
    batches = entered(model, SMALL, 3, 7)
    drawn = list(islice(pages_of(SMALL, 7, "cpu"), 3))
    assert len(batches) == 3
    for (entering, pages), expected in zip(batches, drawn, strict=True):
        assert torch.equal(pages.pixels, expected.pixels)
        assert not entering.requires_grad
        found = model.scores(left(model, [(entering, pages)])[0][0])
        torch.testing.assert_close(found, model(expected.pixels))


def test_an_opened_network_reads_the_page_with_the_same_weights():
    base = network()
    whole = opened(base, SMALL).eval()
    assert reaches_right(whole)
    assert not reaches_right(base)
    positions = whole.positions.view(6, 12, -1)
    assert torch.equal(positions[:, :6], base.positions.view(6, 6, -1))
    assert torch.equal(positions[:, 6:], base.positions.view(6, 6, -1))
    for name, value in base.state_dict().items():
        assert name == "positions" or torch.equal(whole.state_dict()[name], value)
    with torch.no_grad():  # no token reads another: then crops or page are the same
        for model in (base, whole):
            for block in model.blocks:
                block.proj.weight.zero_()
    blank = torch.zeros(1, 24, 48)
    torch.testing.assert_close(whole(blank)[:, :, 1:5], base(blank)[:, :, 1:5])


def test_a_network_of_the_whole_page_is_trained_all_through():
    base = network()
    start = {name: value.clone() for name, value in base.state_dict().items()}
    whole, losses = fit_whole_page(SMALL, base, 0)
    assert len(losses) == 2 * SMALL.arm_steps
    fresh = opened(base, SMALL).state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(base.state_dict()[name], value) for name, value in start.items())


def test_losses_count_digits_that_are_there():
    model = network()
    scores = model(PAGES.pixels)
    asked = PAGES.labels != UNASKED
    expected = F.cross_entropy(scores[asked], PAGES.labels[asked])
    torch.testing.assert_close(token_loss(scores, PAGES), expected)
    assert page_loss(model, PAGES) == token_loss(scores, PAGES)
    places = torch.randn(6, 3, 10, generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(places[PAGES.present], PAGES.digits[PAGES.present])
    torch.testing.assert_close(place_loss(places, PAGES), expected)


def test_a_linear_reader_sees_the_pixels_around_each_token():
    torch.manual_seed(0)
    reader = LinearReader(reach=2)
    row, column = (x[4, BORDER] // 4 * 4 + 2 for x in (PAGES.rows, PAGES.columns))
    window = PAGES.pixels[4, row - 2 : row + 3, column - 2 : column + 3]
    torch.testing.assert_close(reader(PAGES)[4, BORDER], reader.read(window.flatten()))


def test_a_reader_of_places_knows_slots():
    torch.manual_seed(0)
    reader, x = PlaceReader(8, 72, 2), tokens()
    asked = torch.tensor([[3, 40, 71]]).expand(3, -1)
    found = reader(x, asked)
    assert found.shape == (3, 3, 10)
    order = torch.randperm(72)
    assert not torch.allclose(reader(x[:, order], asked), found, atol=1e-4)
    with torch.no_grad():
        reader.slots.copy_(reader.slots[order])
    torch.testing.assert_close(reader(x[:, order], asked), found, atol=1e-5, rtol=1e-4)


def short(choice, keep, resample=False, seed=0):
    torch.manual_seed(0)
    return ShortReader(choice, keep, resample, 8, 2, seed)


@pytest.mark.parametrize("keep", [36, 18])
@pytest.mark.parametrize("choice", sorted({*CHOICES, *BARE}))
def test_sequences_have_the_length_they_should(choice, keep):
    reader, x = short(choice, keep), tokens()
    assert reader.latents(x).shape == (3, keep, 8)
    assert reader(x, torch.tensor([[0], [1], [2]])).shape == (3, 1, 10)


def test_choices_keep_what_they_say():
    x = tokens()
    similar = least_similar(x, 18)
    assert torch.equal(short("similarity", 18).kept(x), similar)
    shuffled = short("unsorted", 18).kept(x)
    assert torch.equal(shuffled.sort(-1).values, similar)
    assert not torch.equal(shuffled, similar)
    reader = short("random", 18)
    first, second = reader.kept(x), reader.kept(x)
    assert not torch.equal(first, second)  # new places for every page
    assert not torch.equal(first[0], first[1])
    assert (first.diff(dim=-1) > 0).all()
    assert torch.equal(short("stride", 18).kept(x)[0], torch.arange(0, 72, 4))
    most = short("most similar", 18).kept(x)
    rest = least_similar(x, 54)
    assert not (most[..., None] == rest[:, None]).any()
    assert torch.equal(short("all", 72).latents(x), x)


def test_pooling_takes_neighbours_on_the_page():
    x = tokens()
    page = CROPS.stitch(x.unflatten(1, (2, 36)))
    half, quarter = short("pooling", 36).latents(x), short("pooling", 18).latents(x)
    torch.testing.assert_close(half[:, 7], page[:, 1, 2:4].mean(1))
    torch.testing.assert_close(quarter[:, 7], page[:, 2:4, 2:4].mean((1, 2)))


def test_merging_takes_means_of_the_most_similar():
    torch.manual_seed(0)
    x = F.normalize(tokens(6, 5), dim=-1)
    x[:, 2] = x[:, 5]
    found = merged(x, 5)
    torch.testing.assert_close(found[:, :2], x[:, [0, 4]])
    torch.testing.assert_close(found[:, 2:], x[:, [1, 3, 5]])
    whole = merged(x, 1)
    torch.testing.assert_close(whole[:, 0], x.mean(1))  # weighed by how many went in


def test_readers_start_alike_and_leave_the_network_alone():
    model = network("zero init")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    readers = untrained_readers(SMALL, 0, short=True)
    start = {name: reader.reader.head.weight.clone() for name, reader in readers.items()}
    assert all(torch.equal(weight, start["all"]) for weight in start.values())
    losses = fit_readers(SMALL, readers, left(model, entered(model, SMALL, 1, 3000)))
    assert set(losses) == set(readers)
    assert all(len(values) == SMALL.reader_steps for values in losses.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not torch.equal(r.reader.head.weight, start[n]) for n, r in readers.items())
    assert list(untrained_readers(SMALL, 0, short=False)) == ["all"]


def test_rivals_are_trained_at_the_smallest_number():
    names = list(untrained_readers(replace(SMALL, keep=(36, 18), bare=BARE), 0, short=True))
    assert names[:2] == ["all", "36 similarity + resampler"]
    expected = [f"18 {name} + resampler" for name in CHOICES] + [f"18 {name}" for name in BARE]
    assert names[2:] == expected


def test_readers_that_are_trained_together_do_not_disturb_each_other():
    model, setting = network("zero init"), replace(SMALL, reader_steps=6)
    pages = left(model, entered(model, setting, 3, 3000))
    alone, together = (
        fit_readers(setting, untrained_readers(setting, 0, short=short), pages)["all"]
        for short in (False, True)
    )
    assert alone == pytest.approx(together, abs=1e-6)
