"""Sequences and events into a store: where checkpoints choose differently, and the states that lead there."""
