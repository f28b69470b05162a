"""Schema: tables have the columns that are said of them."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from actcache import schema


@pytest.mark.parametrize("table", [schema.EVENTS, schema.EXCLUDED, schema.CELLS, schema.EFFECTS])
def test_every_column_has_a_type_and_a_meaning_and_its_name_once(table):
    assert len({column.name for column in table}) == len(table)
    for column in table:
        assert isinstance(schema.arrow_type(column.type), pa.DataType)
        assert column.meaning
        if column.type.startswith("float"):
            assert column.unit


def test_a_run_has_the_columns_that_are_said(tiny_run):
    run = tiny_run("llama", torch.float32)
    of_events = {column.name: column for column in (*schema.EVENTS, schema.SEGMENT)}
    events = run.store.events
    assert {"category"} == set(events.column_names) - of_events.keys(), "what the prompts carry"
    for table, columns in ((events, of_events), (run.cells, {column.name: column for column in schema.CELLS})):
        required = {name for name, column in columns.items() if column.required} - {"carried"}
        assert required <= set(table.column_names)
        for name in set(table.column_names) & columns.keys():
            assert table.schema.field(name).type == schema.arrow_type(columns[name].type), name
    (group, *_) = run.effects["groups"]
    assert {column.name for column in schema.EFFECTS if column.required} <= group.keys()
