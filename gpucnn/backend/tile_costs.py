"""What a block of each tile costs on a GPU: what `auto` chooses tiles and splits by.

The time of a block of m x n sums of k products, while `resident` of them share a multiprocessor, is

    m n (product * k + block)

counted in products of the largest tile of tensor cores: 0.77 ps of a multiprocessor of an H100.
"""
from __future__ import annotations

from typing import NamedTuple

# Products that a GPU does in the time in which it moves 4 bytes, without and with tensor cores.
PRODUCTS_A_WORD, TENSOR_PRODUCTS_A_WORD = 40, 300


class Cost(NamedTuple):
    """alone: what the first of the blocks that share a multiprocessor takes, where there are not
    enough to fill it, as a share of the time of all."""

    resident: int
    product: float
    block: float = 0
    alone: float = 1


def estimated(speed: float) -> Cost:
    """Where nothing was measured: of a tile that makes so many products in the time of one."""
    return Cost(2, 1 / speed)


# Fitted to what scripts/gpu_check.py measured on an H100 (sm_90) in float16, in the order of
# TENSOR_TILES, then WGMMA_TILES, of cuda_convolution.py: 65 forward passes and input gradients of
# the article's network, airbench94, ResNet-18 and ResNet-50 in all tiles, of which the choice by
# these costs takes 1.01 times the best on average. `resident` follows from registers and shared
# memory. wgmma doubles the rate of products, but a block of it begins and ends at higher cost, with
# none beside it to fill the gap: so it takes long sums.
MEASURED = (Cost(2, 1.00, 150, 0.6), Cost(3, 1.06, 200, 0.6), Cost(4, 1.20, 220, 0.6),
            Cost(4, 1.40, 240, 0.6), Cost(8, 2.60, 340, 0.6),
            Cost(1, 0.62, 425), Cost(1, 0.51, 300), Cost(2, 0.73, 390, 0.6))
# Weight gradients, of images of 28 pixels and more: in smaller ones the kernel was slower then than
# it is now. Both factors lie in columns, which slows wgmma down; an end costs little in long sums.
MEASURED_WEIGHT_GRADIENT = (
    Cost(2, 1.03, 0, 0.6), Cost(3, 1.30, 0, 0.6), Cost(4, 1.35, 0, 0.6),
    Cost(4, 1.65, 0, 0.6), Cost(8, 2.60, 0, 0.6),
    Cost(1, 1.10, 600), Cost(1, 0.77, 300), Cost(2, 1.45, 0, 0.6))


def time_of(cost: Cost, m: int, n: int, terms: int, blocks: int, processors: int) -> float:
    """Of so many blocks of m x n sums of `terms` products, shared out among the processors.

    They run in rounds of `resident`; a last round that is not full takes its share, but not less
    than `alone`.
    """
    rounds, rest = divmod(-(-blocks // processors), cost.resident)
    last = max(rest, cost.alone * cost.resident) if rest else 0
    return (rounds * cost.resident + last) * m * n * (cost.product * terms + cost.block)
