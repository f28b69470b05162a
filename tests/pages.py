"""Pages for tests: of made-up runs, and taken apart again."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pyarrow as pa

from actcache.analyses.effects import effects
from actcache.report import build_report

SETTINGS = {"command": "actcache run --pt A --it B", "dtype": "bfloat16"}
SCRIPT = files("actcache.report").joinpath("sort.js").read_text()
VOID = {"meta", "col", "br"}


def run_tables(n_events=60, boundaries=(18,), readouts=("native", "common_it"), seed=0, texts=(" The", "\n")):
    """(cells, events, excluded) of a made-up run."""
    rng = np.random.default_rng(seed)
    cells, events = [], []
    for i in range(n_events):
        event = {"event_id": f"e{i:05d}", "prompt_id": f"p{i // 2:05d}", "kind": "first_divergence", "step": i % 7}
        y = rng.normal([-2.0, -1.2, -0.4, 2.5], 0.5)
        for boundary in boundaries:
            for r, readout in enumerate(readouts):
                for cell, (upstream, late) in enumerate([("pt", "pt"), ("pt", "it"), ("it", "pt"), ("it", "it")]):
                    group = {"boundary": boundary, "scope": "prefix", "readout": readout, "variant": "none"}
                    delta = 1e-6 * (i + 1) if upstream == late else None
                    margin = float(y[cell] * (1 + 0.1 * r) + 0.01 * boundary * (cell == 3))
                    labels = {"upstream": upstream, "late": late}
                    cells.append(event | group | labels | {"margin": margin, "noop_delta": delta})
        gaps = {"gap_pt": float(rng.gamma(2.0)), "gap_it": float(rng.gamma(2.0))}
        shown = {"token_pt": texts[i % len(texts)], "token_it": texts[(i + 1) % len(texts)]}
        events.append(event | gaps | shown | {"context": f"context {i} " + texts[i % len(texts)]})
    excluded = pa.table({"prompt_id": ["x1", "x2", "x3"], "reason": ["both stopped", "no divergence", "both stopped"]})
    schema = pa.Table.from_pylist(cells).schema if cells else None
    return pa.Table.from_pylist(cells, schema=schema), pa.Table.from_pylist(events), excluded


def page_of(tables, settings=SETTINGS, **options):
    cells, events, excluded = tables
    return build_report(cells, effects(cells, draws=200), events, excluded, settings, **options)


class Page(HTMLParser):
    """Parses a page, refusing tags that do not nest; collects tags, attributes, text and the text of each section."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.scripts = [], [], [], [], []
        self.by_section = {}
        self.data_values = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))
        if tag == "data":
            self.data_values.append(dict(attrs)["value"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag in ("td", "th", "dt"):
            self.handle_data(" ")
        assert self.open
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("style", "script"):
            self.scripts += [data] if self.open[-1][0] == "script" else []
            return
        self.text.append(data)
        for tag, name in self.open:
            if tag == "section":
                self.by_section[name] = self.by_section.get(name, "") + data

    def section(self, name):
        return re.sub(r"\s+", " ", self.by_section[name])
