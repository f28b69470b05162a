"""Try every decoder family of transformers, tiny and random, and write what became of it to ARCHITECTURES.md.

python scripts/architecture_table.py             write it
python scripts/architecture_table.py --check     exit with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import UnsupportedModelError
from actcache.models.probe import check_reads_back, check_text_alone
from actcache.models.text_tower import check_chooses_tokens
from actcache.replay.late_stack import LateStack

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "actcache" / "models" / "ARCHITECTURES.md"
sys.path.insert(0, str(ROOT / "tests"))

import families  # type: ignore[import-not-found]  # noqa: E402
from twins import reference  # type: ignore[import-not-found]  # noqa: E402

# Odd lengths, one token alone, two beyond the window.
LENGTHS = (7, 1, 13, 4)
STATUS = {"packed": "packed", "padded": "padded", "single": "one at a time"}
REFUSED = "refused"
# A number in a reason depends on the machine.
_NUMBER = re.compile(r" by \d[\d.e+-]*")

HEAD = """\
# Architectures

Every model type that transformers {version} has a causal language model for ({n_types}), some second forms, and the
text towers of {n_towers} models for images and text, which transformers has in another map. Each is built tiny and
random: four blocks of width 32, cut at block 2, sequences of {lengths} tokens, float32, on the CPU. Of a family that
is not *refused*, strict replay equals the full forward with a hook on block 2 bit for bit. Replay of many sequences at
once equals strict replay within 1e-4: *packed* (concatenated, without padding), *padded* on the right, or *one at a
time*, the first of these that is exact when the late stack is loaded. The full forward of a text tower is that of the
whole model, vision and all, given token ids alone. The note says why a family is not packed, or why it is refused; a
refusal is an `UnsupportedModelError` with these words. Heads: whether the head shares the embeddings' weights, as
replayed here. Window: of the blocks that have one, in tokens.

{counts}.

Written by `python scripts/architecture_table.py`; with `--check` it fails where this page is out of date, and so does
`tests/test_architectures.py`.

| family | class | outcome | note | heads | window |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    Attributes:
        name: of `families.NAMES`.
        class_name: of the causal LM.
        status: a value of STATUS, or REFUSED.
        note: why it is not packed.
        heads: which of tied and untied heads were replayed.
        window: in tokens, or empty.
        strict_is_exact: whether strict replay is the hooked forward, bit for bit.
        error: of the default replay, relative to the largest value.
        earlier_tokens_tell: how much the first position's state changes a sequence's output, relative.
        sequences_differ: how much outputs differ between sequences, relative.
        logits_error: of the readout's two best logits against the model's own, relative.
    """

    name: str
    class_name: str
    status: str
    note: str
    heads: str = ""
    window: str = ""
    strict_is_exact: bool = False
    error: float = 0.0
    earlier_tokens_tell: float = 0.0
    sequences_differ: float = 0.0
    logits_error: float = 0.0

    @property
    def row(self) -> str:
        """Its line of the table."""
        note = self.note.replace("|", "\\|")
        cells = self.name, self.class_name, self.status, note, self.heads, self.window
        return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def examine(name: str, model: PreTrainedModel | None = None, *, other_head: bool = True) -> Outcome:
    """Build one family, unless its model is given, and replay it, beside the hooks; and with its head tied where it is
    not, or the other way round, unless told otherwise."""
    model = model or families.build(name)
    class_name = type(model).__name__
    try:
        check_chooses_tokens(type(model), model.config)
        late = LateStack.load(model, families.BOUNDARY)
        check_text_alone(model)
        check_reads_back(model)
    except UnsupportedModelError as error:
        return Outcome(name, class_name, REFUSED, _NUMBER.sub("", str(error).removeprefix(f"{class_name}: ")))
    rows, offsets, expected = hooked(model, LENGTHS)
    strict = late.run(rows, offsets, strict=True)
    largest = strict.abs().max()
    changed = rows[offsets[-2] :].clone()
    changed[0] = rows[0]
    other = late.run(changed, [0, LENGTHS[-1]], strict=True)[0]
    exact = torch.equal(strict, expected)
    own = _is_tied(model)
    tied = [tied for tied in (True, False) if (exact if tied == own else other_head and _replays(name, tied))]
    return Outcome(
        name,
        class_name,
        STATUS[late.mode],
        _NUMBER.sub("", late.not_packable or ""),
        " and ".join({True: "tied", False: "untied"}[one] for one in tied),
        _window(model),
        exact,
        float((late.run(rows, offsets) - strict).abs().max() / largest),
        float((other - strict[-1]).abs().max() / largest),
        float((strict[0] - strict[2]).abs().max() / largest),
        _logits_error(model, late),
    )


def hooked(model: PreTrainedModel, lengths: Sequence[int]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """States at the boundary that other tokens left, ``[N, D]``, their offsets, and the last block's output ``[n, D]``.

    The output is that at the end of each sequence, of a full forward whose own states these overwrite."""
    generator = torch.Generator().manual_seed(1)
    rows, expected = [], []
    for length in lengths:
        own, other = torch.randint(3, families.VOCAB_SIZE, (2, length), generator=generator).tolist()
        rows.append(reference.states(model, other, families.BOUNDARY))
        expected.append(reference.overwritten(model, own, families.BOUNDARY, rows[-1])[-1])
    return torch.cat(rows), [0, *itertools.accumulate(lengths)], torch.stack(expected)


def _logits_error(model: PreTrainedModel, late: LateStack) -> float:
    ids = list(range(3, 10))
    token_ids, logits = late.readout.top2(reference.final_hidden(model, ids)[-1:])
    own = reference.forward(model, ids)[-1]
    return float((own[token_ids[0]] - logits[0]).abs().max() / own.abs().max())


def _replays(name: str, tied: bool) -> bool:
    """Whether the family exists with heads tied (or not) and replays so."""
    try:
        model = families.build(name, tie=tied)
    except ValueError:  # the config refuses
        return False
    if _is_tied(model) != tied:
        return False
    rows, offsets, expected = hooked(model, LENGTHS[:1])
    return torch.equal(LateStack.load(model, families.BOUNDARY).run(rows, offsets, strict=True), expected)


def _is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Module)
    assert isinstance(head, nn.Module)
    return embedding.weight is head.weight


def _window(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds and not any(word in str(kind) for kind in kinds for word in ("sliding", "chunked", "local")):
        return ""
    return str(families.WINDOW) if any(getattr(config, n, None) == families.WINDOW for n in families.WINDOWS) else ""


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole file."""
    counts = Counter(outcome.status for outcome in outcomes)
    said = ", ".join(f"{counts[status]} {status}" for status in (*STATUS.values(), REFUSED) if counts[status])
    head = HEAD.format(
        version=transformers.__version__,
        n_types=len({families.model_type_of(outcome.name) for outcome in outcomes} - set(families.TOWERS)),
        n_towers=len(families.TOWERS),
        lengths=f"{', '.join(map(str, LENGTHS[:-1]))} and {LENGTHS[-1]}",
        counts=f"{len(outcomes)} rows: {said}",
    )
    return head + "".join(f"{outcome.row}\n" for outcome in outcomes)


def read_page(text: str) -> tuple[str, Mapping[str, str]]:
    """The transformers version that a page names, and the outcome of each family."""
    found = re.search(r"transformers (\S+) has", text)
    rows = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("| "))
    statuses = {cells[0].strip(): cells[2].strip() for cells in rows}
    statuses.pop("family", None)
    return found.group(1) if found else "", statuses


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    transformers.logging.set_verbosity_error()
    outcomes = []
    for name in families.NAMES:
        outcomes.append(examine(name))
        print(outcomes[-1].row, file=sys.stderr)
    text = page(outcomes)
    if check:
        if PAGE.read_text() != text:
            print(f"{PAGE.name} is out of date; run python scripts/architecture_table.py", file=sys.stderr)
            return 1
    else:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
