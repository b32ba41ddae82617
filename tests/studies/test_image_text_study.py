"""Retrieval, swaps and pointing on small cases worked out by hand."""

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained.filip import ARMS, SETTINGS, untrained
from reattend.data.attribute_scenes import (
    COLOURS,
    NOUNS,
    AttributeScenes,
    held_out_pair,
    make_attribute_scenes,
    spelled,
)
from reattend.studies.image_text import (
    PairTokens,
    colour_prompts,
    encoded,
    mean_recall,
    nouns_found,
    own_similarities,
    padding_share,
    patches_in_boxes,
    pointing,
    prompt_vectors,
    recalls,
    retrieval,
    with_absent_objects,
    with_swapped_colours,
    word_iou,
    zero_shot,
)


def test_recalls_by_hand():
    # Picture 0 finds its text first, picture 1 last, picture 2 second.
    by_patches = torch.tensor([[3.0, 1, 2], [2, 1, 3], [1, 3, 2]])
    # Text 0 finds its picture second, texts 1 and 2 first (columns).
    by_words = torch.tensor([[2.0, 1, 0], [3, 5, 1], [1, 2, 4]])
    found = recalls(by_patches, by_words)
    third = 100 / 3
    assert found["I2T R@1"] == pytest.approx(third)
    assert found["T2I R@1"] == pytest.approx(2 * third)
    assert found["I2T R@5"] == found["T2I R@10"] == 100
    assert found["R@1"] == pytest.approx(1.5 * third)


def test_swapped_captions_have_the_same_words_and_seen_pairs():
    scenes = make_attribute_scenes(120, seed=2)
    swapped = with_swapped_colours(scenes)
    differ = (swapped != scenes.colours).sum(1)
    assert set(differ.tolist()) <= {0, 2}
    assert (differ == 2).double().mean() > 0.8
    assert torch.equal(swapped.sort(1).values, scenes.colours.sort(1).values)
    for colours, nouns in zip(swapped.tolist(), scenes.nouns.tolist(), strict=True):
        assert not any(held_out_pair(c, n) for c, n in zip(colours, nouns, strict=True) if n >= 0)


def test_absent_objects_are_absent():
    scenes = make_attribute_scenes(50, seed=2)
    colours, nouns = with_absent_objects(scenes)
    for new, old in ((nouns, scenes.nouns), (colours, scenes.colours)):
        assert torch.equal(new >= 0, old >= 0)
    for new, old in zip(nouns.tolist(), scenes.nouns.tolist(), strict=True):
        assert not {n for n in new if n >= 0} & set(old)
    two = (scenes.nouns >= 0).sum(1) <= 3
    for new, old in zip(colours[two].tolist(), scenes.colours[two].tolist(), strict=True):
        assert not {c for c in new if c >= 0} & set(old)


def test_patches_in_boxes_by_hand():
    # Of the patches 3, 4 (row 1: 3 of 4 rows in the box) and 6, 7 (row 2: one) 9, 9, 3, 3 of 16 pixels lie inside.
    boxes = torch.tensor([[[1, 5, 7, 9], [0, 0, 0, 0]]])
    inside = patches_in_boxes(boxes, size=12, grid=3)
    assert inside[0, 0].nonzero().flatten().tolist() == [3, 4]
    assert not inside[0, 1].any()
    thin = torch.tensor([[[3, 0, 4, 2]]])  # two pixels, all in patch 0
    assert patches_in_boxes(thin, size=12, grid=3)[0, 0].nonzero().flatten().tolist() == [0]


def case():
    """One scene of two objects among three places: boxes are patches {0, 1} and {3}."""
    inside = torch.zeros(1, 3, 4, dtype=torch.bool)
    inside[0, 0, :2] = inside[0, 1, 3] = True
    return inside


def test_pointing_by_hand():
    best = torch.zeros(1, 10, dtype=torch.long)
    best[0, 2], best[0, 5], best[0, 8] = 1, 0, 3  # nouns of objects 0, 1, (2)
    own, others = pointing(best, case())
    assert own[0, :2].tolist() == [1, 0]
    assert others[0, :2].tolist() == [0, 1]
    assert own[0, 2].isnan()
    assert others[0, 2].isnan()
    best[0, 5] = 2  # neither box
    own, others = pointing(best, case())
    assert own[0, 1] == others[0, 1] == 0


def test_word_iou_by_hand():
    # Words 1 and 2 are the first object's colour and noun, 4 and 5 the second's.
    best = torch.tensor([[2, 1, 2, 5]])
    iou = word_iou(best, case())
    assert iou[0, 0].item() == pytest.approx(2 / 3)
    assert iou[0, 1].item() == pytest.approx(1)
    assert iou[0, 2].isnan()
    assert word_iou(best, case(), words=(1,))[0, 0].item() == pytest.approx(1 / 3)


def test_scenes_can_be_indexed():
    scenes = make_attribute_scenes(6, seed=1)
    part = scenes[2:4]
    assert isinstance(part, AttributeScenes)
    assert len(part) == 2
    assert torch.equal(part.pixels, scenes.pixels[2:4])


def first_tokens(image, text, mask):
    """Cosines of first tokens: enough of a similarity to test the harness."""
    cosines = image[:, 0] @ text[:, 0].T
    return cosines, cosines + 0.01 * torch.arange(len(image))[:, None]


def test_retrieval_is_the_mean_over_galleries():
    image = torch.nn.functional.normalize(
        torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    text = torch.nn.functional.normalize(
        torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    tokens = PairTokens(image, text, torch.ones(9, 3, dtype=torch.bool))
    scale = torch.tensor(5.0)
    whole = retrieval(first_tokens, tokens, scale, gallery=4)
    parts = []
    for start in (0, 4):  # the ninth pair fills no gallery
        cut = slice(start, start + 4)
        parts.append(recalls(*first_tokens(image[cut], text[cut], None)))
    for name in ("I2T R@1", "T2I R@1"):
        assert whole[name] == pytest.approx((parts[0][name] + parts[1][name]) / 2)
    assert whole["NLL"] > 0
    own = own_similarities(first_tokens, tokens, batch=4)
    torch.testing.assert_close(own, (image[:, 0] * text[:, 0]).sum(-1))


def test_padding_share_by_hand():
    words = torch.eye(3)[None]
    patches = torch.eye(3)[[0, 2, 1, 2]][
        None
    ]  # best words of the four patches: 0, padding, 1, padding
    mask = torch.tensor([[True, True, False]])
    assert padding_share(patches, words, mask, case()) == pytest.approx(100 * 2 / 3)
    full = torch.ones(1, 3, dtype=torch.bool)
    assert padding_share(patches, words, full, case()) == 0


# Classes that prompts name --------------------------------------------------------------------------


def prompts(classes=3, count=4, joint=6):
    return torch.randn(classes, count, joint, generator=torch.Generator().manual_seed(0)).double()


def test_one_prompt_is_no_ensemble():
    one = prompts(count=1)
    torch.testing.assert_close(prompt_vectors(one), F.normalize(one[:, 0], dim=-1))


def test_vectors_are_normalised_before_the_mean_and_after_it():
    # Two prompts at right angles: their bisector, however long either is.
    pair = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
    torch.testing.assert_close(prompt_vectors(pair), torch.full((1, 2), 0.5**0.5))
    found = prompt_vectors(prompts())
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3).double())
    # The cosine with the ensemble is the mean cosine over the length of the mean.
    unit, picture = F.normalize(prompts(), dim=-1), F.normalize(prompts()[0, 0] + 1, dim=-1)
    expected = (unit @ picture).mean(1) / unit.mean(1).norm(dim=-1)
    torch.testing.assert_close(found @ picture, expected)


def test_the_order_and_number_of_equal_prompts_do_not_matter():
    texts = prompts()
    for other in (texts[:, [2, 0, 3, 1]], texts.repeat(1, 3, 1)):
        torch.testing.assert_close(prompt_vectors(other), prompt_vectors(texts))


def test_prompts_name_every_noun_in_every_colour():
    ids, mask = colour_prompts()
    said = [" ".join(spelled(line)) for line in ids]
    assert said == [f"<bos> {colour} {noun} <eos>" for noun in NOUNS for colour in COLOURS]
    assert mask.all()


def test_nouns_found_by_hand():
    nouns = torch.tensor([[0, 2, -1], [3, 1, 0]])
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.1, 0.9, 0.8, 0.7]])
    # Of nouns 0 and 2 the best two classes (0, 1) hold one; of 3, 1, 0 the best three (1, 2, 3) hold two.
    assert nouns_found(scores, nouns) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert nouns_found(-scores, nouns) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert nouns_found(torch.eye(4)[[0, 3]], torch.tensor([[0], [3]])) == 100


def test_zero_shot_of_each_arm_by_hand():
    shape = SETTINGS["smoke"].shape
    model, scenes = untrained(shape, 0).eval(), shape.scenes(12, "test", 0)
    ids, mask = colour_prompts()
    with torch.no_grad():
        image, text = model.image_tokens(scenes.pixels), model.text_tokens(ids)
    for arm in ("global", "late", "mean-mean"):
        found = zero_shot(model, arm, scenes)
        scores = ARMS[arm].test(image, text, mask)[0].view(12, len(NOUNS), len(COLOURS))
        alone = [nouns_found(scores[..., c], scenes.nouns) for c in range(len(COLOURS))]
        assert found["one prompt"] == pytest.approx(sum(alone) / len(COLOURS))
        assert found["mean similarity"] == nouns_found(scores.mean(2), scenes.nouns)
        assert ("mean vector" in found) == (arm == "global")
    ends = text[:, -1].view(len(NOUNS), len(COLOURS), -1)
    vectors = torch.stack([F.normalize(rows.mean(0), dim=0) for rows in ends])
    found = zero_shot(model, "global", scenes)["mean vector"]
    assert found == nouns_found(image[:, 0] @ vectors.T, scenes.nouns)


def test_mean_recall_is_that_of_the_tokens():
    shape = SETTINGS["smoke"].shape
    model, scenes = untrained(shape, 0).eval(), shape.scenes(12, "test", 0)
    tokens = encoded(model, scenes)["true"]
    for arm in ("global", "late"):
        expected = retrieval(ARMS[arm].test, tokens, torch.tensor(3.0), gallery=6)["R@1"]
        assert mean_recall(model, ARMS[arm].test, scenes, 6) == expected
