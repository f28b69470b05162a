"""One file for each question that a study answers from its tables.

``ANALYSES`` names them all: verbs, files, sections of the report and the shared tests follow from it. Naming costs
nothing; an analysis is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from actcache.errors import InputError

if TYPE_CHECKING:
    from actcache.study.analysis import Analysis


class Named(NamedTuple):
    """An analysis by name: module ``actcache.analyses.<name>`` has it as ``ANALYSIS``.

    Attributes:
        name: of the analysis and its verb.
        question: in one sentence.
        of_cells: whether it is answered of a table of cells alone, and loads no model.
    """

    name: str
    question: str
    of_cells: bool = False

    def load(self) -> Analysis[Any]:
        """The analysis itself."""
        module = self.name.replace(" ", ".").replace("-", "_")
        found: Analysis[Any] = import_module(f"actcache.analyses.{module}").ANALYSIS
        return found

    @property
    def stem(self) -> str:
        """Path of its files in the folder of a run, without what tells their kinds apart."""
        return self.name.replace(" ", "/")


ANALYSES = (
    Named("depth", "how much of the interaction is left where only the last blocks are late"),
    Named("windows", "which depth decides the token and which gives the margin, by the MLPs of some blocks"),
    Named("supports", "whether the interaction is a product of picking the first divergence of each prompt"),
    Named("controls", "whether the interaction could come of hybrid states that neither checkpoint makes"),
    Named("commitment", "whether the state at the boundary has decided for y_it before the late blocks read it"),
    Named("closure", "how few directions of the state at the boundary give back the descendant's choice"),
    Named("lineage", "how much of the final checkpoint's interaction do the earlier stages of its training have"),
    Named("recipes", "what do descendants of one base differ by, each on its own first divergences"),
    Named("map", "what each state, attention, MLP, head or run of blocks does, patched from the other checkpoint"),
    Named("continuation", "whether the interaction survives over the tokens that follow an event"),
    Named("forced", "what follows where the descendant is made to take the one token or the other"),
    Named("path", "what each attention and MLP does to the choice through the final norm alone, with no block between"),
    Named("stability", "how many events other rounding would change: another shape of the batch, or another dtype"),
    Named("effects", "how much the late blocks do on either state: contrasts of cells, with intervals", of_cells=True),
)


STEPS = {
    "features": (
        Named("features train", "what sparse code do the MLP outputs of both checkpoints have: a crosscoder per block"),
        Named("features gate", "is each crosscoder good enough to be used, on texts that it was not trained on"),
        Named("features rank", "which features make the descendant prefer its token on its own states"),
        Named("features mediate", "how much of the interaction is gone without the best features"),
        Named("features gate-test", "do the best features act more on the descendant's states than on the base's"),
        Named(
            "features rescue", "what of the descendant's margin do its best features bring back on the base's states"
        ),
        Named("features dial", "how the interaction changes as a few features are turned down, off, and beyond"),
        Named("features handoff", "how much of what earlier MLPs do to the margin goes through the best features"),
        Named("features contexts", "on which texts is each feature the most active"),
    ),
}
"""Analyses of several steps: each step is named as the analysis and the step, and is a verb of two words. Module
``actcache.analyses.<analysis>.<step>`` has it."""

STEPS_IN_WORDS = {"features": "sparse features of MLP outputs: train them, check them, use them, step by step"}
EVERY = (*ANALYSES, *(named for steps in STEPS.values() for named in steps))
"""All analyses, and the steps of those that have steps."""


def find_analysis(name: str) -> Analysis[Any]:
    """The analysis of this name, or the step: ``features train``.

    Raises:
        InputError: there is none.
    """
    for named in EVERY:
        if named.name == name:
            return named.load()
    raise InputError(f"there is no analysis {name!r}; there are {', '.join(named.name for named in EVERY)}")
