"""Tasks answered by one label word, and what attention calibration does to their answers.

A language model continues a prompt; the answer is the label word with the largest logit at the last
token. Items of equal length form a batch, so nothing is padded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reattend.attention.dense import causal_token_mask
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod
from reattend.data.texts import TextSet
from reattend.evidence.intervals import mean
from reattend.long_context.act import SinkSurvey, attention_map, column_score, sinks


@dataclass(frozen=True)
class Item:
    """A prompt with its label words.

    Attributes:
        task: name of the task that it belongs to.
        tokens: the prompt.
        options: one token for each label word.
        answer: which of them is right.
        text: what the prompt is about, without its template; empty where there is none.
    """

    task: str
    tokens: list[int]
    options: list[int]
    answer: int
    text: str = ""


@dataclass(frozen=True)
class LabelTask:
    """A labelled set of texts asked as a prompt.

    Attributes:
        data: the texts.
        template: the prompt, with {} for the text.
        words: label word by class; texts of other classes are left out.
        window: shortest and longest prompt, in tokens.
        text_of: what of a text is put into the prompt.
    """

    data: TextSet
    template: str
    words: dict[str, str]
    window: Sequence[int]
    text_of: Callable[[str], str] = str


def first_sentence(article: str) -> str:
    """The sentence behind the headline, which is the first line of a news article."""
    body = re.sub(r"\s+", " ", article.partition("\n")[2]).strip()
    return re.split(r"(?<=[.!?])\s", body)[0]


def label_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The token of a label word.

    Raises:
        ValueError: when it is more than one token.
    """
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    if len(tokens) != 1:
        raise ValueError(f"label word {word!r} is {len(tokens)} tokens of this model")
    return tokens[0]


def class_items(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    task: LabelTask,
    split: str,
    count: int,
    window: Sequence[int] | None = None,
) -> list[Item]:
    """`count` items of one side of the data, classes in turn, with prompts of the task's lengths.

    Raises:
        ValueError: when there are too few of them.
    """
    low, high = window or task.window
    options = [label_token(tokenizer, word) for word in task.words.values()]
    names = list(task.words)
    found: dict[str, list[Item]] = {name: [] for name in names}
    each = -(-count // len(names))
    for text, label in zip(*task.data.of(split), strict=True):
        kind = task.data.classes[int(label)]
        if len(found.get(kind, range(each))) == each:
            continue
        text = task.text_of(text)
        tokens = tokenizer(task.template.format(text)).input_ids
        if low <= len(tokens) <= high:
            found[kind].append(Item(name, tokens, options, names.index(kind), text))
    in_turn = [item for row in zip(*found.values(), strict=False) for item in row][:count]
    if len(in_turn) < count:
        raise ValueError(
            f"{name}, {split}: only {len(in_turn)} balanced items of {low} to {high} tokens"
        )
    return in_turn


def next_word_items(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    context: int,
    count: int,
    seed: str,
) -> list[Item]:
    """The next word of a document among four; the other three are next words of other places.

    Args:
        context: tokens before the word.
        seed: the same seed gives the same items.
    """
    draw = random.Random(seed)
    encoded = [tokenizer(document).input_ids for document in documents]
    encoded = [tokens for tokens in encoded if len(tokens) > 2 * context]
    cuts: list[tuple[list[int], int]] = []
    while len(cuts) < count + 20:
        tokens = draw.choice(encoded)
        end = draw.randrange(context, len(tokens) - 1)
        word, after = tokenizer.decode([tokens[end]]), tokenizer.decode([tokens[end + 1]])
        if re.fullmatch(r" [a-z]{4,}", word) and not after[:1].isalpha():
            cuts.append((tokens[end - context : end], tokens[end]))
    items = []
    for tokens, right in cuts[:count]:
        options = draw.sample(sorted({word for _, word in cuts} - {right}), 3)
        answer = draw.randrange(4)
        options.insert(answer, right)
        items.append(Item("next word", tokens, options, answer))
    return items


def drawn_examples(pool: Iterable[Item], shots: int, draw: random.Random) -> list[Item]:
    """`shots` different items of a pool: its classes in turn, in random order, any item of a class."""
    classes: dict[int, list[Item]] = {}
    for item in pool:
        classes.setdefault(item.answer, []).append(item)
    order = draw.sample(sorted(classes), len(classes))
    shuffled = {name: draw.sample(classes[name], len(classes[name])) for name in order}
    return [shuffled[order[n % len(order)]][n // len(order)] for n in range(shots)]


def behind_examples(
    tokenizer: PreTrainedTokenizerBase, task: LabelTask, examples: Iterable[Item], item: Item
) -> Item:
    """An item of a task behind solved examples of it."""
    words = list(task.words.values())
    solved = [task.template.format(e.text) + words[e.answer] + "\n\n" for e in examples]
    tokens = tokenizer("".join(solved) + task.template.format(item.text)).input_ids
    return replace(item, tokens=tokens)


class Survey(SinkSurvey):
    """Keeps the mean map of each layer too, and column scores of maps shuffled within their rows."""

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.maps: dict[int, Tensor] = {}
        self.shuffled: dict[int, Tensor] = {}
        self.random = torch.Generator(device).manual_seed(seed)

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        """Dense attention."""
        weights = attention_map(query, key, scale)
        self.maps[layer] = weights.mean(dim=(0, 1)).cpu()
        self.shuffled[layer] = column_score(self.shuffle(weights)).cpu()
        return super().prefill(query, key, value, scale=scale, layer=layer, padding=padding)

    def shuffle(self, weights: Tensor) -> Tensor:
        """Every row with its entries 1 .. i in random order; the first one, and zeros behind i, stay."""
        order = torch.rand(weights.shape, generator=self.random, device=weights.device)
        order[..., 0] = -1
        order.masked_fill_(~causal_token_mask(*weights.shape[-2:], device=weights.device), 2)
        return weights.gather(-1, order.argsort(dim=-1))


@torch.inference_mode()
def run_layers(
    model: nn.Module,
    hidden: Float[Tensor, "batch tokens width"],
    start: int,
    keep: Iterable[int] = (),
) -> tuple[Float[Tensor, "batch vocabulary"], dict[int, Tensor]]:
    """Last-token logits from the hidden states that enter layer `start` of a Llama-like model.

    Returns:
        the logits, and the hidden states that enter the layers in `keep`.
    """
    base, kept = model.model, {}
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary = base.rotary_emb(hidden, positions)
    for number in range(start, len(base.layers)):
        if number in keep:
            kept[number] = hidden
        hidden = base.layers[number](
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotary,
            use_cache=False,
        )
    return model.lm_head(base.norm(hidden[:, -1])), kept


class Bank:
    """Items in batches of one length, with their dense answers.

    It keeps the hidden states that enter the layers `keep`, so that a method that changes nothing
    before one of them can start there.

    Attributes:
        items: as given.
        batches: places of the items of one length.
        dense: log-probabilities of the label words without any method, [items, most options].
        seen: column scores, those of shuffled maps and mean maps by batch, with a survey.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[Item],
        keep: Iterable[int],
        survey: Survey | None = None,
    ) -> None:
        self.model, self.items, self.seen = model, items, []
        most = max(len(item.options) for item in items)
        self.options = torch.tensor([i.options + [0] * (most - len(i.options)) for i in items])
        self.absent = torch.tensor([[n >= len(i.options) for n in range(most)] for i in items])
        self.answers = torch.tensor([item.answer for item in items])
        lengths = torch.tensor([len(item.tokens) for item in items])
        self.batches = [(lengths == n).nonzero().flatten() for n in lengths.unique().tolist()]
        self.hidden, self.dense = [], torch.zeros(len(items), most)
        for batch in self.batches:
            tokens = torch.tensor([items[i].tokens for i in batch.tolist()], device=model.device)
            with attach(model, survey or AttentionMethod()):
                logits, kept = run_layers(model, model.model.embed_tokens(tokens), 0, set(keep))
            self.hidden.append(kept)
            self.dense[batch] = self._restricted(logits, batch)
            if survey:
                shuffled = torch.stack([survey.shuffled[n] for n in sorted(survey.shuffled)], 1)
                self.seen.append((survey.stacked().cpu(), shuffled, dict(survey.maps)))

    def run(
        self, method: AttentionMethod, start: int, rows: Bool[Tensor, " items"] | None = None
    ) -> Float[Tensor, "items options"]:
        """`dense` with a method from layer `start` on; items outside `rows` keep their answers."""
        result = self.dense.clone()
        for batch, kept in zip(self.batches, self.hidden, strict=True):
            inside = torch.ones(len(batch), dtype=torch.bool) if rows is None else rows[batch]
            if inside.any():
                with attach(self.model, method):
                    hidden = kept[start][inside.to(self.model.device)]
                    logits, _ = run_layers(self.model, hidden, start)
                result[batch[inside]] = self._restricted(logits, batch[inside])
        return result

    def right(self, scores: Float[Tensor, "items options"]) -> Float[Tensor, " items"]:
        """1 for each right answer."""
        return (scores.argmax(dim=-1) == self.answers).double()

    def nll(self, scores: Float[Tensor, "items options"]) -> Float[Tensor, " items"]:
        """Negative log-probability of the right label word among the label words, nats."""
        return -scores.gather(1, self.answers[:, None])[:, 0].double()

    @property
    def chance(self) -> Float[Tensor, " items"]:
        """Probability of the right answer by guessing."""
        return 1 / (~self.absent).sum(dim=1).double()

    @property
    def over_chance(self) -> Float[np.ndarray, " items"]:
        """Right without any method minus the probability of a right guess, points."""
        return 100 * (self.right(self.dense) - self.chance).numpy()

    def against_dense(self, scores: Float[Tensor, "items options"]) -> dict[str, float]:
        """Accuracy in %, and mean changes of accuracy (points) and of `nll` against the dense answers."""
        nll = (self.nll(scores) - self.nll(self.dense)).numpy()
        right = 100 * (self.right(scores) - self.right(self.dense)).numpy()
        return {
            "accuracy": 100 * self.right(scores).mean().item(),
            "accuracy - dense": right.mean(),
            "NLL - dense, nats": nll.mean(),
            "standard error": nll.std(ddof=1) / np.sqrt(len(nll)),
        }

    def sink_flags(self, shuffled: bool = False, **settings) -> Bool[Tensor, "items layers heads"]:
        """Whether a prompt has a sink in a head; the settings are those of `sinks`."""
        layers, heads = self.seen[0][0].shape[1:3]
        flags = torch.zeros(len(self.items), layers, heads, dtype=torch.bool)
        for batch, found in zip(self.batches, self.seen, strict=True):
            flags[batch] = sinks(found[int(shuffled)], **settings).any(dim=-1)
        return flags

    def token_classes(
        self, tokenizer: PreTrainedTokenizerBase, layers: slice, **settings
    ) -> dict[str, tuple[float, float]]:
        """For each class of token: its share of the sinks and of the tokens behind the first, in %.

        Args:
            tokenizer: the model's.
            layers: whose heads count.
            settings: those of `sinks`.
        """
        counts = {name: np.zeros(2) for name in ("punctuation", "line break", "word", "last three")}
        for batch, found in zip(self.batches, self.seen, strict=True):
            often = sinks(found[0][:, layers], **settings).sum(dim=(1, 2))
            for i, row in zip(batch.tolist(), often.tolist(), strict=True):
                for k in range(1, len(row)):
                    text = tokenizer.decode([self.items[i].tokens[k]])
                    counts[_token_class(text, len(row) - 1 - k)] += (row[k], 1)
        total = np.maximum(sum(counts.values()), 1)
        return {name: tuple(100 * count / total) for name, count in counts.items()}

    def _restricted(self, logits: Tensor, batch: Tensor) -> Tensor:
        """Log-probabilities of the label words alone."""
        chosen = logits.float().cpu().gather(1, self.options[batch])
        return chosen.masked_fill(self.absent[batch], -torch.inf).log_softmax(dim=-1)


def extremes_on_other_half(
    changes: Float[np.ndarray, "heads items"], tail: int, half: Int[np.ndarray, " items"]
) -> tuple[Float[np.ndarray, " items"], Float[np.ndarray, " items"]]:
    """Mean change of the `tail` highest and of the `tail` lowest heads, ranked on the other half.

    Ranking and measuring on the same items finds extremes in noise; here each item is measured with
    the heads that the other half of the items (0 or 1) put first and last.
    """
    highest, lowest = np.zeros(len(half)), np.zeros(len(half))
    for side in (0, 1):
        ranked = changes[:, half != side].mean(axis=1).argsort(kind="stable")
        highest[half == side] = changes[np.ix_(ranked[-tail:], half == side)].mean(axis=0)
        lowest[half == side] = changes[np.ix_(ranked[:tail], half == side)].mean(axis=0)
    return highest, lowest


def held_out_mean(
    values: Float[np.ndarray, "lists items"], half: Int[np.ndarray, " items"]
) -> Float[np.ndarray, " items"]:
    """Mean over the lists of heads that were not chosen on the item.

        v_i = mean of values[s, i] over the lists s != half_i

    Args:
        values: what list s, chosen on half s, gives for every item.
        half: the half of an item; items of no half have another number, and all lists count.
    """
    own = half == np.arange(len(values))[:, None]
    return np.where(own, 0.0, values).sum(axis=0) / (~own).sum(axis=0)


def _token_class(text: str, behind: int) -> str:
    """Class of a token with its text and how many tokens stand behind it."""
    if behind < 3:
        return "last three"
    if "\n" in text:
        return "line break"
    return "word" if any(c.isalnum() for c in text) else "punctuation"


def sink_rates(
    model: nn.Module,
    prompts: Tensor,
    definitions: Mapping[str, Mapping[str, float]],
    layers: slice,
) -> dict[str, float]:
    """Share of the heads and prompts with a later sink, by each definition of a sink (settings of `sinks`)."""
    with torch.inference_mode(), attach(model, SinkSurvey()) as survey:
        model(prompts, logits_to_keep=1)
    scores = survey.stacked()[:, layers]
    return {
        name: sinks(scores, **settings).any(dim=-1).double().mean().item()
        for name, settings in definitions.items()
    }


def heads_to_search(
    order: Sequence[tuple[int, int]], layers: range, per_layer: int, count: int
) -> list[tuple[int, int]]:
    """The first `count` heads (layer, head) of `order` that lie in `layers`, at most `per_layer` of each layer."""
    found = []
    for layer, head in order:
        if layer in layers and sum(other == layer for other, _ in found) < per_layer:
            found.append((layer, head))
    return sorted(found[:count])


def flipped_means(
    changes: Float[np.ndarray, "heads items"], seed: int, draws: int = 2000
) -> Float[np.ndarray, "draws heads"]:
    """Mean changes of the heads by chance: the signs of an item's changes flipped, for all heads together."""
    signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, changes.shape[1]))
    return signs @ changes.T / changes.shape[1]


def heads_table(
    heads: Sequence[tuple[int, int]],
    rates: Float[Tensor, "layers all_heads"],
    changes: Float[np.ndarray, "heads items"],
    loss_changes: Float[np.ndarray, "heads items"],
    by_chance: Float[np.ndarray, " heads"],
    kept: Iterable[Iterable[tuple[int, int]]],
) -> pd.DataFrame:
    """What calibrating each head alone does, one row a head.

    Args:
        heads: (layer, head) of the rows.
        rates: share of the prompts in which a head has a sink.
        changes: of accuracy by item, points.
        loss_changes: of the right label's loss by item, nats.
        by_chance: standard deviation of the mean change of accuracy by chance, points.
        kept: the lists of heads that were chosen.
    """
    lists = [set(some) for some in kept]
    return pd.DataFrame(
        {
            "layer": [layer for layer, _ in heads],
            "head": [head for _, head in heads],
            "prompts with a sink, %": [100 * rates[head].item() for head in heads],
            "accuracy change, points": changes.mean(axis=1),
            "s.d. by chance": by_chance,
            "answers that changed to right or wrong, %": np.abs(changes).mean(axis=1),
            "NLL change, nats": loss_changes.mean(axis=1),
            "lists that keep it": [sum(head in some for some in lists) for head in heads],
        }
    )


def accuracy_table(
    groups: Mapping[tuple[str, int], Mapping[str, np.ndarray]], methods: Sequence[str]
) -> pd.DataFrame:
    """Accuracy by task and number of examples, and ACT's gain over dense attention with its 95 % interval.

    Args:
        groups: (task, examples) -> method -> 100 for each right answer, item by item.
        methods: the columns; empty where a group lacks one.
    """
    rows = []
    for (task, shots), found in groups.items():
        row = {"task": task, "examples": shots, "items": len(found["dense"])}
        row |= {name: found[name].mean() if name in found else None for name in methods}
        change = mean(found["ACT"] - found["dense"])
        rows.append(row | {"ACT - dense": change.effect, "low": change.low, "high": change.high})
    return pd.DataFrame(rows).sort_values(["examples", "task"], kind="stable")
