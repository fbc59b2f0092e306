"""The gradient norm of one large parameter: time and error against float64.

    python benchmarks/norm.py [--rounds 5] [--numbers 155000000]

155 million numbers are the embedding of Qwen3-0.6B. They are Gaussian with a few large ones among them, as gradients
are. Contenders take turns in one process, and each norm is read once before it is timed.
"""

from __future__ import annotations

import math
import time

from common import claim, main_of, parser_of, ratio, spread, write

OURS, BLOCKS, TORCH, WIDE = "kernel", "blocks", "get_total_norm", "vector_norm(dtype=float64)"


def main() -> None:
    parser = parser_of(__doc__, name="norm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--numbers", type=int, default=155_000_000)
    arguments = parser.parse_args()

    import torch

    from pertoken.kernels.ops import Kernels
    from pertoken.training.norms import total_norm
    from pertoken.training.parallel import World

    x = torch.randn(arguments.numbers, generator=torch.Generator().manual_seed(0))
    x[::1_000_003] *= 1e3
    exact = math.sqrt(math.fsum(float(block.double().square().sum()) for block in x.split(2**20)))
    kernels, world = Kernels(torch.float32), World()
    contenders = {
        OURS: lambda: total_norm([x], world, kernels),
        BLOCKS: lambda: total_norm([x], world),
        TORCH: lambda: float(torch.nn.utils.get_total_norm([x])),
        WIDE: lambda: float(torch.linalg.vector_norm(x, dtype=torch.float64)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    errors = {name: abs(norm() / exact - 1) for name, norm in contenders.items()}
    for _ in range(arguments.rounds):
        for name, norm in contenders.items():
            start = time.perf_counter()
            norm()
            seconds[name].append(time.perf_counter() - start)
    rows = [
        {"norm": name, "ms": spread([1e3 * s for s in seconds[name]]), "relative error": f"{errors[name]:.1e}"}
        for name in contenders
    ]
    write(
        arguments.out,
        "norm",
        title="Gradient norm",
        settings={"rounds": arguments.rounds, "numbers": arguments.numbers},
        rows=rows,
        claims=[
            claim("relative error of the gradient norm at 155 million numbers", errors[OURS], at_most=1e-7),
            claim(
                "time of the gradient norm over PyTorch's in float32, fastest rounds",
                ratio(min(seconds[OURS]), min(seconds[TORCH])),
                at_most=1.0,
            ),
        ],
    )


if __name__ == "__main__":
    main_of(main)
