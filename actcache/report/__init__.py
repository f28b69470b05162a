"""The page that a run ends in: what was found, on how many events, and how to make it again.

For people who read results rather than tables. Knows tables and the dict of
:func:`actcache.analyses.effects.effects`; knows no store and no model. ``page`` chooses what to show, ``figures`` draws
it, ``visible`` makes any text and number fit to be shown, ``page.html.jinja`` is the page itself.
"""

from actcache.report.page import build_report

__all__ = ["build_report"]
