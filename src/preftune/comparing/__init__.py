"""Several methods at the same budget: which one, and by how much."""
