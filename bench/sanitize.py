"""One forward and backward pass of every kernel at small shapes, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize

Without the caching allocator every tensor is an allocation of its own, so that one byte beyond it is found.
"""

import torch

from kernels import Gating, TaskSegments, lora_moe

# Ragged on purpose: no task, width or pool fills its tiles, and one task has no tokens.
COUNTS, WIDTHS = (70, 0, 1, 129), (40, 72)
CASES = [
    (Gating("ase", 3, 1), 16, 4, torch.float16),
    (Gating("ase", 3, 1), 16, 4, torch.float32),
    (Gating("naive-shared", 2, 2), 6, 8, torch.float16),
]


def run(gating: Gating, experts: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """A pass through the operation with gradients of every input."""
    (d, out), tokens, ranks = WIDTHS, sum(COUNTS), experts * rank
    shapes = [(tokens, d), (tokens, out), (ranks, d), (out, ranks)]
    x, base, a, b = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    routers = torch.randn(len(COUNTS), gating.router_columns(experts), d, device=device, requires_grad=True)
    y, _, p = lora_moe(x, base, (a, b), routers, TaskSegments.of(COUNTS, device), gating, kernel="triton")
    (y.float().square().mean() + p.square().sum()).backward()
    if not all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (x, base, a, b, routers)):
        raise SystemExit(f"gradients of {gating} in {dtype} are not finite")


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in CASES:
        run(*case, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(CASES)} passes on {device}")


if __name__ == "__main__":
    main()
