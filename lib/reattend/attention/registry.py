"""The attention methods that can be attached to a model: names, papers, and where each one lives.

Methods are named by "module:Class" and imported when asked for, so that attaching one method does
not import the others.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from reattend.attention.method import AttentionMethod, Budget, Phase


class Registered(NamedTuple):
    """Where a method lives and where it comes from.

    Attributes:
        path: "module:Class".
        phase: what it makes sparse; the other one it reads densely.
        title: what it does, in a few words.
        paper: authors, venue and arXiv number; empty for what needs no citation.
        needs: settings that have no default, and conditions on the model.
    """

    path: str
    phase: Phase
    title: str
    paper: str = ""
    needs: str = ""


# How a setting that is a budget is annotated; as text under postponed annotations.
_BUDGETS = (Budget, Budget | None, "Budget", "Budget | None")

_BASELINES = "reattend.attention.baselines"
_PAPERS = "reattend.long_context"

METHODS = {
    "dense": Registered(
        "reattend.attention.method:AttentionMethod",
        "prefill",
        "dense attention, counted like the others",
    ),
    "flexprefill": Registered(
        f"{_PAPERS}.flexprefill:FlexPrefill",
        "prefill",
        "a pattern and a budget for each head and input",
        "Lai et al., ICLR 2025, arXiv 2502.20766",
    ),
    "seer_attention": Registered(
        f"{_PAPERS}.seer_attention:SeerAttention",
        "prefill",
        "blocks chosen by small trained gates",
        "Gao et al., NeurIPS 2025, arXiv 2410.13276",
        "gates trained for the model; one of density, k, threshold; rotary embedding as in Llama; "
        "position_ids with padding on the left",
    ),
    "hip_attention": Registered(
        f"{_PAPERS}.hip_attention:HiPAttention",
        "prefill",
        "keys of large score, found by a tree search for each head and block of queries",
        "Lee et al., ICLR 2025, arXiv 2406.09827",
    ),
    "proxyattn": Registered(
        f"{_PAPERS}.proxyattn:ProxyAttn",
        "prefill",
        "blocks ranked by proxy heads, a budget for each head",
        "Wang et al., ICLR 2026, arXiv 2509.24745",
        "groups must divide the number of key heads",
    ),
    "dhsa": Registered(
        f"{_PAPERS}.dhsa:DHSA",
        "prefill",
        "keys in chunks of varying length, one selection for all heads of a layer",
        "Xiong et al., 2025, arXiv 2510.24606",
        "boundaries from a predictor trained for the model; without one, from jumps between keys",
    ),
    "moa": Registered(
        f"{_PAPERS}.moa:MoA",
        "prefill",
        "sinks and a window of its own for each head, in the prompt and behind it",
        "Fu et al., 2024, arXiv 2406.14909",
        "a plan made for the model (`reattend.long_context.moa.Plan`), or its json file",
    ),
    "streaming_llm": Registered(
        f"{_BASELINES}.streaming_llm:StreamingLLM",
        "prefill",
        "the first tokens and a window",
        "Xiao et al., ICLR 2024, arXiv 2309.17453",
    ),
    "vertical_slash": Registered(
        f"{_BASELINES}.vertical_slash:VerticalSlash",
        "prefill",
        "fixed numbers of block columns and diagonals",
        "Jiang et al. (MInference), NeurIPS 2024, arXiv 2407.02490",
    ),
    "vertical_slash_tokens": Registered(
        f"{_PAPERS}.sparse_frontier:VerticalSlashTokens",
        "prefill",
        "fixed numbers of token columns and diagonals",
        "Nawrot et al. (Sparse Frontier), 2025, arXiv 2504.17768",
    ),
    "flex_vertical_slash": Registered(
        f"{_PAPERS}.sparse_frontier:FlexVerticalSlash",
        "prefill",
        "token columns and diagonals that cover a share of the mass",
        "Nawrot et al. (Sparse Frontier), 2025, arXiv 2504.17768",
    ),
    "block_topk": Registered(
        f"{_BASELINES}.block_topk:BlockTopK",
        "prefill",
        "blocks whose mean key fits the mean query best",
        "Lu et al. (MoBA), 2025, arXiv 2502.13189",
    ),
    "antidiagonal": Registered(
        f"{_BASELINES}.antidiagonal:Antidiagonal",
        "prefill",
        "blocks of largest sums along antidiagonals",
        "Xu et al. (XAttention), ICML 2025, arXiv 2503.16428",
        "k or mass; mass = 0.9 where neither is given",
    ),
    "oracle_topk": Registered(
        f"{_BASELINES}.block_topk:OracleTopK",
        "prefill",
        "blocks of largest true mass: an upper bound that saves nothing",
        needs="k or mass; k = 16 where neither is given",
    ),
    "act": Registered(
        f"{_PAPERS}.act:ACT",
        "prefill",
        "weakens attention sinks; saves nothing",
        "Yu et al., ICML 2024, arXiv 2406.15765",
        "the heads to calibrate; every head where none are given",
    ),
    "quest": Registered(
        f"{_BASELINES}.quest:Quest",
        "decode",
        "pages of the cache whose keys could score highest",
        "Tang et al., ICML 2024, arXiv 2406.10774",
    ),
    "snapkv": Registered(
        f"{_BASELINES}.snapkv:SnapKV",
        "decode",
        "entries that the end of the prompt attends to",
        "Li et al., NeurIPS 2024, arXiv 2404.14469",
    ),
    "ada_snapkv": Registered(
        f"{_BASELINES}.snapkv:AdaSnapKV",
        "decode",
        "the same, with capacity moved between heads",
        "Feng et al. (Ada-KV), 2024, arXiv 2407.11550",
    ),
    "h2o": Registered(
        f"{_BASELINES}.h2o:H2O",
        "decode",
        "entries that received most attention, and recent ones",
        "Zhang et al., NeurIPS 2023, arXiv 2306.14048",
    ),
    "recycled_attention": Registered(
        f"{_PAPERS}.recycled_attention:RecycledAttention",
        "decode",
        "what an earlier token attended to, renewed by full steps",
        "Xu et al., 2024, arXiv 2411.05787",
    ),
    "hip_decoding": Registered(
        f"{_PAPERS}.hip_attention:HiPDecoding",
        "decode",
        "the same search for each new token, or for every few",
        "Lee et al., ICLR 2025, arXiv 2406.09827",
    ),
    "selective_v": Registered(
        "reattend.language_modeling.sigma:SelectiveV",
        "decode",
        "all keys, and the values of the largest weights",
        "Lin et al. (Sigma), 2025, arXiv 2501.13629",
    ),
    "streaming_cache": Registered(
        f"{_BASELINES}.cache_bounds:StreamingCache",
        "decode",
        "the first entries and the most recent ones",
        "Xiao et al., ICLR 2024, arXiv 2309.17453",
    ),
    "oracle_cache": Registered(
        f"{_BASELINES}.cache_bounds:OracleCache",
        "decode",
        "entries of largest true weight: an upper bound",
    ),
}


@dataclass(frozen=True)
class Described:
    """One line of the table of methods.

    Attributes:
        name: what `attach` calls it.
        phase: what it makes sparse: "prefill" (the prompt) or "decode" (new tokens).
        title, paper, needs: see `Registered`.
        source: file of the method, from the library's root.
        settings: every setting with its default; `inspect.Parameter.empty` where it has none.
        budgets: settings that take a number or, as a float, a share.
        saves_from: least tokens of a prompt from which it saves with the defaults; None where it
            never does, or cannot be built from defaults.
    """

    name: str
    phase: Phase
    title: str
    paper: str
    needs: str
    source: str
    settings: dict[str, Any]
    budgets: tuple[str, ...]
    saves_from: int | None


def methods() -> list[Described]:
    """All methods, those for prompts first: what README and the site print."""
    return [_described(name, entry) for name, entry in METHODS.items()]


def table() -> str:
    """The methods as a table in Markdown; `reattend report` fills in the last column."""
    phases = {"prefill": "prompt", "decode": "new tokens"}
    lines = [
        "| method | makes sparse | keeps | paper | settings (*: a number, or a share as a float) "
        "| saves from | needs | claims |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in methods():
        settings = ", ".join(
            f"{key}{'*' if key in entry.budgets else ''}"
            + ("" if default is inspect.Parameter.empty else f" = {default}")
            for key, default in entry.settings.items()
            if key != "backend"
        )
        saves = "" if entry.saves_from is None else f"{entry.saves_from:,} tokens"
        cells = [
            f"[{entry.name}]({entry.source})",
            phases[entry.phase],
            entry.title,
            entry.paper,
            settings,
            saves,
            entry.needs,
            "",
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def build_method(name: str, **settings) -> AttentionMethod:
    """Builds the method called `name` with its keyword settings.

    Raises:
        ValueError: the name is unknown, or a setting has a wrong value.
        TypeError: the method has no such setting, or needs one that is not given.
    """
    if name not in METHODS:
        raise ValueError(f"unknown attention method {name!r}; known: {', '.join(sorted(METHODS))}")
    method_class = _imported(METHODS[name])
    known = inspect.signature(method_class).parameters
    wrong = sorted(set(settings) - set(known))
    if wrong:
        settings_known = ", ".join(known) or "none"
        raise TypeError(f"{name} has no setting {', '.join(wrong)}; it has: {settings_known}")
    missing = [key for key in _without_default(known) if key not in settings]
    if missing:
        raise TypeError(f"{name} needs {', '.join(missing)} ({METHODS[name].needs})")
    return method_class(**settings)


def _described(name: str, entry: Registered) -> Described:
    method_class = _imported(entry)
    known = inspect.signature(method_class).parameters
    buildable = not _without_default(known)
    module = entry.path.split(":")[0]
    return Described(
        name=name,
        phase=entry.phase,
        title=entry.title,
        paper=entry.paper,
        needs=entry.needs,
        source=f"lib/{module.replace('.', '/')}.py",
        settings={key: parameter.default for key, parameter in known.items()},
        budgets=tuple(key for key, p in known.items() if p.annotation in _BUDGETS),
        saves_from=method_class().saves_from(entry.phase) if buildable else None,
    )


def _imported(entry: Registered) -> Callable[..., AttentionMethod]:
    module, class_name = entry.path.split(":")
    return getattr(importlib.import_module(module), class_name)


def _without_default(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [key for key, p in parameters.items() if p.default is inspect.Parameter.empty]
