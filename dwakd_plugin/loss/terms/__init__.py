"""The sums of the objective: one file a term, or a pair of twin terms, with its equation."""

__all__: list[str] = []
