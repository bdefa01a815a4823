"""Which rows of a pool to annotate next: `choose` reads the pool, `values` values rows, `shortlist` picks a batch."""
