"""Train a crosscoder from a store with SAELens: one dictionary of latents that writes into all checkpoints at once.

    pip install 'actcache[examples]'
    actcache demo --out RUN
    python examples/train_crosscoder.py RUN/store

A row of the store is the same token seen by every checkpoint. Their states side by side, ``[K * D]``, are what a TopK
SAE encodes and reconstructs, so each latent has a decoder vector a checkpoint; where one of these is much longer than
the others, the latent is that checkpoint's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install 'actcache[examples]'")

import actcache
from actcache.store.feed import ActivationBuffer, RowFeed


def main(argv: Sequence[str] | None = None) -> int:
    """Train and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--boundary", type=int, help="default: the store's first")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--k", type=int, default=16, help="latents active at a time")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-rows", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that read the store ahead")
    found = train(**vars(parser.parse_args(argv)))
    print(f"{found['rows']} rows of {' and '.join(found['labels'])}, {found['epochs']} epochs; on rows held out:")
    for what in ("loss", "explained_variance"):
        print(f"  {what.replace('_', ' '):20} {found[what][0]:10.3f} -> {found[what][1]:.3f}")
    print("share of a latent's decoder length, 5%, 50% and 95% of the latents:")
    for label, shares in found["decoder_shares"].items():
        print(f"  {label:20} {shares[0]:10.3f} {shares[1]:.3f} {shares[2]:.3f}")
    return 0


def train(
    store: Path, boundary: int | None, latents: int, k: int, steps: int, batch_rows: int, workers: int
) -> dict[str, Any]:
    """Train on the rows of all checkpoints at one boundary, but for every eighth sequence.

    Returns:
        ``loss`` (squared error a row) and ``explained_variance``, each before and after, on the sequences left out.
    """
    torch.manual_seed(0)
    opened = actcache.open_store(store)
    boundaries = opened.boundaries[:1] if boundary is None else [boundary]
    # Not a sequence's first position: its state is huge and much the same whatever the text, and would drown the rest.
    feed = RowFeed(
        opened,
        boundaries=boundaries,
        positions=lambda at: (at.position > 0) & (at.sequence % 8 > 0),
        batch_rows=batch_rows,
        drop_last=True,
    )
    held_out = RowFeed(opened, boundaries=boundaries, positions=lambda at: (at.position > 0) & (at.sequence % 8 == 0))
    check = next(ActivationBuffer(held_out, flatten=True))

    crosscoder = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=check.shape[1], d_sae=latents, k=k, normalize_activations="expected_average_only_in")
    )
    before = evaluate(crosscoder, check)
    config = SAETrainerConfig(
        total_training_samples=steps * batch_rows,
        train_batch_size_samples=batch_rows,
        lr=1e-3,
        lr_end=1e-4,
        lr_decay_steps=steps // 5,
        n_batches_for_norm_estimate=10,
    )
    SAETrainer(config, crosscoder, ActivationBuffer(feed, flatten=True, workers=workers)).fit()
    after = evaluate(crosscoder, check)

    # [latents, K * D] -> the length of each latent's decoder vector in each checkpoint
    lengths = crosscoder.W_dec.detach().unflatten(1, (len(feed.labels), -1)).norm(dim=2)
    shares = (lengths / lengths.sum(dim=1, keepdim=True)).quantile(torch.tensor([0.05, 0.5, 0.95]), dim=0)
    return {
        "rows": feed.chosen.n_rows,
        "labels": feed.labels,
        "epochs": feed.epoch + 1,
        "loss": (before[0], after[0]),
        "explained_variance": (before[1], after[1]),
        "decoder_shares": {label: shares[:, i].tolist() for i, label in enumerate(feed.labels)},
    }


@torch.no_grad()
def evaluate(crosscoder: TopKTrainingSAE, states: torch.Tensor) -> tuple[float, float]:
    """Squared error a row, and the share of the variance over rows that is explained."""
    error = (crosscoder(states) - states).square().sum(dim=1).mean()
    variance = (states - states.mean(dim=0)).square().sum(dim=1).mean()
    return float(error), float(1 - error / variance)


if __name__ == "__main__":
    sys.exit(main())
