"""The arms of TextMonkey's study: what is frozen and shared, what placebos cannot do, how sequences are shortened."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained.textmonkey import (
    BARE,
    CHOICES,
    CODES,
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
    place_codes,
    place_loss,
    token_loss,
    untrained,
    untrained_readers,
)
from reattend.data.word_pages import UNASKED
from reattend.multimodal_llm.textmonkey import least_similar
from reattend.trunks.language import parameter_count

SMALL = replace(SETTINGS["smoke"], arm_steps=2)
N, HALF, FOURTH = 288, 144, 72
PAGES = SMALL.draw(6, torch.Generator().manual_seed(0))


def network(arm=None, grid=CROPS, seed=0):
    made = untrained(SMALL, grid, seed)
    if arm:
        add_windows(made, arm, SMALL, seed)
    return made.eval()


def tokens(count=N, width=8, seed=0):
    return torch.randn(3, count, width, generator=torch.Generator().manual_seed(seed))


def reaches_out(model):
    """Whether the last token of the first crop depends on pixels right of it, and on pixels below it."""
    pixels = PAGES.pixels[:1].clone().requires_grad_()
    model(pixels)[0, 5, 11].sum().backward()
    beyond = pixels.grad[0, :24, 48:], pixels.grad[0, 24:, :48]
    return [bool(part.abs().max() > 1e-9) for part in beyond]


@pytest.mark.parametrize(
    ("arm", "reaches"), [("no module", False), ("shift 0", False), ("default init", True)]
)
def test_only_shifted_windows_carry_pixels_across_the_border(arm, reaches):
    model = network(arm)
    for module in model.windows.values():
        torch.nn.init.normal_(module.shift_attn.mlp.fc2.weight)
    assert reaches_out(model) == [reaches, reaches]
    assert reaches_out(network(grid=WHOLE)) == [True, True]


def test_arms_start_as_plain_crops():
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
    assert reaches_out(whole) == [True, True]
    assert reaches_out(base) == [False, False]
    positions = whole.positions.view(12, 24, -1)
    for crop in (positions[:6, :12], positions[:6, 12:], positions[6:, :12], positions[6:, 12:]):
        assert torch.equal(crop, base.positions.view(6, 12, -1))
    for name, value in base.state_dict().items():
        assert name == "positions" or torch.equal(whole.state_dict()[name], value)
    with (
        torch.no_grad()
    ):  # no token reads another, in the stem as little: then crops or page are the same
        for model in (base, whole):
            for block in model.blocks:
                block.proj.weight.zero_()
            model.stem[-1].conv.weight.zero_()
    blank = torch.zeros(1, 48, 96)
    torch.testing.assert_close(whole(blank)[:, 1:6, 1:12], base(blank)[:, 1:6, 1:12])


def test_a_network_of_the_whole_page_is_trained_all_through():
    base = network()
    start = {name: value.clone() for name, value in base.state_dict().items()}
    whole, losses = fit_whole_page(SMALL, base, 0)
    assert len(losses) == SMALL.opened_steps
    fresh = opened(base, SMALL).state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(base.state_dict()[name], value) for name, value in start.items())


def test_losses_count_letters_that_are_there():
    model = network()
    scores = model(PAGES.pixels)
    asked = PAGES.labels != UNASKED
    expected = F.cross_entropy(scores[asked], PAGES.labels[asked])
    torch.testing.assert_close(token_loss(scores, PAGES), expected)
    assert page_loss(model, PAGES) == token_loss(scores, PAGES)
    places = torch.randn(6, 48, 26, generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(places[PAGES.present], PAGES.letters[PAGES.present])
    torch.testing.assert_close(place_loss(places, PAGES), expected)


def test_a_linear_reader_sees_the_pixels_around_each_token():
    torch.manual_seed(0)
    reader = LinearReader(reach=2)
    row, column = (x[4, 3] // 4 * 4 + 2 for x in (PAGES.rows, PAGES.columns))
    window = PAGES.pixels[4, row - 2 : row + 3, column - 2 : column + 3]
    assert PAGES.present[4, 3]
    torch.testing.assert_close(reader(PAGES)[4, 3], reader.read(window.flatten()))


def test_codes_tell_places_apart_and_neighbours_from_far_ones():
    codes = place_codes()
    alike = codes @ codes.T
    assert codes.shape == (N, CODES)
    torch.testing.assert_close(alike.diagonal(), torch.full((N,), 16.0))
    assert (alike - 20 * torch.eye(N)).max() < 15.5
    assert alike[0, 1] > alike[0, 12]
    torch.testing.assert_close(alike[0, 25], alike[60, 85])  # one down and one to the right


def test_a_reader_of_places_looks_where_it_is_asked():
    torch.manual_seed(0)
    reader, x = PlaceReader(8, 2), tokens()
    with torch.no_grad():
        reader.key.weight.zero_()
        reader.query.weight.mul_(40)  # so sharp that it reads one token
    codes = place_codes().expand(3, -1, -1)
    asked = torch.tensor([[3, 40, 287]]).expand(3, -1)
    alone = reader.head(reader.out(reader.value(reader.norm(x[:, [3, 40, 287]]))))
    torch.testing.assert_close(reader(x, codes, asked), alone, atol=1e-3, rtol=1e-3)


def test_a_reader_of_places_does_not_know_slots():
    torch.manual_seed(0)
    reader, x, codes = PlaceReader(8, 2), tokens(), place_codes().expand(3, -1, -1)
    asked, order = torch.tensor([[3, 40, 71]]).expand(3, -1), torch.randperm(N)
    found = reader(x, codes, asked)
    assert found.shape == (3, 3, 26)
    torch.testing.assert_close(reader(x[:, order], codes[:, order], asked), found)
    assert not torch.allclose(reader(x[:, order], codes, asked), found, atol=1e-4)


def short(choice, keep, resample=False, seed=0):
    torch.manual_seed(0)
    return ShortReader(choice, keep, resample, 8, 2, seed)


@pytest.mark.parametrize("keep", [HALF, FOURTH])
@pytest.mark.parametrize("choice", sorted({*CHOICES, *BARE}))
def test_sequences_have_the_length_they_should(choice, keep):
    reader, x = short(choice, keep), tokens()
    latents, codes = reader.latents(x)
    assert latents.shape == (3, keep, 8)
    assert codes.shape == (3, keep, CODES)
    assert reader(x, torch.tensor([[0], [1], [2]])).shape == (3, 1, 26)


def test_choices_keep_what_they_say():
    x = tokens()
    similar = least_similar(x, FOURTH)
    for choice in ("similarity", "kept alone", "by slot"):
        assert torch.equal(short(choice, FOURTH).kept(x), similar)
    shuffled = short("unsorted", FOURTH).kept(x)
    assert torch.equal(shuffled.sort(-1).values, similar)
    assert not torch.equal(shuffled, similar)
    reader = short("random", FOURTH)
    first, second = reader.kept(x), reader.kept(x)
    assert not torch.equal(first, second)  # new places for every page
    assert not torch.equal(first[0], first[1])
    assert (first.diff(dim=-1) > 0).all()
    assert torch.equal(short("stride", FOURTH).kept(x)[0], torch.arange(0, N, 4))
    most = short("most similar", FOURTH).kept(x)
    rest = least_similar(x, N - FOURTH)
    assert not (most[..., None] == rest[:, None]).any()
    assert torch.equal(short("all", N).latents(x)[0], x)


def test_readers_know_the_places_of_kept_tokens_on_the_page():
    x = tokens()
    places = torch.arange(N, dtype=torch.float32).view(1, 12, 24, 1)
    page_codes = CROPS.cut(place_codes()[places.long()[..., 0]].view(1, 12, 24, -1)).flatten(1, 2)[
        0
    ]
    kept = least_similar(x, FOURTH)
    for choice in ("similarity", "kept alone"):
        assert torch.equal(short(choice, FOURTH).latents(x)[1], page_codes[kept])
    assert torch.equal(short("all", N).latents(x)[1][1], page_codes)
    for choice in ("by slot", "unsorted"):  # the same for every page, whatever was kept
        found = short(choice, FOURTH).latents(x)[1]
        assert torch.equal(found, page_codes[::4].expand(3, -1, -1))


@pytest.mark.parametrize(("choice", "reads"), [("similarity", True), ("kept alone", False)])
def test_dropped_tokens_are_read_by_the_method_and_not_by_its_placebo(choice, reads):
    reader = short(choice, FOURTH, resample=True)
    torch.nn.init.normal_(reader.resampler.layers[0][1].fc2.weight)
    x, asked = tokens(), torch.tensor([[40]]).expand(3, -1)
    kept = least_similar(x, FOURTH)
    reader(x.requires_grad_(), asked).square().sum().backward()
    seen = x.grad.abs().amax(-1) > 1e-12
    assert seen.gather(1, kept).all()
    dropped = torch.ones_like(seen).scatter(1, kept, False)
    assert seen[dropped].all() if reads else not seen[dropped].any()


def test_the_placebo_of_reading_all_has_the_method_s_start_and_size():
    method, placebo = (
        short(choice, FOURTH, resample=True) for choice in ("similarity", "kept alone")
    )
    x, asked = tokens(), torch.tensor([[3, 40]]).expand(3, -1)
    assert torch.equal(placebo.kept(x), least_similar(x, FOURTH))
    found = placebo.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in method.state_dict().items())
    assert parameter_count(placebo) == parameter_count(method)
    assert torch.equal(placebo(x, asked), method(x, asked))  # until W2 moves


def test_pooling_takes_neighbours_on_the_page():
    x = tokens()
    page, codes = CROPS.stitch(x.unflatten(1, (4, 72))), place_codes().view(12, 24, -1)
    half, its_codes = short("pooling", HALF).latents(x)
    fourth, _ = short("pooling", FOURTH).latents(x)
    torch.testing.assert_close(half[:, 13], page[:, 1, 2:4].mean(1))
    torch.testing.assert_close(its_codes[1, 13], codes[1, 2:4].mean(0))
    torch.testing.assert_close(fourth[:, 13], page[:, 2:4, 2:4].mean((1, 2)))


def test_merging_takes_means_of_the_most_similar():
    torch.manual_seed(0)
    x = F.normalize(tokens(6, 5), dim=-1)
    x[:, 2] = x[:, 5]
    both = torch.cat([x, torch.arange(6.0).view(1, 6, 1).expand(3, -1, -1)], -1)
    found = merged(both, 5, 5)
    torch.testing.assert_close(found[:, :2], both[:, [0, 4]])
    torch.testing.assert_close(found[:, 2:4], both[:, [1, 3]])
    torch.testing.assert_close(found[:, 4], both[:, [2, 5]].mean(1))
    torch.testing.assert_close(
        merged(both, 1, 5)[:, 0], both.mean(1)
    )  # weighed by how many went in


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
    names = list(untrained_readers(replace(SMALL, keep=(HALF, FOURTH)), 0, short=True))
    assert names[:2] == ["all", "144 similarity + resampler"]
    expected = [f"72 {name} + resampler" for name in CHOICES] + [f"72 {name}" for name in BARE]
    assert names[2:] == expected


def test_readers_that_are_trained_together_do_not_disturb_each_other():
    model, setting = network("zero init"), replace(SMALL, reader_steps=6)
    pages = left(model, entered(model, setting, 3, 3000))
    alone, together = (
        fit_readers(setting, untrained_readers(setting, 0, short=short), pages)["all"]
        for short in (False, True)
    )
    assert alone == pytest.approx(together, abs=1e-6)
