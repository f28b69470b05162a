"""Readout: the final norm and head that turn the last block's output into float32 logits.

The norm runs as the model runs it, in the model's dtype. The head multiplies in float32, and whatever the model does to
its logits afterwards (soft-cap, scale) is done by the model's own forward: the decoder below it is replaced by a stub
that hands over the normed state, and the head by one that multiplies in float32. Knows modules, no files, no stores.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from actcache.errors import NotFiniteError, UnsupportedModelError
from actcache.finite import first_no_state, is_finite
from actcache.models.blocks import find_anatomy, replace, shallow_clone

# Whole-vocabulary logits are made at most this many at a time: 64 MiB of float32.
MAX_LOGITS_AT_ONCE = 1 << 24


class Readout:
    """Final norm and head of one checkpoint.

    There are two ways to the same logits. :meth:`scores` gives those of given tokens, accumulated in float64, so that
    they do not depend on the size or order of the batch. :meth:`top2` looks through the whole vocabulary, by one
    float32 matrix product.
    """

    def __repr__(self) -> str:
        return f"<Readout of a width of {self.width} into {self.vocab_size:,} tokens>"

    def __init__(self, model: PreTrainedModel) -> None:
        """Take norm and head (shared, not copied) from a causal LM.

        Raises:
            UnsupportedModelError: this model's forward does more to its logits than a function of each logit alone,
                so that scored tokens cannot be computed without the rest of the vocabulary; or its head does more than
                multiply by its weight and add its bias; or its forward needs more than a final state.
        """
        anatomy = find_anatomy(model)
        self._norm = model.get_submodule(anatomy.final_norm)
        head = model.get_output_embeddings()
        self._given = _Given()
        self._head = _Float32Head(head, self._given)
        # What the causal LM itself calls may hold more than the decoder: an image tower, a wrapper.
        outermost = anatomy.decoder.partition(".")[0]
        decoder = _NormedState(model.get_submodule(outermost), self._given)
        head_path = next(path for path, module in model.named_modules() if module is head)
        self._shell = shallow_clone(model)
        replace(self._shell, outermost, decoder)
        replace(self._shell, head_path, self._head)
        self.vocab_size: int = head.weight.shape[0]
        self.width = anatomy.width
        self._probe(type(model).__name__, head)

    @property
    def device(self) -> torch.device:
        """Where norm and head are."""
        return self._head.weight.device

    @torch.no_grad()
    def scores(self, final_hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits of chosen tokens.

        Args:
            final_hidden: ``[n, D]``, last block's output, in the model's dtype.
            token_ids: ``[n, k]`` int64.

        Returns:
            ``[n, k]`` float32; a row depends on nothing but that row of the input (bit for bit).

        Raises:
            NotFiniteError: a final state is not finite, or its squares are not; its ``row`` is the first such one.
        """
        if len(final_hidden) == 0:
            return torch.empty(0, token_ids.shape[1], dtype=torch.float32)
        _check_states(final_hidden)
        normed = self._norm(final_hidden[None].to(self.device))
        return self._logits(normed, token_ids.to(self.device)).float().cpu()

    @torch.no_grad()
    def top2(self, final_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two best tokens of the whole vocabulary.

        Args:
            final_hidden: ``[n, D]``, last block's output, in the model's dtype.

        Returns:
            token ids ``[n, 2]`` int64 and logits ``[n, 2]`` float32, best first; of equal logits the lower id first.

        Raises:
            NotFiniteError: a final state is not finite, or its squares are not, or a best logit is not: nothing is
                chosen there; its ``row`` is the first such one.
        """
        _check_states(final_hidden)
        ids = torch.empty(len(final_hidden), 2, dtype=torch.int64)
        logits = torch.empty(len(final_hidden), 2, dtype=torch.float32)
        step = max(1, MAX_LOGITS_AT_ONCE // self.vocab_size)
        for start in range(0, len(final_hidden), step):
            rows = slice(start, start + step)
            every = self._logits(self._norm(final_hidden[None, rows].to(self.device)), None)
            best, index = every.max(dim=-1)
            if not is_finite(best):  # a masked token's -inf is never the best
                row = start + int(torch.isfinite(best).logical_not().nonzero()[0])
                raise NotFiniteError(f"the logits of row {row} are not finite", row=row)
            every.scatter_(1, index[:, None], -torch.inf)
            second, second_index = every.max(dim=-1)
            ids[rows] = torch.stack([index, second_index], 1).cpu()
            logits[rows] = torch.stack([best, second], 1).cpu()
        return ids, logits

    @torch.no_grad()
    def compare(
        self, final_hidden: torch.Tensor, references: torch.Tensor, which: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token of the whole vocabulary, and how far the next-token distribution is from a reference's.

        Args:
            final_hidden: ``[n, D]``, last block's output, in the model's dtype.
            references: ``[m, D]``, the same of what to compare with.
            which: ``[n]`` int64, the reference of each row.

        Returns:
            token ids ``[n]`` int64, of equal logits the lower; and KL(reference || row) ``[n]`` float32, in nats, from
            float32 logits, summed in float64.

        Raises:
            NotFiniteError: a final state or reference is not finite, or its squares are not.
        """
        _check_states(final_hidden)
        _check_states(references)
        ids = torch.empty(len(final_hidden), dtype=torch.int64)
        kl = torch.empty(len(final_hidden), dtype=torch.float32)
        step = max(1, MAX_LOGITS_AT_ONCE // (4 * self.vocab_size))  # float64, and twice
        for rows in which.argsort(stable=True).split(step):
            distinct, of_row = which[rows].unique(return_inverse=True)
            own = self._logits(self._norm(references[None, distinct].to(self.device)), None).double()
            every = self._logits(self._norm(final_hidden[None, rows].to(self.device)), None)
            ids[rows] = every.argmax(dim=-1).cpu()
            own_sum = own.logsumexp(dim=-1)
            for reference, logits in enumerate(own):
                of_reference = of_row == reference
                found = every[of_reference.to(self.device)].double()
                p = (logits - own_sum[reference]).exp()
                # A token that a model masks has no probability on either side: it adds nothing.
                lower = (logits - found).masked_fill(p == 0, 0.0) @ p
                divergence = lower + found.logsumexp(dim=-1) - own_sum[reference]
                kl[rows[of_reference]] = divergence.clamp_min(0.0).float().cpu()
        return ids, kl

    def _logits(self, normed: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """``[1, n, D]`` normed states -> ``[n, k or V]`` logits, through the model's own forward."""
        self._given.state, self._given.token_ids = normed, token_ids
        dummy = torch.zeros(1, normed.shape[1], dtype=torch.int64, device=normed.device)
        return self._shell(input_ids=dummy, use_cache=False).logits[0]

    @torch.no_grad()
    def _probe(self, name: str, head: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, self.width, generator=generator).to(self.device, self._head.weight.dtype)
        own, linear = head(hidden[None]).float(), self._head(hidden[None])
        # The head's own product is rounded to its dtype; anything that a head might add is far larger.
        if own.shape != linear.shape or (own - linear).abs().max() > 0.02 * linear.abs().max():
            raise UnsupportedModelError(f"{name}: its head {type(head).__name__} is more than a matrix product")
        try:
            ids, logits = self.top2(hidden)
        except NotFiniteError as error:
            raise NotFiniteError(f"{name}: its norm and head give logits that are not finite") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            raise UnsupportedModelError(f"{name}: it makes no logits from a final state alone ({reason})") from error
        if not torch.allclose(self.scores(hidden, ids), logits, rtol=1e-4, atol=1e-4):
            raise UnsupportedModelError(f"{name}: logits of chosen tokens differ from those of the whole vocabulary")


def _check_states(final_hidden: torch.Tensor) -> None:
    """Of one that overflows in the norm, all logits would be 0."""
    if (row := first_no_state(final_hidden)) is not None:
        raise NotFiniteError(f"the final state {row} is not finite, or its squares are not", row=row)


class _Given(threading.local):
    """What one call of the model's own head code is about; each thread's own.

    Attributes:
        state: ``[1, n, D]``, normed.
        token_ids: ``[n, k]``, whose logits are wanted; None for all tokens.
    """

    state = torch.empty(0)
    token_ids: torch.Tensor | None = None


class _DecoderOutput(BaseModelOutputWithPast):
    """A final state; every further output that some model's forward passes on (router logits...) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _NormedState(nn.Module):
    """Stands for the decoder: hands a given final state to the model's own head code, which may read plain attributes
    off it (a scale of the logits, for example)."""

    def __init__(self, decoder: nn.Module, given: _Given) -> None:
        super().__init__()
        for name, value in vars(decoder).items():
            if not name.startswith("_") and name not in ("training", "forward"):
                setattr(self, name, value)
        self._given = given

    @property
    def decoder(self) -> nn.Module:
        """Itself: BART and its kin call the decoder inside of their outermost part."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _DecoderOutput(last_hidden_state=self._given.state)


class _Float32Head(nn.Module):
    """The head's weights, multiplied in float32 (all tokens) or float64 (chosen tokens of each row)."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, head: nn.Module, given: _Given) -> None:
        super().__init__()
        self._given = given
        # Plain attributes, not parameters: the weights stay the model's.
        self.__dict__["weight"] = head.weight
        self.__dict__["bias"] = getattr(head, "bias", None)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """``[1, n, D]`` -> ``[1, n, V]`` float32, or ``[1, n, k]`` float64 for ``token_ids [n, k]``."""
        token_ids = self._given.token_ids
        if token_ids is None:
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(normed.float(), self.weight.float(), bias)
        rows = self.weight[token_ids].double()
        scored = (rows * normed[0, :, None].double()).sum(-1)
        if self.bias is not None:
            scored = scored + self.bias[token_ids].double()
        return scored[None]
