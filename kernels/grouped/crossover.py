"""From how many ranks on the sorted path takes less time than the dense one: modelled, not measured."""

FLOPS_PER_BYTE = 184  # of an H200: 790 TFLOP/s in bf16 and 4.3 TB/s, both measured by others for large operands


def crossover(d: int, width: int, slots: int, rank: int, gates: int = 1) -> float:
    """The R = N r at which both paths take the same time forward, for K = ``slots`` experts per row and G ``gates``.

        dense     2 R (d + G D) FLOPs per token
        grouped   G 2 K r (d + D) FLOPs and G es (K d + (2 K + 2) D) bytes, es = 2: rows gathered, outputs of the
                  pairs written and read, base and y
        R* = G (184 (K d + (2 K + 2) D) + K r (d + D)) / (d + G D)

    d and D = ``width`` are the widths of the layer's input and output. Tokens do not matter, so a token's bits do not
    depend on the batch.
    """
    moved = FLOPS_PER_BYTE * (slots * d + (2 * slots + 2) * width)
    multiplied = slots * rank * (d + width)
    return gates * (moved + multiplied) / (d + gates * width)


def is_grouped(ranks: int, d: int, width: int, slots: int, rank: int, gates: int = 1) -> bool:
    """Whether a pool of R = ``ranks`` is computed by the sorted path."""
    return ranks > crossover(d, width, slots, rank, gates)
