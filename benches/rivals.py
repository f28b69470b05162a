"""Other ways to patch a state into a model, each at its best, behind one face. Uses no actcache.

    hooks              plain PyTorch hooks at batch one: every replay runs all blocks
    nnsight            a trace whose ``.skip`` hands the state past the blocks before the boundary, which do not run
    TransformerLens    3.x: ``HookedTransformer`` with ``start_at_layer``, whose early blocks do not run either
    TransformerBridge  4.x, which has no HookedTransformer: ``start_at_layer`` runs all blocks, and discards what the
                       early ones make

nnsight wraps its own copy of each model (the weights are shared), so that its controllers slow down nobody else.
TransformerLens converts the weights into modules of its own, unprocessed; the bridge wraps its own copy of each model.
One environment holds one of the two versions. All packages are optional: a rival that is not installed, or cannot load
the pair, is left out with the reason printed.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hooks
import torch
from hooks import BLOCKS, NORMS, HookEvent, path_of
from transformers import AutoTokenizer, PreTrainedModel

LABELS = ("pt", "it")
Cells = dict[tuple[str, str, str], float]  # (upstream, late, readout) -> margin


class Rival(ABC):
    """A pair of checkpoints in some framework."""

    name: str
    package: str  # what to install
    batch: int  # variants of one sequence that it runs in one forward

    @abstractmethod
    def native(
        self, label: str, ids: torch.Tensor, boundaries: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """A plain forward over ``[1, T]`` ids: states at the boundaries ``[1, T, D]``, last block's output at the end
        ``[1, D]``."""

    @abstractmethod
    def replay(self, label: str, ids: torch.Tensor, boundary: int, states: torch.Tensor) -> torch.Tensor:
        """``[1, T]`` ids and ``[B, T, D]`` states entering block ``boundary`` -> last block's output at the end
        ``[B, D]``."""


class Hooks(Rival):
    """Forward hooks."""

    name, package, batch = "hooks", "torch", 1

    def __init__(self, models: dict[str, PreTrainedModel], folders: dict[str, Path]) -> None:
        self.models = models

    def native(
        self, label: str, ids: torch.Tensor, boundaries: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """A forward with a pre-hook at every boundary."""
        return hooks.native(self.models[label], ids, boundaries)

    def replay(self, label: str, ids: torch.Tensor, boundary: int, states: torch.Tensor) -> torch.Tensor:
        """A forward of all blocks."""
        return hooks.replay(self.models[label], ids.expand(len(states), -1), boundary, states)


class Nnsight(Rival):
    """nnsight's traces."""

    name, package, batch = "nnsight", "nnsight", 16

    def __init__(self, models: dict[str, PreTrainedModel], folders: dict[str, Path]) -> None:
        from nnsight import NNsight

        self.models: dict[str, Any] = {label: NNsight(_sharing_copy(model)) for label, model in models.items()}
        model = next(iter(models.values()))
        self.blocks = {label: _child(wrapped, path_of(model, BLOCKS)) for label, wrapped in self.models.items()}
        self.norms = {label: _child(wrapped, path_of(model, NORMS)) for label, wrapped in self.models.items()}

    @torch.no_grad()
    def native(
        self, label: str, ids: torch.Tensor, boundaries: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """One trace that saves the input of each boundary's block and of the final norm."""
        blocks, norm, states = self.blocks[label], self.norms[label], {}
        with self.models[label].trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            for boundary in sorted(boundaries):
                states[boundary] = blocks[boundary].input.save()
            last = norm.input[:, -1].save()
        return states, last

    @torch.no_grad()
    def replay(self, label: str, ids: torch.Tensor, boundary: int, states: torch.Tensor) -> torch.Tensor:
        """One trace that skips the blocks before the boundary."""
        blocks, norm, ids = self.blocks[label], self.norms[label], ids.expand(len(states), -1)
        with self.models[label].trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            for block in blocks[:boundary]:
                block.skip(states)
            last = norm.input[:, -1].save()
        return last


class TransformerLens(Rival):
    """TransformerLens's own model."""

    name, package, batch = "TransformerLens", "transformer-lens", 16

    def __init__(self, models: dict[str, PreTrainedModel], folders: dict[str, Path]) -> None:
        self.models = {label: _hooked_transformer(model, folders[label]) for label, model in models.items()}
        self.n_blocks = next(iter(models.values())).config.num_hidden_layers

    @torch.no_grad()
    def native(
        self, label: str, ids: torch.Tensor, boundaries: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """A run with a hook at every boundary, stopped before the readout."""
        states: dict[int, torch.Tensor] = {}

        def keep(value: torch.Tensor, hook: Any) -> None:
            states[hook.layer()] = value.clone()

        at = [(f"blocks.{boundary}.hook_resid_pre", keep) for boundary in boundaries]
        hidden = self.models[label].run_with_hooks(ids, fwd_hooks=at, stop_at_layer=self.n_blocks)
        return states, hidden[:, -1]

    @torch.no_grad()
    def replay(self, label: str, ids: torch.Tensor, boundary: int, states: torch.Tensor) -> torch.Tensor:
        """A run that starts at the boundary's block."""
        return self.models[label](states, start_at_layer=boundary, stop_at_layer=self.n_blocks)[:, -1]


class Bridge(Rival):
    """TransformerLens 4's wrapper around the model itself."""

    name, package, batch = "TransformerBridge", "transformer-lens", 16

    def __init__(self, models: dict[str, PreTrainedModel], folders: dict[str, Path]) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.models: dict[str, Any] = {
            label: TransformerBridge.boot_transformers(
                str(folders[label]),
                hf_model=_sharing_copy(model),
                tokenizer=AutoTokenizer.from_pretrained(folders[label], local_files_only=True),
                device="cpu",
                dtype=model.dtype,
            )
            for label, model in models.items()
        }

    def native(
        self, label: str, ids: torch.Tensor, boundaries: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """A run with a hook at every boundary."""
        names = {boundary: f"blocks.{boundary}.hook_in" for boundary in boundaries}
        kept, last = self._run(label, ids, list(names.values()))
        return {boundary: kept[name] for boundary, name in names.items()}, last

    def replay(self, label: str, ids: torch.Tensor, boundary: int, states: torch.Tensor) -> torch.Tensor:
        """A run that takes the states in at the boundary's block."""
        return self._run(label, states, [], start_at_layer=boundary)[1]

    @torch.no_grad()
    def _run(
        self, label: str, given: torch.Tensor, names: Sequence[str], **how: Any
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the hooks of these names see, and the last block's output at the end."""
        kept: dict[str, torch.Tensor] = {}

        def keep(value: torch.Tensor, hook: Any) -> None:
            kept[hook.name] = value.clone()

        # It runs the readout in any case: stopped after the last block, it returns logits.
        at = [(name, keep) for name in (*names, "ln_final.hook_in")]
        self.models[label].run_with_hooks(given, fwd_hooks=at, return_type=None, **how)
        return kept, kept["ln_final.hook_in"][:, -1]


def available(models: dict[str, PreTrainedModel], folders: dict[str, Path]) -> dict[str, Rival]:
    """Every rival that can load the pair, by name, hooks first; says why one cannot."""
    found: dict[str, Rival] = {}
    for kind in (Hooks, Nnsight, Bridge if _has_bridge() else TransformerLens):
        try:
            found[kind.name] = kind(models, folders)
        except ModuleNotFoundError:
            extra = "bridge" if kind is Bridge else "bench"
            print(f"{kind.name} is not installed: pip install 'actcache[{extra}]'", file=sys.stderr)
        except Exception as error:  # whatever a framework says of a model that it does not know
            print(f"{kind.name} cannot load this pair: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def grid(rival: Rival, models: dict[str, PreTrainedModel], event: HookEvent, boundary: int) -> Cells:
    """All four cells, for the readouts native, common_it and common_pt: two native passes and two replays."""
    ids = torch.tensor([event.ids])
    states: dict[str, torch.Tensor] = {}
    last: dict[tuple[str, str], torch.Tensor] = {}
    for label in LABELS:
        kept, last[label, label] = rival.native(label, ids, [boundary])
        states[label] = kept[boundary]
    for upstream, late in (LABELS, LABELS[::-1]):
        last[upstream, late] = rival.replay(late, ids, boundary, states[upstream])
    cells: Cells = {}
    for (upstream, late), hidden in last.items():
        for name, model in (("native", models[late]), ("common_it", models["it"]), ("common_pt", models["pt"])):
            cells[upstream, late, name] = float(hooks.margins(model, hidden, event))
    return cells


def _has_bridge() -> bool:
    """Whether the TransformerLens that is installed is one without HookedTransformer."""
    try:
        return int(version("transformer-lens").split(".")[0]) >= 4
    except PackageNotFoundError:
        return False


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of every module, with the same weights in memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def _child(wrapped: Any, path: str) -> Any:
    for name in path.split("."):
        wrapped = getattr(wrapped, name)
    return wrapped


def _hooked_transformer(model: PreTrainedModel, folder: Path) -> Any:
    """A HookedTransformer with the weights of ``model`` as they are: nothing folded, nothing centred."""
    from transformer_lens import HookedTransformer, loading_from_pretrained

    with tempfile.TemporaryDirectory(prefix="pair") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # It guesses the architecture from words in the path first; the config decides only under a neutral name.
        link = Path(scratch) / "checkpoint"
        link.symlink_to(folder.resolve())
        config = loading_from_pretrained.get_pretrained_model_config(
            str(link), fold_ln=False, device="cpu", dtype=model.dtype
        )
        weights = loading_from_pretrained.get_pretrained_state_dict(str(link), config, model, dtype=model.dtype)
        hooked = HookedTransformer(config, move_to_device=False)
        hooked.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
            refactor_factored_attn_matrices=False,
        )
    return hooked.eval()
