"""Several ways of training on the same data, side by side: arms, their figures, the report."""
