"""FILIP: fine-grained interactive language-image pre-training (arXiv 2111.07783).

A picture and a text are compared token by token: every patch looks for its best word and every word for its
best patch, and the similarity is the mean of what they find. No official code; the settings follow the
paper, and where it is silent Huawei's port (mindformers).

Names of shapes: `images`, `texts`, `patches` (without [CLS]), `words` (padded), `joint`. All tokens have
length 1, so that products are cosines.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.training.contrastive import symmetric_info_nce


def _masked_products(
    patches: Float[Tensor, "images patches joint"],
    words: Float[Tensor, "texts words joint"],
    mask: Bool[Tensor, "texts words"],
) -> Float[Tensor, "images patches texts words"]:
    """All cosines of these pictures and texts; minus infinity at padding."""
    products = torch.einsum("ipd,twd->iptw", patches, words)
    return products.masked_fill(~mask, -torch.inf)


def late_similarity(
    patches: Float[Tensor, "images patches joint"],
    words: Float[Tensor, "texts words joint"],
    mask: Bool[Tensor, "texts words"],
    *,
    chunk: int = 8,
    reduce: Literal["mean", "sum"] = "mean",
) -> tuple[Float[Tensor, "images texts"], Float[Tensor, "images texts"]]:
    """The two token-wise similarities of every picture with every text (section 3.1.1, equations 4 to 6).

    s^I_ij = mean over patches k of max over words r of v_k . t_r, and s^T_ij = mean over words r of
    max over patches k. Padding takes part in neither. The products are computed for `chunk` pictures at
    a time; a maximum keeps for its gradient where it was found and not the products, so that neither
    pass ever holds all of them.

    Args:
        mask: True for the words that take part.
        chunk: pictures at a time; the results do not depend on it.
        reduce: "sum" instead of the mean is ColBERT's form.

    Raises:
        ValueError: for a text without any word.
    """
    if not mask.any(1).all():
        raise ValueError(
            "a text has no word that takes part: mask must be True at least once a text"
        )
    counts = mask.sum(1) if reduce == "mean" else torch.ones_like(mask[:, 0])
    by_patches, by_words = [], []
    for part in patches.split(chunk):
        products = _masked_products(part, words, mask)
        of_patches, of_words = products.max(3).values, products.max(1).values
        by_patches.append(of_patches.mean(1) if reduce == "mean" else of_patches.sum(1))
        by_words.append(of_words.masked_fill(~mask, 0).sum(2) / counts)
    return torch.cat(by_patches), torch.cat(by_words)


def filip_loss(
    patches: Float[Tensor, "batch patches joint"],
    words: Float[Tensor, "batch words joint"],
    mask: Bool[Tensor, "batch words"],
    scale: Float[Tensor, ""],
    targets: Float[Tensor, "batch batch"] | None = None,
    *,
    chunk: int = 8,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE with s^I from picture to text and s^T from text to picture (equations 1 to 3).

    Args:
        scale: 1 / temperature.
        targets: as in `symmetric_info_nce`, where captions repeat in the batch.
    """
    by_patches, by_words = late_similarity(patches, words, mask, chunk=chunk)
    return symmetric_info_nce(scale * by_patches, scale * by_words, targets)


@torch.no_grad()
def telling_tokens(
    tokens: Float[Tensor, "samples tokens joint"],
    others: Float[Tensor, "samples others joint"],
    share: float,
    *,
    mask: Bool[Tensor, "samples tokens"] | None = None,
    other_mask: Bool[Tensor, "samples others"] | None = None,
    local: int | None = None,
) -> Int[Tensor, "samples kept"]:
    """Where the tokens of each sample lie that have the highest maximal cosine with the other modality.

    floor(share x tokens) of them, at least one, in their order; the earlier of equals. The other
    modality is that of the local batch, before batches of workers are gathered, and the choice has no
    gradient (section 3.1.2).

    Args:
        mask, other_mask: True for real tokens; padding is chosen last and never searched. All are real where
            not given.
        local: samples of one worker, among which is searched; None: all of them.

    Raises:
        ValueError: for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if other_mask is None:
        other_mask = torch.ones_like(others[..., 0], dtype=torch.bool)
    local = local or len(tokens)
    parts = zip(tokens.split(local), others.split(local), other_mask.split(local), strict=True)
    scores = torch.cat([_masked_products(*part).amax((2, 3)) for part in parts])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept = max(1, int(share * tokens.shape[1]))
    return order[:, :kept].sort(1).values


def gathered(
    tokens: Float[Tensor, "samples tokens joint"], kept: Int[Tensor, "samples kept"]
) -> Float[Tensor, "samples kept joint"]:
    """The tokens at the kept places; the gradient reaches them alone."""
    return tokens.take_along_dim(kept[..., None], dim=1)


def prompt_ensemble(
    similarities: Float[Tensor, "images classes prompts"],
) -> Float[Tensor, "images classes"]:
    """Mean similarity over the prompts of a class: scores are averaged, not embeddings (section 3.3)."""
    return similarities.mean(-1)


def best_words(
    patches: Float[Tensor, "pairs patches joint"],
    words: Float[Tensor, "pairs words joint"],
    mask: Bool[Tensor, "pairs words"],
) -> Int[Tensor, "pairs patches"]:
    """Which word each patch prefers, picture i with text i: the paper's word-patch alignment (figure 2)."""
    return (patches @ words.mT).masked_fill(~mask[:, None], -torch.inf).argmax(2)


def best_patches(
    patches: Float[Tensor, "pairs patches joint"], words: Float[Tensor, "pairs words joint"]
) -> Int[Tensor, "pairs words"]:
    """Which patch each word prefers, picture i with text i."""
    return (patches @ words.mT).argmax(1)
