"""Token-wise recompute: of what a block saves, some rows are swapped and the rest is rebuilt."""
