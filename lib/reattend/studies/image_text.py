"""What is asked of picture-text models: retrieval both ways, classes, whose colour is which, where words point.

Names of shapes: `pairs` (picture i with text i), `patches` (of a square grid, row by row), `words`, `objects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.backbones.trained.filip import ARMS, Compare, global_similarity, paired
from reattend.data.attribute_scenes import (
    COLOURS,
    NOUNS,
    AttributeScenes,
    caption_ids,
    colour_word,
    held_out_pair,
)
from reattend.metrics import ranks_of_answers
from reattend.training.contrastive import symmetric_info_nce
from reattend.trunks.image_text import ImageTextModel, last_words
from reattend.vision_language.filip import best_patches, best_words, prompt_ensemble

KS = (1, 5, 10)


# --- retrieval -----------------------------------------------------------------------------------


def recalls(
    image_to_text: Float[Tensor, "pairs pairs"], text_to_image: Float[Tensor, "pairs pairs"]
) -> dict[str, float]:
    """Recall at 1, 5, 10 in per cent, both ways; scores of picture i and text j stand at [i, j] of both.

    "I2T R@1" ranks the texts of a row of `image_to_text`, "T2I R@1" the pictures of a column of
    `text_to_image`; "R@1" is the mean of the two.
    """
    ranks = {"I2T": ranks_of_answers(image_to_text), "T2I": ranks_of_answers(text_to_image.T)}
    found = {
        f"{way} R@{k}": 100 * (values <= k).double().mean().item()
        for way, values in ranks.items()
        for k in KS
    }
    return found | {"R@1": (found["I2T R@1"] + found["T2I R@1"]) / 2}


def retrieval(
    compare: Compare, tokens: PairTokens, scale: Float[Tensor, ""], gallery: int
) -> dict[str, float]:
    """Mean recalls over galleries of `gallery` pairs, and the contrastive loss of a gallery in nats ("NLL")."""
    found = []
    for start in range(0, len(tokens.image) - gallery + 1, gallery):
        cut = slice(start, start + gallery)
        by_patches, by_words = compare(tokens.image[cut], tokens.text[cut], tokens.mask[cut])
        nats = symmetric_info_nce(scale * by_patches, scale * by_words).item()
        found.append(recalls(by_patches, by_words) | {"NLL": nats})
    return {name: float(np.mean([line[name] for line in found])) for name in found[0]}


def own_similarities(
    compare: Compare, tokens: PairTokens, batch: int = 32
) -> Float[Tensor, " pairs"]:
    """What ranks texts for a picture, of each picture with its own text."""
    parts = []
    for start in range(0, len(tokens.image), batch):
        cut = slice(start, start + batch)
        parts.append(compare(tokens.image[cut], tokens.text[cut], tokens.mask[cut])[0].diagonal())
    return torch.cat(parts)


# --- captions that are wrong ------------------------------------------------------------------------


def with_swapped_colours(scenes: AttributeScenes) -> Int[Tensor, "scenes objects"]:
    """Colours after two objects of each scene have swapped theirs: same words, other pairing.

    The first two objects whose new pairs are not held out; where there are none, colours stay as they are.
    """
    swapped = scenes.colours.clone()
    rows = zip(scenes.colours.tolist(), scenes.nouns.tolist(), strict=True)
    for row, (colours, nouns) in enumerate(rows):
        there = [i for i, noun in enumerate(nouns) if noun >= 0]
        for a, b in ((a, b) for a in there for b in there if a < b):
            if not (held_out_pair(colours[a], nouns[b]) or held_out_pair(colours[b], nouns[a])):
                swapped[row, a], swapped[row, b] = colours[b], colours[a]
                break
    return swapped


def with_absent_objects(
    scenes: AttributeScenes, seed: int = 0
) -> tuple[Int[Tensor, "scenes objects"], Int[Tensor, "scenes objects"]]:
    """Colours and nouns of captions of the same form about things that the scenes do not show.

    Every noun becomes one that the scene does not hold, and so does every colour as far as there are
    other ones.
    """
    random = np.random.default_rng(seed)
    replaced = []
    for values, names in ((scenes.colours, COLOURS), (scenes.nouns, NOUNS)):
        new = values.clone()
        for row, line in enumerate(values.tolist()):
            there = [value for value in line if value >= 0]
            absent = random.permutation([v for v in range(len(names)) if v not in there]).tolist()
            new[row, : len(there)] = torch.tensor((absent + there)[: len(there)])
        replaced.append(new)
    return replaced[0], replaced[1]


# --- where words point ------------------------------------------------------------------------------


def patches_in_boxes(
    boxes: Int[Tensor, "pairs objects 4"], size: int, grid: int
) -> Bool[Tensor, "pairs objects patches"]:
    """Which patches of a grid x grid picture lie in each box (x0, y0, x1, y1 in pixels) to at least 3/8.

    Where none does, those that share most with a box of at least one pixel.
    """
    edges = torch.arange(grid + 1) * size / grid
    low, high = boxes[..., :2, None], boxes[..., 2:, None]
    shared = (torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])).clamp(min=0)
    area = shared[..., 1, :, None] * shared[..., 0, None, :]  # [pairs, objects, rows, columns]
    area = area.flatten(-2)
    least = area.amax(-1, keepdim=True).clamp(max=3 / 8 * (size / grid) ** 2)
    return (area >= least) & (area > 0)


def pointing(
    best: Int[Tensor, "pairs words"], inside: Bool[Tensor, "pairs objects patches"]
) -> tuple[Float[Tensor, "pairs objects"], Float[Tensor, "pairs objects"]]:
    """Whether the best patch of each object's noun lies in its box, and the share of other boxes it lies in.

    NaN for objects that a scene does not have. Other objects' boxes are as large, so the second number says
    what pointing at *some* object gives.

    Args:
        best: preferred patch of every word of the caption.
    """
    objects = inside.shape[1]
    nouns = torch.tensor([colour_word(place) + 1 for place in range(objects)])
    there = inside.any(2)
    # hits[i, a, b]: the noun of object a points into the box of object b.
    hits = inside.take_along_dim(best[:, None, nouns], 2).mT.double()
    own = hits.diagonal(dim1=1, dim2=2)
    others = (hits.sum(2) - own) / (there.sum(1, keepdim=True) - 1)
    return own.masked_fill(~there, torch.nan), others.masked_fill(~there, torch.nan)


def word_iou(
    best: Int[Tensor, "pairs patches"],
    inside: Bool[Tensor, "pairs objects patches"],
    words: tuple[int, ...] = (0, 1),
) -> Float[Tensor, "pairs objects"]:
    """Intersection over union of an object's patches and those that prefer a word of it; NaN without object.

    Args:
        best: preferred word of every patch.
        words: which words count: 0 the colour, 1 the noun.
    """
    values = []
    for place in range(inside.shape[1]):
        names = torch.tensor([colour_word(place) + word for word in words])
        chosen, box = torch.isin(best, names), inside[:, place]
        values.append((chosen & box).sum(1).double() / (chosen | box).sum(1))
    return torch.stack(values, 1).masked_fill(~inside.any(2), torch.nan)


# --- all of it for one model --------------------------------------------------------------------------


@dataclass(frozen=True)
class PairTokens:
    """Tokens of pictures ([CLS] first) and of their captions in the joint space, and which words are real."""

    image: Float[Tensor, "pairs length joint"]
    text: Float[Tensor, "pairs words joint"]
    mask: Bool[Tensor, "pairs words"]


@torch.no_grad()
def encoded(
    model: ImageTextModel, scenes: AttributeScenes, batch: int = 256
) -> Mapping[str, PairTokens]:
    """Tokens of scenes with their true captions, those with swapped colours and those about absent things."""
    device = model.log_scale.device
    pictures = [model.image_tokens(part.to(device)).cpu() for part in scenes.pixels.split(batch)]
    image = torch.cat(pictures)
    captions = {
        "true": (scenes.colours, scenes.nouns),
        "swapped": (with_swapped_colours(scenes), scenes.nouns),
        "absent": with_absent_objects(scenes),
    }
    found = {}
    for kind, (colours, nouns) in captions.items():
        ids, mask = caption_ids(colours, nouns)
        found[kind] = PairTokens(image, model.text_tokens(ids.to(device)).cpu(), mask)
    return found


@dataclass(frozen=True)
class Answers:
    """What one model says of test scenes.

    Attributes:
        scores: "I2T R@1" and so on, "NLL", "swap" (per cent of swapped captions that are turned down),
            "IoU noun", "IoU phrase", "padding" (per cent of object patches that prefer padding, where
            captions have any), "temperature".
        own, others: `pointing` of each scene, mean over its objects; `absent` is own minus others for captions
            about things that are not there.
    """

    scores: dict[str, float]
    own: Float[np.ndarray, " scenes"]
    others: Float[np.ndarray, " scenes"]
    absent: Float[np.ndarray, " scenes"]


def answers(
    model: ImageTextModel, arm: str, scenes: AttributeScenes, gallery: int, size: int, patch: int
) -> Answers:
    """Score a model of an arm on test scenes, `gallery` of them at a time."""
    compare, tokens = ARMS[arm].test, encoded(model, scenes)
    true, scale = tokens["true"], model.scale.detach().cpu()
    inside = patches_in_boxes(scenes.boxes, size, size // patch)
    scores = retrieval(compare, true, scale, gallery)
    margin = own_similarities(compare, true) - own_similarities(compare, tokens["swapped"])
    asked = (with_swapped_colours(scenes) != scenes.colours).any(1)
    scores["swap"] = 100 * (margin[asked] > 0).double().mean().item()
    patches = true.image[:, 1:]
    chosen = best_words(patches, true.text, true.mask)
    scores["IoU noun"] = word_iou(chosen, inside, (1,)).nanmean().item()
    scores["IoU phrase"] = word_iou(chosen, inside).nanmean().item()
    scores["padding"] = padding_share(patches, true.text, true.mask, inside)
    scores["temperature"] = 1 / scale.item()
    own, others = pointing(best_patches(patches, true.text), inside)
    absent = pointing(best_patches(patches, tokens["absent"].text), inside)
    means = (part.nanmean(1).numpy() for part in (own, others, absent[0] - absent[1]))
    return Answers(scores, *means)


def padding_share(
    patches: Float[Tensor, "pairs patches joint"],
    words: Float[Tensor, "pairs words joint"],
    mask: Bool[Tensor, "pairs words"],
    inside: Bool[Tensor, "pairs objects patches"],
) -> float:
    """Per cent of the patches on objects whose best word is padding, in captions that have padding."""
    chosen = best_words(patches, words, torch.ones_like(mask))
    lost = (~mask).gather(1, chosen)
    shown = inside.any(1) & (~mask).any(1, keepdim=True)
    return 100 * (lost & shown).sum().item() / max(1, shown.sum().item())


@torch.no_grad()
def mean_recall(
    model: ImageTextModel, compare: Compare, scenes: AttributeScenes, gallery: int
) -> float:
    """Mean R@1 of a model on scenes, in per cent, under any similarity; `gallery` of them at a time."""
    pairs, device = paired(scenes), model.log_scale.device
    image = model.image_tokens(pairs.pixels.to(device)).cpu()
    text = model.text_tokens(pairs.ids.to(device)).cpu()
    tokens = PairTokens(image, text, pairs.mask)
    return retrieval(compare, tokens, model.scale.cpu(), gallery)["R@1"]


# --- classes that prompts name --------------------------------------------------------------------------


def prompt_vectors(
    texts: Float[Tensor, "classes prompts joint"],
) -> Float[Tensor, "classes joint"]:
    """One vector of length 1 a class out of those of its prompts: CLIP's prompt ensemble (2103.00020, section 3.1.4).

    e_c = m_c / |m_c| with m_c = (1/P) sum_p t_cp / |t_cp|. A picture's cosine with e_c is the mean of its cosines
    with the prompts, divided by |m_c|: classes whose prompts disagree are raised.
    """
    return F.normalize(F.normalize(texts, dim=-1).mean(1), dim=-1)


def colour_prompts() -> tuple[
    Int[Tensor, "nouns_x_colours length"], Bool[Tensor, "nouns_x_colours length"]
]:
    """Captions "red apple", "blue apple", ...: every noun in every colour, the colours of a noun side by side."""
    nouns = torch.arange(len(NOUNS)).repeat_interleave(len(COLOURS))
    colours = torch.arange(len(COLOURS)).repeat(len(NOUNS))
    return caption_ids(colours[:, None], nouns[:, None])


def nouns_found(
    scores: Float[Tensor, "scenes classes"], nouns: Int[Tensor, "scenes objects"]
) -> float:
    """Per cent of a scene's nouns among as many classes of the highest scores as it has objects, mean over scenes.

    Args:
        nouns: the classes of a scene, each once; negative where there is no object.
    """
    there = nouns >= 0
    ranks = scores.argsort(1, descending=True).argsort(1).gather(1, nouns.clamp(min=0))
    found = (ranks < there.sum(1, keepdim=True)) & there
    return 100 * (found.sum(1) / there.sum(1)).double().mean().item()


@torch.no_grad()
def zero_shot(model: ImageTextModel, arm: str, scenes: AttributeScenes) -> dict[str, float]:
    """`nouns_found` with the nouns as classes, by what is made of a noun's prompts, one in each colour.

    "one prompt": the mean over colours of what one alone finds. "mean similarity": FILIP's ensemble. "mean
    vector": CLIP's, only for "global", where a text is one vector.
    """
    ids, mask = colour_prompts()
    device, compare = model.log_scale.device, ARMS[arm].test
    image = model.image_tokens(scenes.pixels.to(device)).cpu()
    text = model.text_tokens(ids.to(device)).cpu()
    scores = compare(image, text, mask)[0].unflatten(1, (len(NOUNS), len(COLOURS)))
    alone = [nouns_found(part, scenes.nouns) for part in scores.unbind(2)]
    found = {"one prompt": float(np.mean(alone))}
    found["mean similarity"] = nouns_found(prompt_ensemble(scores), scenes.nouns)
    if compare is global_similarity:
        vectors = prompt_vectors(last_words(text, mask).unflatten(0, (len(NOUNS), len(COLOURS))))
        found["mean vector"] = nouns_found(image[:, 0] @ vectors.T, scenes.nouns)
    return found
