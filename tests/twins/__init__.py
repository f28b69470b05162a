"""The slow obvious twins: what every fast path must equal, computed by loops, hooks and NumPy."""
