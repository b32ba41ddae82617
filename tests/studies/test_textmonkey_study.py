"""What is measured of TextMonkey's readers and of redundancy, and that its pictures show it."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from reattend.backbones.trained.textmonkey import (
    CROPS,
    SETTINGS,
    LinearReader,
    PageModels,
    ShortReader,
    untrained,
    untrained_readers,
)
from reattend.data.word_pages import words
from reattend.plots import COLOURS
from reattend.studies import textmonkey as study
from reattend.studies.textmonkey_figures import (
    draw_attention,
    draw_documents,
    draw_early_losses,
    draw_masks,
    draw_pages,
    draw_redundancy,
    draw_resampler,
    draw_scores,
)

SMALL = SETTINGS["smoke"]
PAGES = study.test_pages(SMALL, 9)
NETWORK = untrained(SMALL, CROPS, 0).eval()
TOKENS = study.tokens_of(NETWORK, PAGES)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_test_pages_are_the_same_for_all():
    assert torch.equal(PAGES.pixels, study.test_pages(replace(SMALL, seeds=range(8)), 9).pixels)


def test_pages_of_the_test_hold_words_that_training_never_sees():
    assert {word for page in PAGES.words for word in page} <= set(words("test"))


def test_the_weak_reader_reads_the_token_in_the_middle():
    found = study.read_tokens(NETWORK, TOKENS, PAGES)
    scores = NETWORK(PAGES.pixels).detach()
    for page, place in PAGES.present.nonzero()[::40]:
        row, column = PAGES.rows[page, place] // 4, PAGES.columns[page, place] // 4
        expected = F.cross_entropy(scores[page, row, column], PAGES.letters[page, place])
        torch.testing.assert_close(found.nll[page, place], expected)


def test_scores_are_means_over_the_letters_that_are_there():
    nll = torch.arange(float(PAGES.letters.numel())).view(9, -1)
    kinds = PAGES.kinds
    reading = study.Reading(PAGES, nll, (PAGES.letters + kinds["border"].long()) % 26)
    found = reading.scores()
    for kind, at in kinds.items():
        assert found[f"{kind} NLL"] == pytest.approx(nll[at].double().mean().item())
    assert (found["inner %"], found["border %"]) == (100, 0)
    assert 0 < found["all %"] < 100


def test_words_are_read_letter_by_letter_with_wrong_ones_as_capitals():
    answers = PAGES.letters.clone()
    page = next(n for n, written in enumerate(PAGES.words) if len(written) > 1)
    first, second = PAGES.words[page][:2]
    answers[page, len(first) + 1] = (answers[page, len(first) + 1] + 1) % 26
    found = list(study.Reading(PAGES, answers.float(), answers).read_words())
    assert found[page][0] == first
    wrong = found[page][1]
    assert wrong[1].isupper()
    assert wrong[0] + wrong[2:] == second[0] + second[2:]
    rest = [written for n, written in enumerate(found) if n != page]
    assert rest == [list(written) for n, written in enumerate(PAGES.words) if n != page]


def test_scores_by_seed_keep_their_order():
    nll = torch.ones(PAGES.letters.shape)
    readings = {"a": [study.Reading(PAGES, k * nll, PAGES.letters) for k in (3, 1)], "b": []}
    table = study.score_table(readings)
    assert study.by_seed(table.iloc[::-1], "a", "all NLL").tolist() == [3, 1]


def test_all_is_read_with_each_network_s_own_tokens():
    readers = [untrained_readers(SMALL, seed, short=False) for seed in (0, 1)]
    networks = {arm: [untrained(SMALL, CROPS, s).eval() for s in (0, 1)] for arm in ("a", "b")}
    linear = [LinearReader() for _ in range(2)]
    found = study.read_all(PageModels(networks, {"b": readers}, linear, {}), PAGES)
    assert list(found.weak) == ["a", "b", "linear on pixels"]
    assert list(found.strong) == ["b"]
    for seed in (0, 1):
        seen = study.tokens_of(networks["b"][seed], PAGES)
        assert torch.equal(found.tokens["b"][seed], seen)
        expected = study.read_places(readers[seed]["all"], seen, PAGES)
        assert torch.equal(found.strong["b"][seed]["all"].nll, expected.nll)
    assert not torch.equal(found.weak["a"][0].nll, found.weak["a"][1].nll)


def test_readers_of_fewer_tokens_are_means_by_number_and_choice():
    nll = torch.ones(PAGES.letters.shape)
    names = ["all", "144 similarity + resampler", "72 most similar"]
    readings = {n: [study.Reading(PAGES, k * nll, PAGES.letters) for k in (3, 2)] for n in names}
    found = study.shorter_table(study.score_table(readings), {"72 most similar": 7.0})
    assert found.tokens.tolist() == [288, 144, 72]
    assert found.choice.tolist() == ["all", "similarity + resampler", "most similar"]
    assert found["all NLL"].tolist() == [2.5] * 3
    assert found["kept of the letters' tokens, %"].tolist()[2] == 7
    assert found["kept of the letters' tokens, %"].isna().tolist() == [True, True, False]


def test_the_early_loss_leaves_out_the_first_step():
    losses = torch.arange(40.0).expand(2, -1)
    assert study.early_loss(losses).tolist() == [2, 2]  # steps 2, 3 and 4


def test_what_is_kept_of_pages_and_of_letters():
    torch.manual_seed(0)
    every = ShortReader("all", 288, False, SMALL.width, SMALL.heads, 0)
    stride = ShortReader("stride", 144, False, SMALL.width, SMALL.heads, 0)
    assert study.kept_places(every, TOKENS).all()
    assert study.kept_of_letters(every, TOKENS, PAGES) == 100
    kept = study.kept_places(stride, TOKENS)
    assert kept.shape == (9, 4, 72)
    assert kept[0, 3].nonzero().flatten().tolist() == list(range(0, 72, 2))
    column = PAGES.columns[PAGES.present] // 4
    expected = 100 * (column % 2 == 0).double().mean().item()
    assert study.kept_of_letters(stride, TOKENS, PAGES) == pytest.approx(expected)
    reading = study.read_places(every, TOKENS, PAGES)
    scores = every(TOKENS.flatten(1, 2), PAGES.tokens)
    assert torch.equal(reading.answers, scores.argmax(-1))


def test_random_tokens_that_are_shown_are_those_that_are_read():
    torch.manual_seed(0)
    random = ShortReader("random", 72, False, SMALL.width, SMALL.heads, 0)
    shown = study.kept_places(random, TOKENS)
    read = torch.zeros(9, 288, dtype=torch.bool).scatter(1, random.kept(TOKENS.flatten(1, 2)), True)
    assert torch.equal(shown.flatten(1), read)
    assert not torch.equal(study.kept_places(random, TOKENS), shown)


def test_tokens_of_crops_come_crop_after_crop(monkeypatch):
    def means(model, pixels, layers, size):
        assert (layers, size) == ([study.LAYER], 4)
        patches = F.avg_pool2d(pixels.float(), 2).flatten(2).mT.mean(-1, keepdim=True)
        return torch.cat([torch.full_like(patches[:, :1], -1), patches], 1)[None]

    monkeypatch.setattr(study, "hidden_states", means)
    vit = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    pages = torch.randint(0, 255, (3, 1, 8, 8)).expand(-1, 3, -1, -1).byte()
    found = study.page_tokens(vit, pages, 2, 4)[..., 0]
    assert found.shape == (3, 16)
    torch.testing.assert_close(found[1, 6], pages[1, 0, 2:4, 4:6].float().mean())


def test_the_layers_that_are_left_say_what_they_said():
    torch.manual_seed(0)
    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=28)
    vit = Dinov2Model(shape).eval()
    pages = torch.randint(0, 255, (2, 3, 28, 28)).byte()
    before = study.page_tokens(vit, pages, 1, 28)
    cut = study.first_layers(vit)
    assert len(cut.encoder.layer) == study.LAYER < shape.num_hidden_layers
    assert torch.equal(study.page_tokens(cut, pages, 1, 28), before)


def test_similarity_and_shares():
    tokens = torch.eye(5, dtype=torch.float64)[None].clone()
    tokens[0, 1] += 2 * tokens[0, 0]
    found = study.largest_similarity(tokens)[0]
    assert found[:2].tolist() == pytest.approx([2 / 5**0.5] * 2)
    assert study.page_shares(tokens, 0.8).tolist() == [40]
    assert study.page_shares(tokens, 0.8, 2).tolist() == pytest.approx([20])


# Pictures -----------------------------------------------------------------------------------------


def diamonds(axis):
    return [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]


def test_masks_are_counted():
    titles = [axis.get_title() for axis in draw_masks(64, 12, 6).axes]
    assert [int(title.split("\n")[1].split()[0]) for title in titles] == [736, 696, 40]


def test_scores_stand_at_their_means():
    arms = {"shift 0": np.array([3.0, 4, 5]), "zero init": np.array([1.0, 2, 3])}
    axis = draw_scores({"weak": arms, "strong": arms}).axes[1]
    assert diamonds(axis) == [4, 2]
    assert axis.lines[-1].get_color() == COLOURS[0]


def test_attention_says_how_much_lies_beyond_the_borders():
    found = torch.zeros(12, 24)
    found[5, 11], found[5, 12], found[6, 11] = 0.7, 0.2, 0.1
    axes = draw_attention(PAGES.pixels[0], {"zero init": found}, (5, 11)).axes
    assert "30 %" in axes[1].get_title()
    assert axes[1].patches[0].get_xy() == (44, 20)


def test_early_losses_stand_above_the_start():
    losses = {"no module": torch.ones(2, 40), "zero init": 1 + torch.arange(40.0).expand(2, -1)}
    first, whole = draw_early_losses(losses, "no module", bins=4).axes
    assert first.lines[0].get_ydata().tolist() == [0, 1, 2, 3]
    assert whole.lines[0].get_xdata().tolist() == [5.5, 15.5, 25.5, 35.5]
    assert whole.lines[0].get_ydata().tolist() == [4.5, 14.5, 24.5, 34.5]


def test_pages_are_drawn_with_what_was_read():
    first = torch.zeros(2, 4, 72, dtype=torch.bool)
    first[:, 1] = True  # the upper right crop
    kept = {"all": torch.ones(2, 4, 72, dtype=torch.bool), "one crop": first}
    answers = {"all": ["one two", "three"], "one crop": ["onE", "x"]}
    figure = draw_pages(PAGES.chosen(torch.tensor([0, 1])), kept, answers)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["all\none two", "one crop\nonE", "three", "x"]
    whole, part = (axis.images[-1].get_array()[..., 3] for axis in figure.axes[:2])
    assert whole.max() == 0
    assert part[:24, 48:].max() == 0
    assert part[24:].min() == part[:, :48].min() == 0.85


def test_resampler_and_what_is_reported():
    arms = {"144 similarity + resampler": np.array([1.0, 2, 3]), "72 random": np.array([2.0, 3, 4])}
    reported = {"all": 64.8, "similarity": 62.5}
    figure = draw_resampler(arms, np.ones(3), reported, "TextVQA")
    assert diamonds(figure.axes[0]) == [2, 3]
    colours = [line.get_color() for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert colours == [COLOURS[0], COLOURS[1]]
    assert [bar.get_width() for bar in figure.axes[-1].patches] == [64.8, 62.5]


def test_redundancy_is_drawn_with_the_paper_s():
    values = np.array([[20.0, 30], [30, 40], [40, 50]])
    axis = draw_redundancy([168, 336], {"crops": values}, [26.6, 55.8, 59.5]).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [30, 40]
    assert list(axis.lines[-1].get_ydata()) == [26.6, 55.8]


def test_documents_are_marked_where_tokens_are_alike():
    pages = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    tokens = np.zeros(16, bool)
    tokens[6] = True  # second crop, second row, left
    figure = draw_documents(pages, [{"336 px": (2, tokens)}])
    veil = figure.axes[1].images[-1].get_array()[..., 3]
    assert np.argwhere(veil > 0).tolist() == [[1, 2]]
    assert "6 %" in figure.axes[1].get_title()
