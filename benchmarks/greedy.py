"""Compare the time of greedy removal with one Cholesky factorisation of the same order on random data.

Run `python benchmarks/greedy.py 1024 4096`.

Also one attention layer of 8 KV groups with 512 columns each. A second moment of order n in float64 takes 8 n^2 bytes, and
four such matrices are alive at once, two of them only to begin anew: 6.2 GiB at 14,336.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from hf_gqaprune.linalg.obs import remove_greedily
from hf_gqaprune.linalg.symmetric import invert_


def moments(order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """H and A of 2 x `order` random tokens and an eighth as many outputs as inputs, the ridge of 1 % included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * order, order, generator=generator, dtype=torch.float64)
    h = x.T @ x / len(x)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    weight = torch.randn(order // 8, order, generator=generator, dtype=torch.float64)
    return h, weight.T @ weight


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("orders", nargs="+", type=int, help="FFN widths")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--columns", type=int, default=512, help="o_proj columns of one KV group")
    args = parser.parse_args()
    print("| columns | units | Cholesky, s | inverse / Cholesky | greedy, s | greedy / Cholesky |\n|---:|---:|" + "---:|" * 4)
    cases = [(order, 1) for order in args.orders] + [(args.groups * args.columns, args.columns)]
    for order, width in cases:
        h, a = moments(order)
        columns = torch.arange(order).view(-1, width)
        repeats = 3 if order < 5000 else 1
        bare = seconds(lambda h=h: torch.linalg.cholesky(h), repeats)  # type: ignore[misc]
        inverse = seconds(lambda h=h: invert_(h.clone()), repeats)  # type: ignore[misc]
        greedy = seconds(lambda h=h, a=a, columns=columns: remove_greedily(h, a, columns), repeats)  # type: ignore[misc]
        cells = f"{order:,} | {len(columns):,} | {bare:.2f} | {inverse / bare:.1f} | {greedy:.2f} | {greedy / bare:.1f}"
        print(f"| {cells} |", flush=True)


if __name__ == "__main__":
    main()
