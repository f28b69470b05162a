"""Sparse features of the final blocks' MLP outputs: trained, checked, ranked and edited, one file per step."""
