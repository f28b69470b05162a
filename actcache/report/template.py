"""Fills a template of the package: what all pages share, their style and the script that sorts their tables.

Knows the templates and nothing of what is shown.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from actcache.report import visible
from actcache.study.statistics import CAUTION_PROMPTS, FEWEST_PROMPTS


def render(name: str, page: Mapping[str, Any]) -> str:
    """The page that a template makes of these values."""
    script = _text_of("sort.js")
    shared = {
        "fewest_prompts": FEWEST_PROMPTS,
        "caution_prompts": CAUTION_PROMPTS,
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return _environment().get_template(name).render({**shared, **page})


def shown_settings(settings: Mapping[str, str]) -> list[tuple[str, str]]:
    """Labels and texts made fit to show, without home folders."""
    return [(visible.plain(label), visible.plain(visible.without_home(text))) for label, text in settings.items()]


def _text_of(name: str) -> str:
    return files("actcache.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text_of),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": visible.signed, "percent": visible.percent}
    return environment
