"""Times a model's prefill with methods attached that select everything, against it alone.

    python benchmarks/attach.py --tokens 2048

The model has the shape of SmolLM2-135M (9 query heads, 3 key heads, dimension 64) with fewer layers
and random weights. Interleaved paired rounds: the ratio of a case is taken within its round.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod


def smollm2_like(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=32768,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = smollm2_like(options.layers).to(device)
    tokens = torch.randint(0, 1024, (1, options.tokens), device=device)
    size = options.block_size
    methods = {
        "model alone": None,
        "dense": AttentionMethod(),
        "everything in the window": StreamingLLM(window=options.tokens, block_size=size),
        "everything in the top k": BlockTopK(k=options.tokens, block_size=size),
    }

    def seconds(method: AttentionMethod | None) -> float:
        with torch.no_grad(), nullcontext() if method is None else attach(model, method):
            start = time.perf_counter()
            model(tokens, logits_to_keep=1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

    times = {name: [] for name in methods}
    for round_number in range(options.rounds + 1):
        for name, method in methods.items():
            taken = seconds(method)
            if round_number:  # the first round warms up
                times[name].append(taken)

    alone = times.pop("model alone")
    print(
        f"{options.tokens} tokens, {options.layers} layers, blocks of {size}, {device.type}, "
        f"{torch.get_num_threads()} threads, {options.rounds} paired rounds; "
        f"model alone {1000 * statistics.median(alone):.0f} ms"
    )
    for name, taken in times.items():
        ratios = [ours / reference for ours, reference in zip(taken, alone, strict=True)]
        print(
            f"{name:26} {100 * (statistics.median(ratios) - 1):+5.1f} % "
            f"[{100 * (min(ratios) - 1):+.1f}, {100 * (max(ratios) - 1):+.1f}]"
        )


if __name__ == "__main__":
    main()
