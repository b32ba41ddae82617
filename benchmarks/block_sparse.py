"""Times block_sparse_attention against torch's dense causal kernel, in interleaved paired rounds.

    python benchmarks/block_sparse.py --tokens 8192 --densities 0.05 0.1 0.25 0.5

A round times every case once; the ratio of a case is taken within its round, so that a busy machine
slows both sides. Before anything is timed, each case is checked against the dense reference at a
short length.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from reattend.attention.block_sparse import block_sparse_attention
from reattend.attention.blocks import (
    block_count,
    causal_block_mask,
    density,
    forced_blocks,
)


def random_blocks(heads: int, blocks: int, share: float, seed: int) -> torch.Tensor:
    """Random causal blocks, the diagonal and the sink: about `share` of the triangle."""
    generator = torch.Generator().manual_seed(seed)
    causal = causal_block_mask(blocks, blocks)
    forced = forced_blocks(blocks, blocks, sink=1)
    wanted = share * causal.sum() - forced.sum()
    probability = (wanted / (causal & ~forced).sum()).clamp(0, 1)
    chosen = torch.rand(1, heads, blocks, blocks, generator=generator) < probability
    return (chosen & causal) | forced


def check(
    backend: str, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuses to time a backend that disagrees with the reference."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 300, dim, dtype=dtype, device=device) for h in (4, 2, 2))
    blocks = random_blocks(4, block_count(300, block_size), 0.3, seed=0).to(device)
    outputs = [
        block_sparse_attention(query, key, value, blocks, block_size=block_size, backend=name)
        for name in (backend, "dense")
    ]
    torch.testing.assert_close(*outputs, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def seconds(function, device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=["gather", "flex"], default="gather")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    check(options.backend, options.block_size, options.dim, dtype, device)

    torch.manual_seed(0)
    heads = (options.heads, options.key_heads, options.key_heads)
    query, key, value = (
        torch.randn(1, h, options.tokens, options.dim, dtype=dtype, device=device) for h in heads
    )
    blocks = block_count(options.tokens, options.block_size)
    masks = [
        random_blocks(options.heads, blocks, share, seed=0).to(device)
        for share in options.densities
    ]

    def dense():
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def sparse(mask):
        block_sparse_attention(
            query, key, value, mask, block_size=options.block_size, backend=options.backend
        )

    ratios = [[] for _ in masks]
    dense_times = []
    with torch.no_grad():
        for round_number in range(options.rounds + 1):
            reference = seconds(dense, device)
            times = [seconds(lambda mask=mask: sparse(mask), device) for mask in masks]
            if round_number == 0:  # warm-up
                continue
            dense_times.append(reference)
            for ratio, taken in zip(ratios, times, strict=True):
                ratio.append(reference / taken)

    print(
        f"{options.tokens} tokens, {options.heads}/{options.key_heads} heads, dim {options.dim}, "
        f"blocks of {options.block_size}, {options.dtype}, {options.backend}, {device.type}, "
        f"{torch.get_num_threads()} threads, {options.rounds} paired rounds"
    )
    print(f"dense scaled_dot_product_attention: {1000 * statistics.median(dense_times):.1f} ms")
    print("density   ideal   speed-up [lowest, highest]   share of ideal")
    for mask, ratio in zip(masks, ratios, strict=True):
        measured = density(mask).mean().item()
        speed_up = statistics.median(ratio)
        print(
            f"{measured:7.3f} {1 / measured:6.1f}x {speed_up:9.2f}x "
            f"[{min(ratio):.2f}, {max(ratio):.2f}] {100 * speed_up * measured:12.0f} %"
        )


if __name__ == "__main__":
    main()
