"""Content that is well-formed and makes no sense: offsets, indices, texts and carried keys."""

from __future__ import annotations

import json

import numpy as np

from attacks.forger import Forger


def _events(forger: Forger, column: str, values: list[int]) -> None:
    forger.write_values(f"events/{column}", np.array(values, np.int64))


def _carried(forger: Forger, *texts: str | bytes) -> None:
    """The carried keys of the events, the last for all that are left."""
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    forger.write_texts("events", "carried", (encoded + encoded[-1:] * 4)[:4])


def sequence_offset_that_is_negative(forger: Forger) -> None:
    """A sequence begins before the first token."""
    forger.write_values("sequence_offsets", np.array([0, -5, 14, 15]))


def sequence_offsets_that_decrease(forger: Forger) -> None:
    """A sequence ends before it begins."""
    forger.write_values("sequence_offsets", np.array([0, 14, 5, 15]))


def sequence_offsets_past_the_end(forger: Forger) -> None:
    """A sequence ends beyond the tokens."""
    forger.write_values("sequence_offsets", np.array([0, 5, 2**40, 15]))


def sequence_offsets_that_stop_short(forger: Forger) -> None:
    """Tokens of no sequence."""
    forger.write_values("sequence_offsets", np.array([0, 5, 14, 14]))


def sequence_offsets_that_overflow(forger: Forger) -> None:
    """Differences of offsets that wrap around look like lengths."""
    forger.write_values("sequence_offsets", np.array([0, 2**63 - 1, -(2**63), 15]))


def event_of_no_sequence(forger: Forger) -> None:
    """A sequence's number beyond the last."""
    _events(forger, "sequence", [1, 0, 3, 2])


def event_of_a_negative_sequence(forger: Forger) -> None:
    """-1, which is the last one in Python."""
    _events(forger, "sequence", [1, 0, -1, 2])


def event_beyond_its_sequence(forger: Forger) -> None:
    """A position in the sequence after: the states of another prompt."""
    _events(forger, "position", [8, 5, 8, 0])


def event_at_a_negative_position(forger: Forger) -> None:
    """A position in the sequence before."""
    _events(forger, "position", [-1, 2, 8, 0])


def event_at_the_last_integer(forger: Forger) -> None:
    """A position whose successor is negative."""
    _events(forger, "position", [2**63 - 1, 2, 8, 0])


def text_that_is_not_utf_8(forger: Forger) -> None:
    """A prompt's id is no text."""
    forger.write_texts("events", "prompt_id", [b"\xff\xfe", b"a", b"b", b"c"])


def text_cut_within_a_letter(forger: Forger) -> None:
    """All bytes together are UTF-8, the single texts are not."""
    forger.write_texts("events", "prompt_id", [b"\xc3", b"\xa9", b"b", b"c"])


def text_offsets_past_the_end(forger: Forger) -> None:
    """A text goes on beyond the bytes."""
    last = len(forger.values("texts/offsets")) - 1
    forger.write_text_offset("events", "carried", last, 2**40)


def text_offsets_that_decrease(forger: Forger) -> None:
    """A text of negative length."""
    forger.write_text_offset("events", "prompt_id", 1, 2**40)


def carried_is_not_json(forger: Forger) -> None:
    """Carried keys are no JSON."""
    _carried(forger, "{}", "{")


def carried_is_no_object(forger: Forger) -> None:
    """Carried keys are a list."""
    _carried(forger, "{}", '["event_id"]')


def carried_is_a_number(forger: Forger) -> None:
    """Carried keys are a number."""
    _carried(forger, "1")


def carried_is_nested_deeply(forger: Forger) -> None:
    """Carried keys recurse."""
    _carried(forger, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def carried_is_nested_just_too_deeply_to_write(forger: Forger, depth: int = 985) -> None:
    """Nesting that the parser takes and that is then written as the column's text."""
    _carried(forger, '{"a":' + "[" * depth + "]" * depth + "}")


def carried_number_of_many_digits(forger: Forger) -> None:
    """An integer beyond the number of digits that Python converts."""
    _carried(forger, '{"a":' + "9" * 5000 + "}")


def carried_key_of_the_table(forger: Forger) -> None:
    """A carried key takes the place of the event's own position."""
    _carried(forger, '{"position": 0}')


def carried_key_of_the_reader(forger: Forger) -> None:
    """A carried key takes the place of the segment's name."""
    _carried(forger, '{"segment": "b"}')


def carried_key_that_is_no_text(forger: Forger) -> None:
    """A lone surrogate, which JSON can write and UTF-8 cannot."""
    _carried(forger, '{"\\ud800": 1}')


def carried_keys_by_the_hundred_thousand(forger: Forger) -> None:
    """A column for each of a hundred thousand keys."""
    _carried(forger, json.dumps({f"k{i}": i for i in range(100_000)}), "{}")


def column_of_another_type_in_another_segment(forger: Forger) -> None:
    """A column is a number in one segment and a text in the other: the tables do not join."""

    def change(record: dict) -> None:
        record["schema"]["events"]["gap_pt"] = "string"

    texts = forger.texts()
    forger.record(change)
    forger.write_all_texts(texts | {("events", "gap_pt"): [b""] * 4})


def pair_of_a_checkpoint_that_is_not_there(forger: Forger) -> None:
    """An event is of a pair that the store has no states of."""
    forger.write_texts("events", "pair", [b"pt,it", b"pt,sft", b"pt,it", b"pt,it"])


def texts_begin_behind_the_first_byte(forger: Forger) -> None:
    """The first text of the segment begins at its second byte, so that its bytes are not all some text's."""
    forger.write_text_offset("events", "carried", 0, 1)


def column_of_texts_that_every_table_has_is_gone(forger: Forger) -> None:
    """The events have no kind."""
    texts = forger.texts()
    forger.record(lambda r: r["schema"]["events"].pop("kind"))
    forger.write_all_texts({key: column for key, column in texts.items() if key != ("events", "kind")})
