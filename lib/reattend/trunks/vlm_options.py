"""Multiple choice for `reattend.trunks.vlm`: which of some given answers a model finds likeliest, by letter.

The model is never shown the letters: every option's own words are scored as the answer to the question, so that
neither the order of the options nor a liking for one letter can bear on the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reattend.trunks.vlm import (
    NO_PATCH,
    BeforeLayer,
    LayerCache,
    Prompt,
    VisionLanguageModel,
    last_asked,
)

Option = Sequence[int]
"""The words of one answer, by number."""


@dataclass(frozen=True)
class Choices:
    """What a model chooses among the same options after each prompt.

    Attributes:
        scores: of the options, in the order in which they were given; see `choose`.
        best: place of the chosen one.
    """

    scores: Float[Tensor, "batch options"]
    best: Int[Tensor, " batch"]

    @property
    def letters(self) -> list[str]:
        """A for the first option, B for the second, ..."""
        return [ascii_uppercase[place] for place in self.best.tolist()]


@torch.no_grad()
def choose(
    model: VisionLanguageModel,
    prompt: Prompt,
    options: Sequence[Option],
    *,
    per_word: bool = True,
    before_layer: BeforeLayer | None = None,
) -> Choices:
    """The likeliest of the options A, B, C, ... as the answer to each prompt (of one question each).

    The score of an option w_1 .. w_n is the mean of log p(w_i | prompt, w_1 .. w_(i-1)) over its words, in nats:
    options of several words have no handicap against short ones. No end of the answer is scored, so an option that
    begins with another one may score higher than it. Of equal scores the option with the smaller word numbers wins,
    wherever it stands.

    Args:
        per_word: False: the sum over the words, the log-probability of the whole answer; each further word costs.
        before_layer: works on the prompt alone, as in `generate`.

    Raises:
        ValueError: when a prompt does not ask exactly one question, there are fewer than two or more than 26 options,
            one is empty, or two are the same.
    """
    if (prompt.asked.sum(1) != 1).any():
        raise ValueError("options are scored after prompts of one question each")
    words = [tuple(option) for option in options]
    if not 2 <= len(words) <= len(ascii_uppercase):
        raise ValueError(f"give 2 to {len(ascii_uppercase)} options, not {len(words)}")
    if not all(words) or len(set(words)) < len(words):
        raise ValueError(f"every option needs words of its own, got {[list(w) for w in words]}")
    cache: dict[int, LayerCache] = {}
    first = model.answers(model.read(prompt, cache=cache, before_layer=before_layer))
    found = [_log_probabilities(model, prompt, cache, first, option) for option in words]
    scores = torch.stack([f.mean(1) if per_word else f.sum(1) for f in found], 1)
    order = sorted(range(len(words)), key=words.__getitem__)
    return Choices(scores, torch.tensor(order)[scores[:, order].argmax(1).cpu()])


def _log_probabilities(
    model: VisionLanguageModel,
    prompt: Prompt,
    cache: dict[int, LayerCache],
    first: Float[Tensor, "batch vocabulary"],
    option: Option,
) -> Float[Tensor, "batch words"]:
    """Of every word of an option, given the prompt and the words before it."""
    said = torch.tensor(option, device=prompt.states.device).expand(len(prompt.states), -1)
    scores = first[:, None]
    if len(option) > 1:
        end, given = last_asked(prompt), said[:, :-1]
        steps = torch.arange(1, len(option), device=said.device)
        further = Prompt(
            model.words(given),
            prompt.positions.gather(1, end) + steps,
            prompt.segments.gather(1, end).expand_as(given),
            torch.full_like(given, NO_PATCH),
            torch.ones_like(given, dtype=torch.bool),
        )
        read = model.read(further, cache=dict(cache))  # options do not see each other
        scores = torch.cat([scores, model.answers(read).unflatten(0, given.shape)], 1)
    return scores.log_softmax(-1).gather(2, said[..., None])[..., 0]
