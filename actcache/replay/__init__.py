"""Late stacks over stored rows: edits, copies for workers, and the replay itself."""
