"""A causal language model taken apart: folder, tokenizer, blocks, readout, cost, and how sequences share forwards."""
