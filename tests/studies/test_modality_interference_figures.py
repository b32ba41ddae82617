import matplotlib.pyplot as plt
import torch

from reattend.studies.modality_interference_figures import (
    MOST_LETTERS,
    draw_ablation,
    draw_attack,
    draw_conditions,
    draw_items,
    draw_losses,
)


def test_attack_shows_every_place_of_every_kind():
    changes = {kind: torch.randn(5, 3) for kind in ("image_heavy", "text_heavy", "vqa")}
    changes["vqa"] = torch.zeros(5, 3)
    figure = draw_attack(changes, {kind: list("abcde") for kind in changes})
    assert [axis.get_title() for axis in figure.axes] == ["image-heavy", "text-heavy", "vqa"]
    assert figure.axes[0].images[0].get_array().shape == (3, 5)
    plt.close(figure)


def test_conditions_draw_reported_values_at_their_rows():
    seeds = [50.0, 60.0, 70.0]
    scores = {model: {"origin": seeds, "real": seeds} for model in ("base", "full")}
    panels = dict.fromkeys(("image-heavy", "text-heavy", "vqa"), scores)
    figure = draw_conditions(panels, {"text-heavy": {"real": [56.4]}}, 25.0)
    crosses = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in figure.axes[1].lines
        if line.get_marker() == "x" and len(line.get_xdata())
    ]
    assert crosses == [(56.4, 1.45)]
    plt.close(figure)


def test_ablation_has_a_row_for_each_arm():
    right, odds = ("misleading text", "accuracy, per cent"), ("misleading text", "log-odds, nats")
    scores = {right: {"D_AUG": [1.0, 2.0, 3.0], "full": [2.0, 3.0, 4.0]}}
    scores[odds] = scores[right]
    figure = draw_ablation(scores, {right: {"full": 98.9}})
    assert [(axis.get_title(), axis.get_xlabel()) for axis in figure.axes] == [right, odds]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["D_AUG", "full"]
    crosses = [
        (line.get_xdata()[0], line.get_ydata()[0])
        for axis in figure.axes
        for line in axis.lines
        if line.get_marker() == "x"
    ]
    assert crosses == [(98.9, 1.3)]
    plt.close(figure)


def test_losses_are_moving_means_of_every_seed():
    losses = {"base": torch.arange(6.0)[None].repeat(2, 1), "control": torch.zeros(2, 6)}
    figure = draw_losses(losses, window=3)
    lines = figure.axes[0].lines
    assert len(lines) == 4
    assert lines[0].get_ydata().round(6).tolist() == [1, 2, 3, 4]
    plt.close(figure)


def test_items_shorten_paragraphs_and_name_answers():
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    answers = {"base": ("fish", False), "full": ("bird", True)}
    long = (pixels, "word " * 100, answers)
    figure = draw_items([[long, long], [(pixels, "short", answers)]], ["one", "other"])
    title = figure.axes[0].get_title(loc="left").replace("\n", " ")
    assert len(title) <= MOST_LETTERS
    assert title.endswith("...")
    assert [text.get_text() for text in figure.axes[0].texts][:2] == ["base: fish", "full: bird"]
    plt.close(figure)
