"""A-STAR's study: methods differ as they say, scales give equal updates, statistics follow their definitions."""

import numpy as np
import pandas as pd
import pytest
import torch

from reattend.backbones import scene_judge
from reattend.backbones.scene_judge import Judgement, SceneJudge
from reattend.backbones.trained.t2i import SETTINGS, untrained
from reattend.data.prompt_scenes import NOUN_AT, Prompts, paint, pair_prompts
from reattend.generation.a_star import retention_loss, segregation_loss
from reattend.studies import a_star as study
from reattend.studies.a_star import LAYOUT, METHODS, VARIANTS, draw_steered, step_scales
from reattend.studies.text_to_image import (
    Bench,
    MapDiary,
    agreement,
    area_within,
    asked_by_rule,
    by_prompt,
    draw_plain,
    scores,
)


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Three prompts with two noises each on an untrained model in which every branch adds something."""
    model = untrained(SETTINGS["smoke"], 0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Bench.of(model, SceneJudge(), pair_prompts(3), 2, 7, steps=4, guidance=2.0)


def test_pictures_of_a_prompt_follow_each_other_and_parts_keep_their_noise(bench):
    assert bench.item.tolist() == [0, 0, 1, 1, 2, 2]
    part = bench.part(torch.tensor([1, 4]))
    assert torch.equal(part.noise, bench.noise[[1, 4]])
    assert part.prompts.texts() == [bench.prompts.texts()[i] for i in (1, 4)]
    torch.testing.assert_close(draw_plain(part).pictures, draw_plain(bench).pictures[[1, 4]])


def test_plain_maps_are_those_that_updates_of_size_zero_see(bench):
    plain = draw_plain(bench)
    still = draw_steered(bench, METHODS["A-STAR"], 0.0, track=True)
    torch.testing.assert_close(still.pictures, plain.pictures, atol=1e-5, rtol=0)
    torch.testing.assert_close(still.maps, plain.maps, atol=1e-5, rtol=0)
    assert plain.maps.shape == (4, 6, 9, 6, 6)
    assert still.passes == 0


def test_chunks_change_nothing(bench):
    small = Bench(**(vars(bench) | {"chunk": 4}))
    torch.testing.assert_close(draw_plain(small).maps, draw_plain(bench).maps, atol=1e-5, rtol=0)
    for name in ("A-STAR", "Attend-and-Excite"):
        one, other = (draw_steered(b, METHODS[name], 5.0, track=True) for b in (bench, small))
        torch.testing.assert_close(one.pictures, other.pictures, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.maps, other.maps, atol=1e-4, rtol=0)
        assert one.passes == other.passes
    assert draw_steered(small, METHODS["A-STAR"], 5.0).passes == 4
    first = draw_steered(small, VARIANTS["first quarter of the steps"], 5.0, track=True)
    assert first.passes == 1
    assert first.maps.shape == (4, 6, 9, 6, 6)


def test_some_of_what_was_drawn(bench):
    plain, rows = draw_plain(bench), torch.tensor([4, 1])
    some = plain.of(rows)
    assert torch.equal(some.pictures, plain.pictures[rows])
    assert torch.equal(some.maps, plain.maps[:, rows])


def test_losses_are_those_of_the_paper_and_shapes_have_no_height():
    maps = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    masks = (maps > 0.6).double()
    parts = segregation_loss(maps), retention_loss(maps, masks)
    torch.testing.assert_close(study.both(maps, masks), sum(parts))
    torch.testing.assert_close(study.both(maps, None), parts[0])
    torch.testing.assert_close(study.retain(maps, masks), parts[1])
    assert study.retain(maps, None).tolist() == [0, 0]
    even = maps / maps.sum((-2, -1), keepdim=True)
    for factor in (1.0, 0.01):
        faint = maps * torch.tensor([1.0, factor]).double()[:, None, None]
        torch.testing.assert_close(study.segregate_shapes(faint, None), segregation_loss(even))


def test_scales_give_every_method_its_share_of_the_latent(bench):
    methods = {"L": METHODS["+ L_seg"], "first half": METHODS["Attend-and-Excite"]}
    scales = {n: 0.04 * scale for n, scale in step_scales(bench, methods).items()}
    for name, method in methods.items():
        update = method.updates(bench, scales[name])
        update.refine = {}
        sizes = []

        def watch(step, latent, time, text, update=update, sizes=sizes):
            moved = (update(step, latent, time, text) - latent).flatten(1).square().mean(1).sqrt()
            if update.sizes[step]:
                sizes.append(
                    (moved.mean().item(), latent.flatten(1).square().mean(1).sqrt().mean().item())
                )
            return latent

        bench.draw(watch)
        moved, stayed = np.array(sizes).sum(0)
        assert moved / stayed == pytest.approx(0.04, rel=1e-3)
        assert len(sizes) == round(4 * method.share)


def test_methods_differ_and_placebos_have_turned_gradients_or_other_masks(bench):
    pictures = {n: draw_steered(bench, m, 20.0).pictures for n, m in METHODS.items()}
    names = list(pictures)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(pictures[one], pictures[other]), (one, other)
    assert METHODS["random direction"].updates(bench, 1.0).scramble is not None
    assert METHODS["A-STAR"].updates(bench, 1.0).scramble is None
    assert METHODS["L_ret, random direction"].updates(bench, 1.0).scramble is not None
    lenders = VARIANTS["borrowed masks"].updates(bench, 1.0).lenders
    assert (bench.item[lenders] != bench.item).all()
    assert METHODS["A-STAR"].updates(bench, 1.0).lenders is None


@pytest.mark.parametrize(
    ("method", "placebo"), [("A-STAR", "random direction"), ("+ L_ret", "L_ret, random direction")]
)
def test_a_random_direction_is_as_large_as_the_method_s_update_and_differs_between_parts(
    bench, method, placebo
):
    first, second = bench.part(slice(0, 2)), bench.part(slice(2, 4))
    text, time = bench.model.encode(first.ids), torch.full((2,), 0.9)
    steps = {}
    for name in (method, placebo):
        updates = METHODS[name].updates(first, 3.0)
        updates(0, first.noise, time, text)  # makes the masks of the second step
        steps[name] = updates(1, first.noise, time, text) - first.noise
    sizes = [step.flatten(1).norm(dim=1) for step in steps.values()]
    torch.testing.assert_close(*sizes)
    turned = torch.nn.functional.cosine_similarity(*(s.flatten(1) for s in steps.values()))
    assert turned.abs().max() < 0.2
    seeds = [METHODS[placebo].updates(part, 3.0).scramble for part in (first, second)]
    assert seeds[0] != seeds[1]


def test_function_words_stand_at_their_places(bench):
    at = torch.tensor(study.FUNCTION_WORDS_AT).expand(len(bench), -1)
    assert bench.ids.gather(1, at).unique(dim=0).tolist() == [[3, 4]]


def test_refinement_and_shares_become_steps(bench):
    updates = METHODS["Attend-and-Excite"].updates(Bench(**(vars(bench) | {"steps": 20})), 1.0)
    assert updates.refine == {0: 0.05, 4: 0.5, 8: 0.8}
    assert [bool(size) for size in updates.sizes] == [True] * 10 + [False] * 10
    first = VARIANTS["first quarter of the steps"].updates(bench, 1.0)
    assert [bool(size) for size in first.sizes] == [True, False, False, False]


def test_layout_asks_for_left_and_right_halves():
    masks = LAYOUT.regions(torch.rand(2, 2, 6, 6))
    assert (masks[:, 0, :, :3] == 1).all()
    assert (masks[:, 0, :, 3:] == 0).all()
    assert torch.equal(masks[:, 1], 1 - masks[:, 0])


def test_diary_keeps_the_captioned_half_of_every_pass(bench):
    diary = MapDiary(bench.blocks)
    bench.draw(hooks=diary.hooks)
    maps = diary.maps(bench.words)
    assert maps.shape == (4, 6, 9, 6, 6)
    torch.testing.assert_close(maps.sum(2), torch.ones(4, 6, 6, 6))


# --- tables and statistics ------------------------------------------------------------------------------------


def test_means_of_a_method_are_shares_in_per_cent_and_log_odds():
    columns = ["both", "both in their colours", "both, by rule", "both in their colours, by rule"]
    frame = pd.DataFrame({c: [1.0] * k + [0.0] * (4 - k) for k, c in enumerate(columns)})
    frame["surplus"], frame["category"] = 1.0, ["animal-object"] * 3 + ["object-object"]
    frame["both"], frame["weaker"], frame["weaker pair"] = [1.0, 0, 0, 1], [1.0, 2, 3, 6], 9.0
    table = study.means({"one": frame, "other": frame.iloc[:1]}, {"one": 7.0})
    first, second = (row.to_dict() for _, row in table.iterrows())
    assert first["both things"] == 50
    assert first["both in their colours"] == 25
    assert first["both, by rule"] == 50
    assert first["both in their colours, by rule"] == 75
    assert first["more than asked"] == 100
    assert first["weaker thing, log-odds"] == 3
    assert first["both, animal-object"] == pytest.approx(100 / 3)
    assert first["both, object-object"] == 100
    assert [first["passes with gradient"], second["passes with gradient"]] == [7, 0]
    assert second["both things"] == 100


def pairs_within(score, failed):
    """Right pairs and all pairs, one by one."""
    right, pairs = 0.0, 0
    for row, fails in zip(score, failed, strict=True):
        for a in row[fails]:
            for b in row[~fails]:
                right += (a > b) + 0.5 * (a == b)
                pairs += 1
    return right, pairs


def test_area_within_prompts_counts_pairs_of_one_prompt_and_jackknifes_over_prompts():
    random = np.random.default_rng(0)
    failed = random.random((30, 6)) < 0.4
    score = (random.normal(size=(30, 6)) + failed).round(1)
    points = area_within(score, failed)
    right, pairs = pairs_within(score, failed)
    for prompt in range(3):
        some_right, some = pairs_within(np.delete(score, prompt, 0), np.delete(failed, prompt, 0))
        assert points[prompt] == pytest.approx(30 * right / pairs - 29 * some_right / some)
    assert points.mean() == pytest.approx(right / pairs, abs=0.005)
    assert points.mean() > 0.65


def test_area_within_prompts_knows_nothing_of_hard_prompts():
    failed = np.array([[True, True, False], [False, False, True]] * 6)
    hard = failed.sum(1, keepdims=True) + np.zeros((12, 3))  # the score tells prompts apart alone
    assert area_within(hard, failed) == pytest.approx(np.full(12, 0.5))
    assert area_within(hard + 10 * failed, failed) == pytest.approx(np.ones(12))
    assert area_within(hard, failed | True) == pytest.approx(np.full(12, 0.5))


def test_the_gap_is_zero_for_like_things_and_negative_for_one_that_fades():
    peaks = np.full((6, 2, 2), 0.5)
    peaks[4:, 0, 1] = 0.2  # of the first picture the second thing fades

    def gaps(peaks, missing):
        parts = study.early_and_change(peaks, slice(0, 2), slice(4, None))
        return [study.missing_less_present(part, np.array(missing)).tolist() for part in parts]

    assert gaps(peaks, [1, 0]) == [[0, 0], pytest.approx([-0.3, 0.0])]
    assert gaps(peaks, [0, 1]) == [[0, 0], pytest.approx([0.3, 0.0])]
    low = peaks.copy()
    low[:, 0, 1] -= 0.1  # low from the start, and fading by .3 as before
    assert gaps(low, [1, 0]) == [pytest.approx([-0.1, 0.0]), pytest.approx([-0.3, 0.0])]
    parts = study.split_peaks(peaks, np.array([1, 0]))
    assert parts["the missing thing"][5].tolist() == [0.2, 0.5]
    assert parts["the present thing"][5].tolist() == [0.5, 0.5]


def test_what_a_word_has_in_all_pictures_of_its_prompt_is_gone():
    item = np.array([0, 0, 0, 1, 1])
    own = np.array([[1.0, 0], [4, 0], [7, 3], [2, 2], [4, 6]])
    found = study.over_other_pictures(own, item)
    assert found.tolist() == [[-4.5, -1.5], [0, -1.5], [4.5, 3], [-2, -4], [2, 4]]
    shifted = own + np.array([[5.0, -2], [9, 1]])[item]
    assert study.over_other_pictures(shifted, item) == pytest.approx(found)


def test_means_by_prompt_leave_out_prompts_without_a_chosen_picture():
    values, item = np.arange(8.0).reshape(2, 4), np.array([0, 0, 1, 1])
    chosen = np.array([True, False, False, False])
    assert study.mean_by_prompt(values, item).tolist() == [[0.5, 4.5], [2.5, 6.5]]
    assert study.mean_by_prompt(values, item, chosen).tolist() == [[0.0, 4.0]]


def test_retention_by_step_compares_with_the_step_before():
    maps = torch.zeros(3, 1, 9, 6, 6)
    for noun in NOUN_AT:
        maps[:, 0, noun, :2, noun - 2] = 1.0
    lost = study.retention_by_step(maps, torch.tensor([NOUN_AT]))
    assert lost.tolist() == [[1.0], [1.0]]  # one half for each concept
    maps[2, 0, NOUN_AT[0]] = maps[2, 0, NOUN_AT[0]].T.flip(0)
    assert study.retention_by_step(maps, torch.tensor([NOUN_AT]))[1, 0] > 1.2


def test_overlaps_peaks_and_retention_are_of_each_step_and_picture():
    maps = torch.rand(3, 2, 9, 6, 6, generator=torch.Generator().manual_seed(0))
    concepts = torch.tensor([[3, 7], [7, 3]])
    shared, peaks = study.overlaps(maps, (3, 7)), study.peaks(maps, concepts)
    lost = study.retention_by_step(maps, concepts)
    for step in range(3):
        for picture in range(2):
            one, other = (maps[step, picture, at] for at in concepts[picture])
            expected = torch.minimum(one, other).sum() / (one + other).sum()
            assert shared[step, picture] == pytest.approx(expected.item(), rel=1e-6)
            assert peaks[step, picture].tolist() == [one.max().item(), other.max().item()]
    for step in (1, 2):
        now, before = (study.of_concepts(maps[s], concepts) for s in (step, step - 1))
        expected = retention_loss(now, study.active_regions(before))
        assert lost[step - 1].tolist() == pytest.approx(expected.tolist(), rel=1e-6)


class Told(SceneJudge):
    """Says of every picture what it is told."""

    def __init__(self, judgement):
        super().__init__()
        self.judgement = judgement

    def forward(self, pixels):
        return self.judgement


def test_scores_say_which_thing_is_there_and_how_sure(bench):
    prompts = Prompts(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]]))
    counts, pairs = torch.zeros(2, 8, 3), torch.full((2, 8, 4), -9.0)
    counts[..., 0] = 9.0
    for picture, noun, colour in ((0, 0, 0), (0, 1, 1), (1, 3, 0), (1, 5, 0)):
        counts[picture, noun] = torch.tensor([0.0, 2.0, -9.0])
        pairs[picture, noun, colour] = 3.0
    told = Bench(
        **(
            vars(bench.part(slice(0, 2)))
            | {"judge": Told(Judgement(counts, pairs)), "prompts": prompts}
        )
    )
    frame = scores(told, torch.ones(2, 3, 24, 24))
    assert frame["both"].tolist() == [1, 0]
    assert frame["both in their colours"].tolist() == [1, 0]
    assert frame["first"].tolist() == [True, False]
    assert frame["second"].tolist() == [True, True]
    assert frame["both, by rule"].tolist() == [0, 0]  # the pictures are white
    assert frame["surplus"].tolist() == [0, 1]
    assert frame["weaker"].tolist() == pytest.approx([2.0, -6.0], abs=1e-4)
    assert frame["sure"].tolist() == [2, 2]
    assert frame["agreed"].tolist() == [0, 1]  # of the second picture both miss the first thing
    assert agreement(frame) == 25
    assert by_prompt(frame)["both"].tolist() == [0.5]


def test_things_of_which_the_rule_is_in_doubt_and_things_not_asked_for_do_not_count(
    bench, monkeypatch
):
    prompts = Prompts(torch.tensor([[0, 1], [0, -1]]), torch.tensor([[0, 1], [2, -1]]))
    counts = torch.zeros(2, 8, 3)
    counts[0, 0, 0], counts[0, 1, 0], counts[1, 2, 0] = 9.0, 9.0, 9.0  # the judge sees nothing
    told = {"judge": Told(Judgement(counts, torch.zeros(2, 8, 4))), "prompts": prompts}
    asked = Bench(**(vars(bench.part(slice(0, 2))) | told))
    margins = torch.zeros(2, 8)
    margins[0, 0], margins[0, 1], margins[1, 2] = 0.2, -0.05, -0.2
    monkeypatch.setattr(scene_judge, "match_margins", lambda pixels: margins)
    frame = scores(asked, torch.ones(2, 3, 24, 24))
    assert frame["sure"].tolist() == [1, 1]
    assert frame["agreed"].tolist() == [0, 1]
    assert agreement(frame) == 50
    assert agreement(frame.iloc[:0]) == 0


def test_the_rule_says_which_asked_thing_is_there_and_in_its_colour():
    prompts = Prompts(torch.tensor([[0, 1], [0, -1]]), torch.tensor([[2, 7], [4, -1]]))
    pixels = paint(prompts, 24, torch.Generator().manual_seed(1)).pixels
    asked = Prompts(torch.tensor([[0, 2], [0, -1]]), torch.tensor([[2, 7], [5, -1]]))
    there, coloured = asked_by_rule(asked, pixels)
    assert there.tolist() == [[True, True], [False, True]]
    assert coloured.tolist() == [[True, False], [False, True]]


def test_order_is_read_off_the_picture_by_rule():
    prompts = Prompts(torch.tensor([[0, 1]]).repeat(20, 1), torch.tensor([[2, 7]]).repeat(20, 1))
    scenes = paint(prompts, 24, torch.Generator().manual_seed(0))
    apart = (scenes.boxes[:, 0, 0] - scenes.boxes[:, 1, 0]).abs() > 2
    left = (scenes.boxes[:, 0, 0] < scenes.boxes[:, 1, 0]).double()
    found = study.ordered(
        scenes.pixels[apart], Prompts(prompts.colours[apart], prompts.nouns[apart])
    )
    seen = np.isfinite(found)
    assert seen.mean() > 0.9
    assert found[seen].tolist() == left[apart].numpy()[seen].tolist()
    lacking = Prompts(torch.tensor([[0, 1]]).repeat(20, 1), torch.tensor([[2, 5]]).repeat(20, 1))
    few = np.isfinite(study.ordered(scenes.pixels, lacking))
    assert len(few) == 20
    assert few.sum() < 10  # few pictures hold what was not painted
