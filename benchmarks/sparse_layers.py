"""Times sparse prefill inside the attention layer on real queries and keys, against dense SDPA.

    python benchmarks/sparse_layers.py --tokens 4096 --threads 2

SmolLM2 reads real prose once; the queries, keys and values of some layers are kept, and each method
is timed on them in interleaved paired rounds, its selection within it and apart. For every method
the setting of the largest measured density below `--density` is taken, layer by layer from a fixed
grid, since what a share of the mass costs differs between layers.
"""

import argparse
import statistics
import time

import torch

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.vertical_slash import VerticalSlash
from reattend.attention.dense import causal_sdpa
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod
from reattend.backbones.pretrained.smollm2 import load
from reattend.backbones.trained.dhsa import new_predictor
from reattend.data.long_tasks import prose_windows
from reattend.data.needles import Haystack
from reattend.data.prose import documents
from reattend.long_context.dhsa import DHSA, BoundaryPredictor
from reattend.long_context.flexprefill import FlexPrefill
from reattend.long_context.hip_attention import HiPAttention
from reattend.long_context.moa import MoA, Plan, Rule
from reattend.long_context.proxyattn import ProxyAttn
from reattend.timing import paired_ratio, paired_times

GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
SHARES = (0.02, 0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15)


class Keep(AttentionMethod):
    """Dense attention that keeps what some layers are called with."""

    def __init__(self, layers: list[int]) -> None:
        super().__init__()
        self.kept: dict[int, tuple] = {}
        self.layers = layers

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        if layer in self.layers:
            self.kept[layer] = (query, key, value, scale)
        return super().prefill(query, key, value, scale=scale, layer=layer, padding=padding)


def candidates(block_size: int, predictor: BoundaryPredictor) -> dict[str, list[AttentionMethod]]:
    """The settings of each method, sparse ones first."""
    forced = {"local": 2 * block_size, "sink": block_size, "instruction": 0}
    return {
        "DHSA": [
            DHSA(
                boundaries=predictor,
                budget=count * block_size,
                block_size=block_size,
                **forced,
            )
            for count in COUNTS
            if count >= 3
        ],
        "FlexPrefill": [
            FlexPrefill(gamma=gamma, min_budget=2 * block_size, block_size=block_size)
            for gamma in GAMMAS
        ],
        "ProxyAttn": [
            ProxyAttn(gamma=gamma, stride=2, min_budget=2 * block_size, block_size=block_size)
            for gamma in GAMMAS
        ],
        "HiP": [
            HiPAttention(
                k=count * block_size, window=2 * block_size, sink=block_size, dense_layers=0
            )
            for count in COUNTS
        ],
        "MoA": [MoA(plan=uneven_plan(share, block_size)) for share in SHARES],
        "vertical-slash": [
            VerticalSlash(verticals=count, slashes=count, block_size=block_size) for count in COUNTS
        ],
        "block top-k": [BlockTopK(k=count, block_size=block_size) for count in COUNTS],
    }


def uneven_plan(share: float, block_size: int) -> Plan:
    """Spans of an eighth, once and fifteen eighths a share of the prompt, for the three key heads."""
    rules = tuple(Rule(0, share * times) for times in (0.125, 1.0, 1.875))
    return Plan((rules,), block_size=block_size)


def densest(methods: list[AttentionMethod], tensors: tuple, limit: float):
    """The method of the largest measured density up to `limit`, and that density."""
    query, key, value, scale = tensors
    best = None
    for method in methods:
        method.clear()
        method.prefill(query, key, value, scale=scale, layer=0)
        if method.density() <= limit:
            best = method, method.density()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 15, 22, 29])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, tokenizer = load()
    predictor = new_predictor(model)  # untrained: weights do not change its time
    window = prose_windows(Haystack(tokenizer, documents("needles")), options.tokens, 1)
    keep = Keep(options.layers)
    with torch.no_grad(), attach(model, keep):
        model(window, logits_to_keep=1)

    print(
        f"{options.tokens} tokens of prose, blocks of {options.block_size}, {options.threads} "
        f"threads, {options.rounds} paired rounds: median [lowest, highest]"
    )
    for layer, tensors in keep.kept.items():
        for name, methods in candidates(options.block_size, predictor).items():
            found = densest(methods, tensors, options.density)
            if found is None:
                print(f"layer {layer:2} {name:15} no setting of at most {options.density:.0%}")
                continue
            print(f"layer {layer:2} {name:15} {report(*found, tensors, options.rounds)}")


@torch.no_grad()
def report(method: AttentionMethod, density: float, tensors: tuple, rounds: int) -> str:
    """Speed-up over dense SDPA, and the share of the method's own time that selection takes."""
    query, key, value, scale = tensors

    def dense():
        return causal_sdpa(query, key, value, scale=scale)

    def sparse():
        return method.prefill(query, key, value, scale=scale, layer=0)

    def select():
        if isinstance(method, DHSA):
            return method.tokens(query, key, scale=scale, layer=0)
        if isinstance(method, HiPAttention):
            return [method.select(query, key, part) for part in method.blocks(query, key)]
        return method.block_mask(query, key, scale=scale)

    settings = {"rounds": rounds, "clock": time.perf_counter}  # all threads are at work
    ratios = paired_ratio(dense, sparse, **settings)
    whole, selecting = paired_times(sparse, select, **settings)
    share = statistics.median(selecting / whole)
    return (
        f"density {density:.3f}  {statistics.median(ratios):.2f} x dense SDPA "
        f"[{min(ratios):.2f}, {max(ratios):.2f}]  selection {share:.0%} of it"
    )


if __name__ == "__main__":
    main()
