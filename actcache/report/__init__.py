"""The page that a run ends in: what was found, on how many events, and how to make it again.

For people who read results rather than tables. Knows tables and the dict of
:func:`actcache.analyses.averages.effects`; knows no store and no model. ``page`` chooses what to show, ``figures``
draws it, ``visible`` makes any text and number fit to be shown, ``page.html.jinja`` is the page itself. ``families``
and ``families.html.jinja`` are the page of several families together.
"""

from actcache.report.families import build_families_report
from actcache.report.page import build_report

__all__ = ["build_families_report", "build_report"]
