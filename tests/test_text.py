"""Nothing that a log holds reaches a terminal as a control sequence."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortrace.records import Location
from tensortrace.text import (
    carries,
    duration_text,
    escape,
    finding_text,
    location_text,
    module_text,
    nbytes_text,
    number_text,
    pasted,
    shape_text,
    short_dtype,
    without_address,
)
from tests.builders import make_finding

# Payloads of real attacks: clipboard (OSC 52), window title, hyperlink (OSC 8), colours, C1 forms
# of CSI and OSC, DCS, a query that types its answer, reordering (CVE-2021-42574), sequences that
# never end (less issue 781), half a surrogate pair.
HOSTILE = [
    "\x1b]52;c;cm0gLXJmIC8=\x07",
    "\x1b]0;owned\x07",
    "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "\x1b[31mred",
    "\x9b31mred",
    "\x9d52;c;eA==\x9c",
    "\x1bP$q\x1b\\",
    "\x1b[6n",
    "safe\u202eelif\u2066x\u2069",
    "\x1b]52;c;never ended",
    "\x1b[",
    "\x1b",
    "back\b\b\b\rspace",
    "\x00\x7f\x85\u2028\u2029\ufeff\u200b\u061c\u200e",
    "\ud800 and \udfff",
    "line\nbreak\vand\ffeed",
    "\U000e0041tag",
    "\ufff9annotation\ufffb",
]


def dangerous(text: str) -> list[str]:
    """Characters that steer a terminal or reorder text."""
    return [c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]


@pytest.mark.parametrize("payload", HOSTILE)
def test_no_control_character_survives(payload):
    assert not dangerous(escape(payload))
    escape(payload).encode()


@given(st.text(st.characters(codec=None)))
def test_any_text_becomes_printable_on_one_line(text):
    shown = escape(text)
    assert not dangerous(shown)
    assert len(shown.splitlines()) <= 1


@given(st.text(st.characters(codec=None, exclude_categories=["C", "Z"])))
def test_harmless_text_in_any_script_is_kept(text):
    assert escape(text) == text


def test_what_was_escaped_can_still_be_read():
    assert escape("a\x1b[31m") == r"a\x1b[31m"
    assert escape("\u202ex") == r"\u202ex"
    assert escape("\U000e0041") == r"\U000e0041"
    assert escape("a\tb") == "a    b"


@pytest.mark.parametrize("payload", HOSTILE)
def test_every_text_of_a_finding_is_escaped(payload):
    where = Location(payload, 3, payload, payload)
    finding = make_finding(
        check=payload, module=payload, op=payload, param=payload, message=payload, location=where,
        explanation=payload, fix=payload,
    )  # fmt: skip
    told = finding_text(finding)
    assert not dangerous(told.replace("\n", ""))
    for text in (location_text(where), module_text(payload), short_dtype(payload)):
        assert not dangerous(text)


def test_a_finding_tells_place_code_reason_and_fix():
    told = finding_text(make_finding(step=7))
    for part in ("error TT101", "step 7", "fc1", "train.py:12", "loss = model(x)", "log of zero"):
        assert part in told


@pytest.mark.parametrize(
    ("step", "update", "text"),
    [(7, 0, "step 7,"), (7, 7, "step 7,"), (7, 8, "step 7,"), (1247, 77, "step 1247 (update 77),"),
     (3, 30, "step 3 (update 30),")],
)  # fmt: skip
def test_updates_are_told_where_steps_do_not_count_them(step, update, text):
    told = finding_text(make_finding(step=step, update=update))
    assert f"  at {text} " in told


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), ("NaN", "NaN"), ("-Infinity", "-inf"), ("Infinity", "inf"),
     (0.03125, "0.0312"), (5100.0, "5100"), (51_000.0, "5.1e+04"), (1e-7, "1e-07"), (-1.5, "-1.5")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_names_have_a_form_when_there_is_nothing_to_name():
    assert module_text("", "Net") == "Net"
    assert module_text("") == "(root)"
    assert module_text(None) == "-"
    assert [module_text(path) for path in ("0", "0.12", "0.fc", "1a")] == [
        "module 0", "module 0.12", "0.fc", "1a"
    ]  # fmt: skip
    assert location_text(None) == "-"
    assert shape_text(None) == "[?]"
    assert shape_text(()) == "[]"
    assert shape_text((8, 128)) == "[8, 128]"
    assert short_dtype("bfloat16") == "bf16"
    assert short_dtype("q\x1bint") == r"q\x1bint"


@pytest.mark.parametrize(
    ("encoding", "carried"),
    [("utf-8", True), ("latin-1", False), ("ascii", False), (None, False), ("no such", False)],
)
def test_an_arrow_is_written_only_where_the_encoding_has_one(encoding, carried):
    assert carries(encoding, "→") is carried
    assert carries(encoding, "->") is (encoding != "no such")


def test_what_is_pasted_into_a_terminal_is_no_command_to_it_and_the_same_json():
    name = "a\x9b31m\x1b]52;c;x\x07\x7f\u202e\U000e0041é\n\tb"
    told = pasted(json.dumps(name, ensure_ascii=False))
    assert json.loads(told) == name
    assert not dangerous(told)
    assert "\\u009b31m" in told
    assert "\\u007f" in told
    assert "é" in told
    assert pasted("two\n\tlines") == "two\n\tlines"


def test_where_an_object_lies_in_memory_is_left_out():
    assert without_address("<Net object at 0x7f3a2b1c>") == "<Net object>"
    assert without_address("look at 0x12, a register") == "look at 0x12, a register"


@pytest.mark.parametrize(
    ("ns", "told"),
    [
        (900, "1 µs"), (12_345, "12 µs"), (3_100_000, "3.1 ms"), (2e9, "2 s"),
        (999_400, "999 µs"), (999_700, "1 ms"), (999_400_000, "999 ms"), (999_700_000, "1 s"),
    ],
)  # fmt: skip
def test_times_carry_their_unit(ns, told):
    assert duration_text(ns) == told


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [
        (0, "0 bytes"), (96, "96 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12_345, "12.3 kB"),
        (999_400, "999 kB"), (999_700, "1 MB"), (3.1e9, "3.1 GB"),
    ],
)  # fmt: skip
def test_bytes_carry_their_unit(nbytes, told):
    assert nbytes_text(nbytes) == told
