"""Training of one block's crosscoder, by the rules of arXiv 2605.07284 (exp34): steps, files to resume from, the end.

    f = BatchTopK(ReLU(sum over m of (x_m - mean_m) E_m + b_enc)), chosen by f * (sum over m of |D_m|)
    loss = MSE(x, f D + b) + aux_weight * MSE(x - (f D + b), what dead features make of it)

After every step, the decoder rows of a feature over all branches together have norm 1. The threshold of inference is
the mean cutoff of some batches at the end.

The classes of SAELens do not serve. Their BatchTopK scores by the norm of the whole decoder row, keeps k fixed, and
takes the threshold as a moving average. Knows feeds and tensors; knows no runs.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from actcache import sealed
from actcache.analyses.features.batch_topk import batch_topk, cutoff
from actcache.analyses.features.crosscoder import (
    Crosscoder,
    decoder_scale,
    raw_activations,
    read_tensors,
    reconstructed,
    write_tensors,
)
from actcache.errors import CorruptFileError, InputError, NotFiniteError
from actcache.files import make_folder, write_atomically
from actcache.progress import Told, nobody_told
from actcache.store.feed import RowFeed

STATE = "training.json"
_TENSORS = re.compile(r"training-[0-9]+\.safetensors")
_DRAFT = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # of a file here, by a training that was killed
_LEARNED = ("encoder", "b_enc", "decoder", "b_dec")
_N_LOGGED = 200  # rows of the log of a whole training, about


@dataclass(frozen=True)
class Recipe:
    """Every number of a training.

    Attributes:
        n_features: F.
        k: features per row, on average, at the end.
        k_start: at the beginning.
        anneal_steps: over which ``k_start`` becomes ``k``, by equal steps.
        steps: of the optimiser.
        learning_rate: of Adam.
        warmup_steps: over which it grows from 0.
        clip: norm of the gradient, at most.
        aux_k: dead features per row that the auxiliary loss takes, at most.
        aux_weight: of the auxiliary loss.
        dead_steps: a feature is dead that was off for so many.
        threshold_batches: whose cutoffs the threshold is the mean of.
        mean_batches: which the mean is subtracted of.
        init_norm: of the decoder rows of each branch, before the first step.
        seed: of the weights at the beginning.
    """

    n_features: int
    k: int
    k_start: int
    anneal_steps: int
    steps: int
    learning_rate: float
    warmup_steps: int
    clip: float
    aux_k: int
    aux_weight: float
    dead_steps: int
    threshold_batches: int
    mean_batches: int
    init_norm: float
    seed: int

    def k_at(self, step: int) -> int:
        """Features per row at a step, counted from 0."""
        share = min(1.0, step / self.anneal_steps) if self.anneal_steps else 1.0
        return round(self.k_start + (self.k - self.k_start) * share)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps if self.warmup_steps else 1.0)


class Trainer:
    """One training, from nothing or from where its files were left.

    Attributes:
        log: some steps, as plain values.
        step: how many are done.
    """

    def __init__(self, feed: RowFeed, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        """Begin.

        Args:
            feed: rows of one block, of all branches; with ``drop_last``, so that every batch is whole.
            recipe: what to do.
            device: where to.

        Raises:
            InputError: the feed has no batch in an epoch, or rows of several blocks.
        """
        if not len(feed):
            raise InputError(
                f"the corpus has {feed.chosen.n_rows:,} rows to train on, and a batch is of {feed.batch_rows:,}: give "
                "a smaller --batch, or capture more texts"
            )
        (self.block,) = feed.boundaries
        self.feed, self.recipe, self.device = feed, recipe, torch.device(device)
        n_labels, width = len(feed.labels), feed.chosen.store.width
        draw = torch.Generator().manual_seed(recipe.seed)
        rows = F.normalize(torch.randn(recipe.n_features, width, generator=draw), dim=1) * recipe.init_norm
        decoder = rows[:, None].expand(-1, n_labels, -1)
        self.mean = self._mean_of_rows()
        made = {
            "encoder": decoder.permute(1, 2, 0),
            "b_enc": torch.zeros(recipe.n_features),
            "decoder": decoder,
            "b_dec": self.mean,
        }
        self._learned = {name: made[name].to(self.device).contiguous().clone().requires_grad_() for name in _LEARNED}
        self._optimiser = torch.optim.Adam(list(self._learned.values()), lr=recipe.learning_rate)
        self._off = torch.zeros(recipe.n_features, dtype=torch.int64, device=self.device)  # steps since it was on
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self._rows = self._endless()

    # ---- steps ----

    def run(self, folder: Path, save_every: int, told: Told = nobody_told) -> Crosscoder:
        """Take the steps that are left, then the threshold; what is done is saved into the folder on the way.

        Args:
            folder: of the crosscoder.
            save_every: steps between two saves.
            told: hears of steps.

        Raises:
            NotFiniteError: the loss is not finite.
        """
        while self.step < self.recipe.steps:
            self._take_step(next(self._rows))
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.save(folder)
            told(1, doing=self._said())
        return Crosscoder(
            labels=tuple(self.feed.labels),
            block=self.block,
            **{name: tensor.detach() for name, tensor in self._learned.items()},
            mean=self.mean,
            threshold=self._threshold(),
            k=self.recipe.k,
        )

    def _take_step(self, rows: torch.Tensor) -> None:
        recipe, step = self.recipe, self.step
        encoder, b_enc, decoder, b_dec = self._learned.values()
        raw = raw_activations(rows - self.mean, encoder, b_enc)
        with torch.no_grad():
            kept = batch_topk(raw * decoder_scale(decoder), recipe.k_at(step))
            dead = self._off >= recipe.dead_steps
        features = raw * kept
        found = reconstructed(features, decoder, b_dec)
        loss = F.mse_loss(found, rows)
        aux = self._aux_loss(raw, dead, (rows - found).detach())
        for group in self._optimiser.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        self._optimiser.zero_grad()
        (loss + recipe.aux_weight * aux).backward()
        torch.nn.utils.clip_grad_norm_(list(self._learned.values()), recipe.clip)
        self._optimiser.step()
        with torch.no_grad():
            decoder /= decoder.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
            self._off = torch.where(kept.any(dim=0), 0, self._off + 1)
        self.step += 1
        if step % max(1, recipe.steps // _N_LOGGED) == 0 or self.step == recipe.steps:
            self._put_down(rows, found.detach(), float(loss.detach()), float(aux.detach()), kept, dead)

    def _aux_loss(self, raw: torch.Tensor, dead: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """How badly the strongest dead features of each row make up for what is left of it."""
        n_dead = int(dead.sum())
        if not n_dead:
            return raw.new_zeros(())
        of_dead = raw[:, dead]
        values, at = of_dead.topk(min(self.recipe.aux_k, n_dead), dim=1)
        features = torch.zeros_like(of_dead).scatter(1, at, values)
        decoder = self._learned["decoder"][dead]
        return F.mse_loss((features @ decoder.flatten(1)).view_as(left), left)

    def _put_down(
        self, rows: torch.Tensor, found: torch.Tensor, loss: float, aux: float, kept: torch.Tensor, dead: torch.Tensor
    ) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            raise NotFiniteError(
                f"block {self.block}: the loss is {loss} at step {self.step}: its rows are not finite, or the learning "
                f"rate {self.recipe.learning_rate:g} is too high"
            )
        left = (rows - found).square().sum(dim=(0, 2))
        whole = (rows - rows.mean(dim=0)).square().sum(dim=(0, 2))
        explained = torch.where(whole > 0, 1 - left / whole, 0.0).tolist()  # of rows that are all equal, nothing
        self.log.append(
            {
                "block": self.block,
                "step": self.step,
                "loss": loss,
                "aux_loss": aux,
                "k": self.recipe.k_at(self.step - 1),
                "l0": float(kept.sum()) / len(rows),
                "dead": float(dead.float().mean()),
                **{f"ve_{label}": value for label, value in zip(self.feed.labels, explained, strict=True)},
            }
        )

    def _said(self) -> str:
        last = self.log[-1]
        explained = ", ".join(f"{label} {last[f've_{label}']:.1%}" for label in self.feed.labels)
        return (
            f"block {self.block}: loss {last['loss']:.4g}, variance explained of {explained}, L0 {last['l0']:.1f}, "
            f"dead {last['dead']:.1%}"
        )

    @torch.no_grad()
    def _threshold(self) -> float:
        """The mean cutoff of batches that no step has seen."""
        encoder, b_enc, decoder, _ = self._learned.values()
        scale, cutoffs = decoder_scale(decoder), []
        for rows in itertools.islice(self._rows, self.recipe.threshold_batches):
            scores = raw_activations(rows - self.mean, encoder, b_enc) * scale
            cutoffs.append(cutoff(scores, batch_topk(scores, self.recipe.k)))
        return sum(cutoffs) / len(cutoffs)

    # ---- rows ----

    def _endless(self) -> Iterator[torch.Tensor]:
        """Batches ``[n, K, D]``, one epoch after another."""
        while True:
            for batch in self.feed.batches():
                yield batch.states[:, :, 0].to(self.device).float()
            self.feed.set_epoch(self.feed.epoch + 1)

    def _mean_of_rows(self) -> torch.Tensor:
        """Of the first batches, which training sees again."""
        batches = itertools.islice(self.feed.batches(), self.recipe.mean_batches)
        found = torch.stack([batch.states[:, :, 0].double().mean(dim=0) for batch in batches])
        return found.mean(dim=0).float().to(self.device)

    # ---- files ----

    @property
    def identity(self) -> dict[str, Any]:
        """All that the weights depend on. The segments' names are no part of it: a compaction gives others."""
        feed = {name: value for name, value in self.feed.state_dict()["feed"].items() if name != "rows"}
        return {"recipe": asdict(self.recipe), "feed": feed, "block": self.block, "n_rows": self.feed.chosen.n_rows}

    def save(self, folder: Path) -> None:
        """Put down everything that the next step depends on. Nothing random is drawn after the beginning, so that there
        is no random state beside the feed's."""
        make_folder(folder)
        path = folder / f"training-{self.step:09d}.safetensors"
        tensors = self._tensors()
        write_tensors(path, tensors)
        content = {
            "step": self.step,
            "feed": self.feed.state_dict(),
            "log": self.log,
            "tensors": {name: _checksum(tensor) for name, tensor in tensors.items()},
        }
        write_atomically(folder / STATE, sealed.json_bytes(content, self.identity))
        self._remove(folder, but=path.name)

    def resume(self, folder: Path) -> bool:
        """Go on from what was saved; whether there was something.

        Raises:
            InputError: it is of another training.
            CorruptFileError: it is damaged.
        """
        advice = f"remove {folder} to train it anew"
        try:
            saved, made_from, _ = sealed.read_json(folder / STATE, "the state of a training", advice)
        except FileNotFoundError:
            return False
        check_same(made_from, self.identity, folder)
        path = folder / f"training-{saved['step']:09d}.safetensors"
        tensors = _read(path, saved["tensors"], advice)
        with torch.no_grad():
            for name, learned in self._learned.items():
                learned.copy_(tensors[name])
        n = range(len(_LEARNED))
        moments = {
            number: {
                "step": torch.tensor(float(saved["step"])),
                "exp_avg": tensors[f"{_LEARNED[number]}.first"].to(self.device),
                "exp_avg_sq": tensors[f"{_LEARNED[number]}.second"].to(self.device),
            }
            for number in n
        }
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self._off, self.mean = (tensors[name].to(self.device) for name in ("off", "mean"))
        self.step, self.log = saved["step"], saved["log"]
        self.feed.load_state_dict(saved["feed"])
        self._rows = self._endless()
        return True

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove what was saved: the crosscoder is there."""
        (folder / STATE).unlink(missing_ok=True)
        Trainer._remove(folder)

    @staticmethod
    def _remove(folder: Path, but: str = "") -> None:
        for path in folder.iterdir():
            if (_TENSORS.fullmatch(path.name) and path.name != but) or _DRAFT.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {**self._learned, "off": self._off, "mean": self.mean}
        for name, learned in self._learned.items():
            moments = self._optimiser.state[learned]
            found |= {f"{name}.first": moments["exp_avg"], f"{name}.second": moments["exp_avg_sq"]}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError, naming the first difference, where files are of another training than the wanted one."""
    for part in wanted:
        here, there = wanted[part], found.get(part)
        if here == there:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            name = next(name for name in here if here[name] != there.get(name))
            part, here, there = name, here[name], there.get(name)
        raise InputError(
            f"{folder} is of another training: its {part} is {there}, now it would be {here}; give the same options, "
            "or remove the folder to train it anew"
        )


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.numpy().data)


def _read(path: Path, checksums: Mapping[str, int], advice: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError

    try:
        tensors = read_tensors(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise CorruptFileError(f"{path} is damaged or gone: {error}; {advice}") from error
    for name, checksum in checksums.items():
        if name not in tensors or _checksum(tensors[name]) != checksum:
            raise CorruptFileError(f"{path} is damaged: its {name} is not what was saved; {advice}")
    return tensors
