"""Readout: the final norm and head that turn the last block's output into float32 logits.

The norm runs as the model runs it, in the model's dtype. The head multiplies in float32, and whatever the model does to
its logits afterwards (soft-cap, scale) is done by the model's own forward: the decoder below it is replaced by a stub
that hands over the normed state, and the head by one that multiplies in float32. Knows modules, no files, no stores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from actcache.counts import check_whole
from actcache.errors import InputError, NotFiniteError, UnsupportedModelError
from actcache.finite import first_no_state, is_finite
from actcache.models.blocks import find_anatomy, replace, shallow_clone
from actcache.models.linear import fast_linear

# Whole-vocabulary logits are made at most this many at a time: 64 MiB of float32.
MAX_LOGITS_AT_ONCE = 1 << 24

# A CPU multiplies 4 MiB of a head while they are in its cache, so that a state costs one look at the head. Elsewhere it
# is 256 MiB, as each piece costs calls.
HEAD_AT_ONCE, HEAD_AT_ONCE_ON_CPU = 1 << 26, 1 << 20


def head_at_once(kind: str) -> int:
    """How many weights of a head of another dtype are float32 at once, on devices of a kind."""
    return HEAD_AT_ONCE_ON_CPU if kind == "cpu" else HEAD_AT_ONCE


class Reading(NamedTuple):
    """What the whole vocabulary's logits say of n states.

    Attributes:
        top_ids: ``[n, k]`` int64, the best tokens, best first; of equal logits the lower id first.
        top_logits: ``[n, k]`` float32, theirs.
        ranks: ``[n, m]`` int64, how many tokens come before each of those asked for: 0 is the best.
        entropy: ``[n]`` float32, of the next token, in nats.
    """

    top_ids: torch.Tensor
    top_logits: torch.Tensor
    ranks: torch.Tensor
    entropy: torch.Tensor


class Readout:
    """Final norm and head of one checkpoint.

    There are two ways to the same logits. :meth:`scores` gives those of given tokens, accumulated in float64, so that
    they do not depend on the size or order of the batch. All others look through the whole vocabulary, by float32
    matrix products over a few states at a time: beside what is returned, memory does not grow with their number.

    Each takes final states ``[n, D]``: the last block's output, before the final norm, in the model's dtype. States of
    earlier blocks may be given as well, which is the logit lens.

    Each raises:
        NotFiniteError: a final state is not finite, or its squares are not, or its best logit is not; ``row`` is the
            first such one.
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
        self._never = torch.empty(0, dtype=torch.int64)
        self._probe(type(model).__name__, head)

    @property
    def device(self) -> torch.device:
        """Where norm and head are."""
        return self._head.weight.device

    def mask(self, token_ids: Sequence[int]) -> None:
        """Never choose these tokens from here on: their logits are -inf, but in :meth:`scores`, which chooses none.

        Those beyond this vocabulary, which another checkpoint has, are of no account.

        Raises:
            InputError: one is negative, or no other one is left.
        """
        ids = torch.tensor(sorted(index for index in set(token_ids) if index < self.vocab_size), dtype=torch.int64)
        self._check_tokens(ids[None], 1)
        if len(ids) >= self.vocab_size:
            raise InputError(f"all {self.vocab_size} tokens of the vocabulary would be masked")
        self._never = ids.to(self.device)

    @torch.no_grad()
    def scores(self, final_hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits of chosen tokens.

        Args:
            final_hidden: ``[n, D]``, last block's output, in the model's dtype.
            token_ids: ``[n, k]`` int64.

        Returns:
            ``[n, k]`` float32; a row depends on nothing but that row of the input (bit for bit).

        Raises:
            InputError: a token is not in the vocabulary, or there is not one row of them per state.
            NotFiniteError: a final state is not finite, or its squares are not; its ``row`` is the first such one.
        """
        self._check_shape(final_hidden)
        self._check_tokens(token_ids, len(final_hidden))
        if len(final_hidden) == 0:
            return torch.empty(0, token_ids.shape[1], dtype=torch.float32)
        _check_states(final_hidden)
        normed = self._norm(final_hidden[None].to(self.device))
        return self._logits(normed, token_ids.to(self.device)).float().cpu()

    def margins(self, final_hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """The second logit less the first, ``[n]``, of token ids ``[n, 2]``; gradients flow back through it (arguments
        and errors as :meth:`scores`)."""
        self._check_shape(final_hidden)
        self._check_tokens(token_ids, len(final_hidden))
        _check_states(final_hidden)
        logits = self._logits(self._norm(final_hidden[None].to(self.device)), token_ids.to(self.device))
        return logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def log_probs(self, final_hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of chosen tokens among all that may be chosen (arguments and errors as :meth:`scores`).

        Returns:
            ``[n, k]`` float64, in nats: the logits of :meth:`scores`, less the logarithm of the sum over the whole
            vocabulary's, which masked tokens are no part of.
        """
        chosen = self.scores(final_hidden, token_ids).double()
        normaliser = torch.empty(len(final_hidden), dtype=torch.float64)
        for rows, every, _ in self._every(final_hidden, copies=3):  # float64
            normaliser[rows] = every.double().logsumexp(dim=-1).cpu()
        return chosen - normaliser[:, None]

    @torch.no_grad()
    def logits(self, final_hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary, ``[n, V]`` float32 on the CPU; a token that the model masks has -inf."""
        out = torch.empty(len(final_hidden), self.vocab_size, dtype=torch.float32)
        for rows, every, _ in self._every(final_hidden):
            out[rows] = every.cpu()
        return out

    def top(self, final_hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens of the whole vocabulary: ids ``[n, k]`` int64 and logits ``[n, k]`` float32, best first; of
        equal logits the lower id first. InputError where the vocabulary has fewer."""
        return self.read(final_hidden, k=k)[:2]

    def rank(self, final_hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """How many tokens come before given ones, in the order of :meth:`top`: 0 is the best.

        Args:
            final_hidden: ``[n, D]``.
            token_ids: ``[n, m]`` int64.

        Returns:
            ``[n, m]`` int64.

        Raises:
            InputError: a token is not in the vocabulary, or there is not one row of them per state.
        """
        return self.read(final_hidden, token_ids).ranks

    def entropy(self, final_hidden: torch.Tensor) -> torch.Tensor:
        """Entropy of the next token, ``[n]`` float32, in nats, from float32 logits, summed in float64."""
        return self.read(final_hidden).entropy

    @torch.no_grad()
    def read(self, final_hidden: torch.Tensor, token_ids: torch.Tensor | None = None, k: int = 1) -> Reading:
        """The best tokens, the ranks of given ones and the entropy, all from one product with the head.

        Args:
            final_hidden: ``[n, D]``.
            token_ids: ``[n, m]`` int64; None for none.
            k: how many of the best.

        Raises:
            InputError: ``k`` is none of 1..V, a token is not in the vocabulary, or there is not one row of them per
                state.
        """
        n = len(final_hidden)
        asked = torch.empty(n, 0, dtype=torch.int64) if token_ids is None else token_ids
        self._check_tokens(asked, n)
        check_whole(k, "k")
        if not 1 <= k <= self.vocab_size:
            raise InputError(f"k is {k}, expected 1 to {self.vocab_size}, the tokens of the vocabulary")
        out = Reading(torch.empty(n, k, dtype=torch.int64), torch.empty(n, k), torch.empty_like(asked), torch.empty(n))
        for rows, every, _ in self._every(final_hidden, copies=4):  # float64, and twice
            out.top_ids[rows], out.top_logits[rows] = (best.cpu() for best in _best(every, k))
            for column, tokens in enumerate(asked[rows].to(every.device).T):
                out.ranks[rows, column] = _ranks(every, tokens).cpu()
            logits = every.double().log_softmax(dim=-1)
            out.entropy[rows] = torch.special.entr(logits.exp_()).sum(dim=-1).float().cpu()
        return out

    @torch.no_grad()
    def top2(self, final_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two best tokens: :meth:`top` of 2, quicker."""
        ids = torch.empty(len(final_hidden), 2, dtype=torch.int64)
        logits = torch.empty(len(final_hidden), 2, dtype=torch.float32)
        for rows, every, (best, index) in self._every(final_hidden):
            every.scatter_(1, index[:, None], -torch.inf)
            second, second_index = every.max(dim=-1)
            ids[rows] = torch.stack([index, second_index], 1).cpu()
            logits[rows] = torch.stack([best, second], 1).cpu()
        return ids, logits

    @torch.no_grad()
    def best(self, final_hidden: torch.Tensor) -> torch.Tensor:
        """The best token, ``[n]`` int64: the first of :meth:`top2`, quicker."""
        ids = torch.empty(len(final_hidden), dtype=torch.int64)
        for rows, _, (_, index) in self._every(final_hidden):
            ids[rows] = index.cpu()
        return ids

    @torch.no_grad()
    def outvoted(self, final_hidden: torch.Tensor) -> torch.Tensor:
        """The masked token that has the best logit of all, ``[n]`` int64; -1 where one that may be chosen has it."""
        ids = torch.empty(len(final_hidden), dtype=torch.int64)
        for rows, _, (_, index) in self._every(final_hidden, masked=False):
            ids[rows] = torch.where(torch.isin(index, self._never), index, -1).cpu()
        return ids

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

    def _check_shape(self, final_hidden: torch.Tensor) -> None:
        if final_hidden.ndim != 2 or final_hidden.shape[1] != self.width:
            raise InputError(f"final states are {list(final_hidden.shape)}, expected [n, {self.width}]")

    def _check_tokens(self, token_ids: torch.Tensor, n: int) -> None:
        if token_ids.ndim != 2 or len(token_ids) != n or token_ids.dtype != torch.int64:
            raise InputError(f"token ids are {token_ids.dtype} {list(token_ids.shape)}, expected int64 [{n}, m]")
        wrong = token_ids[(token_ids < 0) | (token_ids >= self.vocab_size)]
        if len(wrong):  # torch would take -1 for the last token
            raise InputError(f"token {int(wrong[0])} is not in the vocabulary of {self.vocab_size} tokens")

    def _every(
        self, final_hidden: torch.Tensor, copies: int = 1, *, masked: bool = True
    ) -> Iterator[tuple[slice, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """A few states at a time: which, their logits ``[m, V]``, and the best one with its token, ``[m]`` each.

        ``copies`` says how many times the memory of the logits what is made of them takes; ``masked``, whether those of
        masked tokens are -inf.
        """
        self._check_shape(final_hidden)
        _check_states(final_hidden)
        step = max(1, MAX_LOGITS_AT_ONCE // (copies * self.vocab_size))
        for start in range(0, len(final_hidden), step):
            rows = slice(start, start + step)
            normed = self._norm(final_hidden[None, rows].to(self.device))
            every = self._logits(normed, None) if masked else self._unmasked(normed, None)
            best, index = every.max(dim=-1)
            if not is_finite(best):  # a masked token's -inf is never the best
                row = start + int(torch.isfinite(best).logical_not().nonzero()[0])
                raise NotFiniteError(f"the logits of row {row} are not finite", row=row)
            yield rows, every, (best, index)

    def _logits(self, normed: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """``[1, n, D]`` normed states -> ``[n, k or V]`` logits; those of masked tokens are -inf among all V."""
        logits = self._unmasked(normed, token_ids)
        if token_ids is None and len(self._never):
            logits.index_fill_(-1, self._never, -torch.inf)
        return logits

    def _unmasked(self, normed: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """The same through the model's own forward, as it is."""
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


def _best(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row of ``[m, V]``, best first, of equal ones the lower id first: ids and logits ``[m, k]``."""
    least = logits.topk(k, sorted=True).values[:, -1:]
    row, token = (logits >= least).nonzero(as_tuple=True)  # k of each row, or more where the last ones are equal
    found = logits[row, token]
    order = found.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    first = torch.searchsorted(row, torch.arange(len(logits), device=row.device))
    order = order[first[:, None] + torch.arange(k, device=row.device)]
    return token[order], found[order]


def _ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens of each row of ``[m, V]`` come before one of ``[m]``."""
    own = logits.gather(1, tokens[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < tokens[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(dim=-1)


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
            return self._all(normed.float())
        rows = self.weight[token_ids].double()
        scored = (rows * normed[0, :, None].double()).sum(-1)
        if self.bias is not None:
            scored = scored + self.bias[token_ids].double()
        return scored[None]

    def _all(self, normed: torch.Tensor) -> torch.Tensor:
        """Of all tokens; a piece of the weights is float32 at a time, wherever they are of another dtype."""
        weight, bias = self.weight, None if self.bias is None else self.bias.float()
        if weight.dtype == torch.float32:
            return fast_linear(normed, weight, bias)
        logits = normed.new_empty(*normed.shape[:-1], len(weight))
        step = max(1, head_at_once(weight.device.type) // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            logits[..., rows] = fast_linear(normed, weight[rows].float(), None if bias is None else bias[rows])
        return logits
