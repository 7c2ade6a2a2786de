"""The union of the inputs that are active in some row of a batch."""

# Where more of the inputs than this are expected to be active in some row of the batch, decode is exact. Measured on
# two cores at 4096 x 4096 in bf16, batch 2 to 8: a union of 85 % is 1.9 to 2.0 times as fast as torch's product, the
# exact product of columns 1.5 to 1.6 times.
UNION_PAYS_UP_TO = 0.85


def largest_union(sparsity: float, max_batch: int) -> int:
    """The largest batch up to `max_batch` whose union of active inputs is worth computing, if rows were active
    independently (related rows overlap more)."""
    paying = [batch for batch in range(2, max_batch + 1) if 1 - sparsity**batch <= UNION_PAYS_UP_TO]
    return max(paying, default=1)
