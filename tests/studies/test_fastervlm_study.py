"""The experiment on FasterVLM: every method at full length is the dense model, and scores add up."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from reattend.data.scenes import SceneSettings, make_scenes
from reattend.data.vlm_questions import BOS, IDS, PAD, TYPES
from reattend.multimodal_llm.fastervlm import attention_curves, fastv_scores
from reattend.studies import fastervlm as study
from reattend.studies.fastervlm import (
    Album,
    Reader,
    Replies,
    Views,
    average_percent,
    by_score,
    group_rho,
    inside_objects,
    judged,
    lm_curves,
    make_album,
    mean_replies,
    of_pictures,
    selections,
    type_accuracy,
    type_shares,
)
from reattend.trunks.visual_tokens import top_tokens
from reattend.trunks.vlm import NO_PATCH, Rows, VisionLanguageModel, VLMShape, last_asked

GRID, N = (4, 4), 16
SETTINGS = SceneSettings(size=40, objects=(2, 3), scale=(0.25, 0.4))


@pytest.fixture(scope="module")
def album() -> Album:
    scenes = make_scenes(7, SETTINGS, split="train", seed=3)
    found = make_album(scenes, seed=3, most=9, types=list(TYPES))
    assert len({len(some) for some in found.asked}) > 1  # packed prompts with padding
    return found


@pytest.fixture(scope="module")
def reader(album) -> Reader:
    torch.manual_seed(0)
    shape = VLMShape(
        vocabulary=len(IDS), grid=GRID, tower=6, width=16, layers=3, heads=2, hidden=12
    )
    model = VisionLanguageModel(shape).double().eval()
    for name, weight in model.named_parameters():
        if name.endswith(("q.weight", "k.weight")):
            torch.nn.init.normal_(weight, std=0.6)
    views = Views(torch.randn(7, N, 6).double(), {2: torch.rand(7, N).double()})
    return Reader(model, album, views, depth=2, batch=3)


@pytest.fixture(scope="module")
def dense(reader) -> tuple:
    ranks = {"FastV": lambda s: s, "reversed": lambda s: -s}
    return reader.fastv(ranks, [N, 6])


def methods(reader: Reader) -> dict:
    views = Views(reader.pictures, {2: torch.rand(7, N).double()})
    return selections(views, 2, torch.rand(N).double(), torch.rand(7, N).double(), 2, 0)


def test_everything_kept_is_the_dense_model(reader, dense):
    replies, _, pruned = dense
    for name, draws in methods(reader).items():
        torch.testing.assert_close(reader.pruned(draws[0], N).nll, replies.nll, msg=name)
    torch.testing.assert_close(pruned["FastV", N].nll, replies.nll)


def test_methods_differ_once_they_prune(reader, dense):
    replies, _, pruned = dense
    nll = {name: reader.pruned(draws[0], 6).nll for name, draws in methods(reader).items()}
    nll |= {"dense": replies.nll, "FastV": pruned["FastV", 6].nll, "blind": reader.blind().nll}
    nll["reversed"] = pruned["reversed", 6].nll
    for a in nll:
        assert all((nll[a] - nll[b]).abs().max() > 1e-4 for b in nll if a != b), a


def test_fastv_is_the_model_that_drops_between_layers(reader, dense, album):
    """Question by question, without packing: rank by layer K - 1, drop before layer K, positions as they were."""
    _, scores, pruned = dense
    model, flat = reader.model, 0
    logits = []
    for picture, some in enumerate(album.asked):
        for number in range(len(some)):
            words = album.words[picture, number]
            words = words[words != IDS[PAD]][None, None]
            pictures = reader.pictures[picture, None]
            prompt = model.prompt(IDS[BOS], pictures, words, IDS[PAD])
            rows = Rows((1,), last_asked)

            def drop(layer, now, found, flat=flat):
                if layer != 2:
                    return now
                score = fastv_scores(found[1][:, :, 0], slice(1, N + 1))
                torch.testing.assert_close(score, scores[flat, None])
                return now.keep_patches(top_tokens(score, 6).places)

            with torch.no_grad():
                read = model.read(prompt, rows=rows, before_layer=drop)
            assert (read.patches != NO_PATCH).sum() == 6
            assert read.positions.max() == N + words.shape[2]
            logits.append(model.answers(read))
            flat += 1
    wanted = judged(torch.cat(logits), album)
    torch.testing.assert_close(pruned["FastV", 6].nll, wanted.nll)


def test_pruning_before_the_model_counts_positions_anew(reader, album):
    """The same as a picture that has these tokens alone, at their own rows and columns."""
    scores = torch.rand(7, N, generator=torch.Generator().manual_seed(1))
    kept = reader.pruned(by_score(scores), 6)
    logits = []
    for picture in range(7):
        places = scores[picture].topk(6).indices.sort().values[None]
        short = reader.pictures[picture, None, places[0]]
        words = album.words[picture, None]
        with torch.no_grad():
            prompt = reader.model.prompt(IDS[BOS], short, words, IDS[PAD], places)
            assert prompt.positions.max() == 6 + words.shape[2]
            logits.append(reader.model.answers(reader.model.read(prompt)))
    torch.testing.assert_close(kept.nll, judged(torch.cat(logits), album).nll)


def test_choosing_by_question_is_choosing_by_picture_where_all_agree(reader, album):
    scores = torch.rand(7, N, generator=torch.Generator().manual_seed(4))
    wanted = reader.pruned(by_score(scores), 6)
    found = reader.pruned_by_question(scores[album.picture], 6, batch=11)
    torch.testing.assert_close(found.nll, wanted.nll)
    other = reader.pruned_by_question(torch.rand(len(album.answer), N), 6)
    assert (other.nll - wanted.nll).abs().max() > 1e-4


def test_answers_are_judged_among_those_of_their_type(album):
    logits = torch.zeros(len(album.answer), len(IDS))
    right = judged(logits, album)
    sizes = torch.tensor([len(TYPES[name]) for name in album.types]).float()
    torch.testing.assert_close(right.nll, sizes.log())
    words = [q.answer for some in album.asked for q in some]
    logits[range(len(words)), [IDS[word] for word in words]] = 2
    logits[:, IDS["?"]] = 9
    assert judged(logits, album).right.all()
    assert type_accuracy(judged(logits, album).right, album) == {
        name: 100 for name in TYPES if name in album.types
    }


def test_the_average_is_the_papers(album):
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(len(album.answer), generator=generator) < 0.6).float()
    dense = torch.ones_like(right)
    types = np.array(album.types)
    wanted = np.mean([right.numpy()[types == name].mean() for name in set(types)])
    values = average_percent(right, dense, album)
    assert values.shape == (7,)
    assert values.mean() == pytest.approx(100 * wanted)
    solved = np.mean([right.numpy()[types == name].any() for name in set(types)])
    assert average_percent(right, right, album).mean() == pytest.approx(100 * solved)
    assert np.isfinite(average_percent(right, 0 * right, album)).all()


def test_shares_of_a_type_are_one_number_a_picture_and_average_to_its_accuracy(album):
    generator = torch.Generator().manual_seed(1)
    right = (torch.rand(len(album.answer), generator=generator) < 0.6).float()
    found, wanted = type_shares(right, album), type_accuracy(right, album)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        assert values.shape == (7,)
        assert values.mean() == pytest.approx(wanted[name])
        asked = [any(q.type == name for q in some) for some in album.asked]
        assert not values[~np.array(asked)].any()


def test_draws_are_averaged_and_questions_too(album):
    n = len(album.answer)
    a, b = (
        Replies(torch.full((n,), v), torch.full((n,), v), torch.zeros(n).long()) for v in (1.0, 2.0)
    )
    both = mean_replies([a, b])
    assert both.nll.eq(1.5).all()
    assert both.right.eq(1.5).all()
    per_picture = of_pictures(album.picture.float(), album)
    assert per_picture.tolist() == list(range(7))


def test_curves_of_the_language_model_are_those_of_each_prompt_alone(reader, album):
    words = album.words[:, 0]
    curves = lm_curves(reader.model, reader.pictures, words, batch=2)
    assert curves["last"].shape == (7, 3, N)
    own = words[4][words[4] != IDS[PAD]][None, None]
    prompt = reader.model.prompt(IDS[BOS], reader.pictures[4, None], own, IDS[PAD])
    rows = Rows((1,), lambda p: torch.arange(p.length)[None])
    with torch.no_grad():
        reader.model.read(prompt, rows=rows)
    wanted = attention_curves(rows.found[1].mean(1), slice(1, N + 1))
    for name, curve in wanted.items():
        np.testing.assert_allclose(curves[name][4, 1], curve[0], rtol=1e-5)


def test_rho_is_that_of_mean_curves_of_groups():
    curves = np.random.default_rng(0).random((23, 30)) + np.linspace(0, 1, 30)
    found = group_rho(curves, 10)
    wanted = [spearmanr(curves[i : i + 10].mean(0), range(30))[0] for i in (0, 10)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_shares_inside_objects(album):
    inside = inside_objects(album.scenes, 4)
    area = album.scenes.masks.any(1).float().mean((1, 2))
    torch.testing.assert_close(inside.mean(1), area)


def test_twins_cancel_what_follows_content(reader, album, monkeypatch):
    """A tower whose scores are the brightness of its patches: the mean of a picture and its twin is symmetric."""

    def bright(tower, pixels, layers, features, size):
        score = inside_objects_of(pixels)
        return Views(score[..., None].expand(-1, -1, 6).double(), {layers[0]: score.double()})

    def inside_objects_of(pixels):
        shown = torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(1), 4)
        return shown.flatten(1) / 255

    monkeypatch.setattr(study, "view", bright)
    curves = study.twin_curves(reader, torch.nn.Identity(), 5, 2, 40, seed=0)
    np.testing.assert_allclose(curves["cls"], curves["cls"][..., ::-1], atol=1e-6)
    assert (
        abs(
            curves["cls"]
            - bright(None, album.scenes.pixels[:5], (2,), 2, 40).scores[2][:, None].numpy()
        ).max()
        > 0.01
    )
    assert curves["last"].shape == curves["permuted"].shape == (5, 3, N)
    assert abs(curves["last"] - curves["permuted"]).max() > 1e-4
    assert not np.allclose(curves["last"], curves["last"][..., ::-1], atol=1e-4)


def test_timed_prompts_read_what_they_should(reader):
    scores = torch.rand(7, N, generator=torch.Generator().manual_seed(2))
    runs = study.prefill_runs(reader, by_score(scores), {0.5: 8, 0.75: 4})
    words = 1 + reader.words.shape[2]
    found = {key: run() for key, run in runs.items()}
    assert found["none", 0.0].length == N + words
    for name in ("FastV", "FasterVLM"):
        assert [found[name, share].length for share in (0.5, 0.75)] == [8 + words, 4 + words]
    assert found["FastV", 0.5].positions.max() == N + words - 1
    assert found["FasterVLM", 0.5].positions.max() == 8 + words - 1
    wanted = scores.topk(4).indices.sort(1).values
    kept = found["FasterVLM", 0.75].patches
    assert torch.equal(kept[kept != NO_PATCH].view(7, 4), wanted)
