"""Prompts read with prefill methods, one tidy row each: answers, distance from dense answers, late prose, density."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod, BlockSparseMethod
from reattend.data.needles import NeedleSample
from reattend.evidence.intervals import mean
from reattend.studies.prefill import DenseMaps


class BFloat16Linear(nn.Module):
    """A linear layer without bias whose products take bfloat16 factors; float32 in and out."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return F.linear(x.bfloat16(), self.weight).float()


def bfloat16_layers(model: nn.Module) -> nn.Module:
    """The model with its layers' linear maps in bfloat16; attention, norms and logits stay in float32.

    Changes the model. Processors with matrix units for bfloat16 read a prompt in 0.6 of the time; answers
    move by 4e-5 nats (KL divergence) at SmolLM2.
    """
    for layer in model.model.layers:
        for part in layer.modules():
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear) and child.bias is None:
                    setattr(part, name, BFloat16Linear(child))
    return model


@dataclass(frozen=True)
class Answered:
    """One prompt read and answered.

    Attributes:
        log_probabilities: at the answer's tokens that count, [tokens, vocabulary].
        tokens: those tokens.
        prose_nll: of the prose in the last quarter of the prompt, nats.
    """

    log_probabilities: Tensor
    tokens: Tensor
    prose_nll: float

    def compared(self, dense: Answered) -> dict[str, float]:
        """Exact match (%), NLL and KL divergence from the dense answer (nats a token), NLL of the prose."""
        mine, true = self.log_probabilities, dense.log_probabilities
        return {
            "score": 100.0 * bool((mine.argmax(-1) == self.tokens).all()),
            "answer NLL": F.nll_loss(mine, self.tokens).item(),
            "answer KL": F.kl_div(mine, true, reduction="batchmean", log_target=True).item(),
            "prose NLL": self.prose_nll,
        }


@torch.inference_mode()
def answer(model: nn.Module, sample: NeedleSample, prefill: AbstractContextManager) -> Answered:
    """Reads a prompt inside the context `prefill` and decodes the given answer densely."""
    prompt, given = (torch.tensor(x, device=model.device) for x in (sample.prompt, sample.answer))
    scored = torch.tensor(sample.scored, device=model.device)
    late = torch.tensor(sample.late_prose(), device=model.device)
    # A token is predicted one position before it; the last position predicts the answer's first.
    asked = torch.cat([late - 1, late.new_tensor([len(prompt) - 1])])
    with prefill:
        read = model(prompt[None], use_cache=True, logits_to_keep=asked)
    logits = read.logits[0, -1:]
    if len(given) > 1:
        rest = model(given[None, :-1], past_key_values=read.past_key_values, use_cache=True)
        logits = torch.cat([logits, rest.logits[0]])
    prose_nll = F.cross_entropy(read.logits[0, :-1].float(), prompt[late]).item()
    return Answered(logits.float().log_softmax(-1)[scored], given[scored], prose_nll)


def with_intervals(values: pd.DataFrame) -> dict[str, float]:
    """Mean of each column with its 95 % interval, as "<column>", "<column>, low" and "<column>, high"."""
    row: dict[str, float] = {}
    for name in values:
        found = mean(values[name].to_numpy())
        row |= {name: found.effect, f"{name}, low": found.low, f"{name}, high": found.high}
    return row


class PromptReader:
    """Reads prompts with methods; the dense answers that all are compared with are kept.

    Attributes:
        rows: one a prompt and method: its labels, the values of `Answered.compared`, "density".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.rows = model, []
        self._dense: dict[tuple[int, ...], Answered] = {}

    def read(
        self,
        method: AttentionMethod | None,
        samples: Iterable[tuple[Mapping, NeedleSample]],
        after: Callable[[AttentionMethod], None] = lambda method: None,
        /,
        **labels: str,
    ) -> float:
        """Reads every sample with a method (None: densely) and keeps a row of each.

        Args:
            samples: (labels, sample).
            after: called with the method after each prompt.
            labels: of all rows.

        Returns:
            The mean density.
        """
        densities = []
        for where, sample in samples:
            dense = self._dense.get(sample.prompt)
            if dense is None:
                dense = self._dense[sample.prompt] = answer(self.model, sample, nullcontext())
            found, density = dense, 1.0
            if method is not None:
                method.clear()
                found = answer(self.model, sample, attach(self.model, method))
                density = method.density()
                after(method)
            row = {**labels, **where, **found.compared(dense), "density": density}
            self.rows.append(row)
            densities.append(density)
        return float(np.mean(densities))

    def frame(self) -> pd.DataFrame:
        """All rows so far."""
        return pd.DataFrame(self.rows)


class PromptMaps:
    """Dense maps of several prompts, on which equal densities are found."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], block_size: int) -> None:
        self.maps = [DenseMaps(model, prompt, block_size) for prompt in prompts]

    def density(self, method: BlockSparseMethod) -> float:
        """Mean over prompts, layers and heads."""
        return float(np.mean([one.density(method) for one in self.maps]))

    def covered(self, method: BlockSparseMethod) -> float:
        """Share of the attention mass of all queries on its blocks, mean over prompts."""
        return float(np.mean([one.covered(method) for one in self.maps]))

    def match(
        self, make: Callable[[int], BlockSparseMethod], target: float, most: int
    ) -> BlockSparseMethod:
        """`make(size)`, 1 <= size <= `most`, whose density is nearest to `target`; it has to rise with the size."""
        low, high = 1, most
        while high - low > 1:
            middle = (low + high) // 2
            above = self.density(make(middle)) >= target
            low, high = (low, middle) if above else (middle, high)
        return min((make(low), make(high)), key=lambda made: abs(self.density(made) - target))
