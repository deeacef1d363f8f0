"""The page of a run: whole, small, and deaf to what the log says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tensortrace.export import html_maps
from tensortrace.export.exporter import Wanted
from tensortrace.export.html import POLICY, render_page
from tensortrace.export.html_style import STYLE
from tensortrace.export.markup import Html, tag, text
from tensortrace.log import encode
from tensortrace.records import ChainLink, Location, ModuleColumns, Record, Step
from tensortrace.run import open_run
from tensortrace.version import __version__
from tests.builders import make_header, make_run, make_steps
from tests.export.canonical import (
    make_calls,
    make_canonical,
    make_finding,
    make_step,
    write_log,
)
from tests.export.compare import assert_golden
from tests.export.hostile import FORBIDDEN, PAYLOADS
from tests.export.page import Page, assert_harmless

BREAKING = {
    "script": "</title></style><script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)><a title="',
    "single quotes": "' onmouseover='alert(1)",
    "url": "javascript:alert(1)",
    "comment": "--><!-- x ]]> <![CDATA[ <?php ?>",
    "svg": "</svg></details><foreignObject><iframe srcdoc=x>",
    "entities": "&lt;b&gt; &#60;script&#62; &quot; &amp;",
    "style": "red;background:url(//evil/x)",
    "closing": "</pre></code></span></td></article></body></html>",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Relative paths, so that the page names the log the same on every machine.
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page_of(*records: Record, wanted: Wanted | None = None) -> str:
    return render_page([open_run(write_log(Path("log.jsonl"), make_run(records)))], wanted)


def training(count: int, **changes: Any) -> list[Record]:
    return [make_step(i, **{"loss": 1.0, "grad_norm": 1.0, **changes}) for i in range(count)]


def test_the_page_of_the_canonical_run() -> None:
    page = page_of(*make_canonical()).replace(STYLE, "STYLE")
    page = page.replace(f"tensortrace {__version__}", "tensortrace VERSION")
    # An element a line, so that a change of the page can be read.
    assert_golden("page.html", page.replace("><", ">\n<"))


def test_the_page_tells_what_the_report_tells() -> None:
    page = assert_harmless(page_of(*make_canonical()))
    told = page.text()
    for words in (
        "train.py --lr 0.1", "torch 2.13.0", "0 to 2, 3 updates",
        "ValueError in module head at train.py:30: loss is NaN", "9 records thinned",
        "1 error, 1 warning, 1 note", "3 of 32 values are -inf", "step 1, forward, Net, op log",
        "> 12 | x = torch.log(x)", "log of 0 is -inf", "between encoder (model.py:11) and the end",
        "relu  call #13  model.py:11", "clamp the input", "and 1 later step", "TT105", "TT202",
    ):  # fmt: skip
        assert words in told
    assert told.index("error TT101") < told.index("warning TT202") < told.index("note TT105")


def test_a_page_has_no_script_and_a_policy_that_forbids_all_but_inline_style() -> None:
    source = page_of(*make_canonical())
    page = Page(source)
    assert POLICY in page.values
    assert POLICY.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert not re.search(r"(?i)https?://|@import|url\(|<script|src=", source)
    assert source.index("Content-Security-Policy") < source.index("<title>")


def test_every_link_on_a_page_leads_to_a_place_on_it() -> None:
    page = Page(page_of(*make_canonical()))
    ids = {value for name, value in page.acted_on if name == "id"}
    links = {value.removeprefix("#") for name, value in page.acted_on if name == "href"}
    assert {"finding-1", "finding-2"} < links <= ids


KEPT = {"kind", "format", "severity", "phase", "why", "update_ratio", "loss", "grad_norm", "value"}


def spoilt(value: Any, payload: str, key: str = "") -> Any:
    """Put a text into every string of a record that the log's schema leaves free, keys as well."""
    if isinstance(value, str):
        return value if key in KEPT else f"{value}{payload}"
    if isinstance(value, list):
        return [spoilt(item, payload, key) for item in value]
    if isinstance(value, dict):
        free = key in ("evidence", "inputs")
        return {k + payload if free else k: spoilt(v, payload, k) for k, v in value.items()}
    return value


def write_spoilt(payload: str) -> Path:
    lines = [spoilt(json.loads(encode(record)), payload) for record in make_canonical()]
    for line in lines:
        if line["kind"] == "step":  # their letters decide what is drawn
            line["modules"]["flags"] = [f"n{payload}"] * 5
    path = Path("log.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("payload", [*PAYLOADS.values(), *BREAKING.values()],
                         ids=[*PAYLOADS, *BREAKING])  # fmt: skip
def test_no_element_attribute_or_link_comes_from_the_log(payload: str) -> None:
    harmless = Page(render_page([open_run(write_spoilt("plain"))]))
    source = render_page([open_run(write_spoilt(payload))])
    page = assert_harmless(source)
    assert page.skeleton == harmless.skeleton
    assert page.comments == harmless.comments
    assert not FORBIDDEN.search(source)
    shown = page.text()
    assert len(page.texts) > 0
    if payload in BREAKING.values():
        assert shown.count(payload) > 20


def test_the_name_of_a_log_is_text_too() -> None:
    name = "<img src=x onerror=alert(1)>'\".jsonl"
    run = open_run(write_log(Path(name), make_canonical()))
    assert name in assert_harmless(render_page([run])).text()


def test_a_text_without_end_is_shortened() -> None:
    page = page_of(make_finding(step=0, message="x" * 10_000_000), make_step(0))
    assert len(page) < 100_000


def test_markup_escapes_whatever_is_no_html() -> None:
    made = tag("p", "<b>", Html("<i></i>"), ["&", None], class_='"', hidden=True, title=None)
    assert made == '<p class="&quot;" hidden>&lt;b&gt;<i></i>&amp;</p>'
    assert text("a\x1b\n\u202eb") == "a\\x1b\n\\u202eb"


# -- curves


def test_what_is_not_finite_is_counted_and_marked() -> None:
    steps = [make_step(i, loss="NaN" if i > 6 else 1.0 + i) for i in range(9)]
    source = page_of(*steps)
    assert "not finite in 2 steps, first in step 7" in Page(source).text()
    assert 'class="bad" d="M7.5 7h0M8.5 7h0"' in source


@pytest.mark.parametrize(
    ("losses", "log"), [((1.0, 19.0), False), ((1.0, 21.0), True), ((-1.0, 500.0), False),
                        ((0.0, 500.0), False), ((1e-320, 1e308), True), ((-1e308, 1e308), False),
                        ((5.0, 5.0), False)],
)  # fmt: skip
def test_a_curve_over_a_wide_range_above_zero_has_a_log_scale(
    losses: tuple[float, float], log: bool
) -> None:
    source = page_of(*(make_step(i, loss=loss) for i, loss in enumerate(losses)))
    assert ("log scale" in source.split("gradient norm")[0]) is log
    assert not re.search(r"\b(nan|inf)\b", source.split("<body>")[1])


def test_ticks_are_round_numbers_that_differ() -> None:
    for losses, ticks in (
        ((0.37, 2.6), ["1", "2"]), ((3.6, 4.3), ["3.6", "3.8", "4", "4.2"]),
        ((1000.1, 1000.3), ["1000.1", "1000.2", "1000.3"]),
        ((2e-9, 3e3), ["1e-8", "1e-5", "0.01", "10"]),
    ):  # fmt: skip
        page = page_of(*(make_step(i, loss=loss) for i, loss in enumerate(losses)))
        panel = page.split('class="ticks">')[1].split("</div>")[0]
        assert re.findall(r">([^<>]+)</span>", panel)[-len(ticks) :] == ticks
    broken = page_of(*(make_step(i, loss="NaN") for i in range(2)))
    assert 'class="ticks"></div>' in broken


def test_a_run_without_numbers_says_so() -> None:
    empty = page_of()
    assert "The log holds no such step." in empty
    assert "no findings" in empty
    bare = page_of(Step(step=0, seq=1))
    assert bare.count("not seen in these steps") == 2
    assert "No step line of these steps has a number about a module." in bare
    assert "No step of the log is closed yet." in page_of(*make_calls(0))


def test_findings_at_one_place_are_marked_side_by_side_and_counted() -> None:
    found = [make_finding(step=3, id=f"TT101-{i}", module=f"m{i}") for i in range(9)]
    page = page_of(*training(3), *found, make_step(3), make_step(4))
    assert page.count('href="#finding-') == 5 + 1
    assert "findings (of 9)" in page


# -- maps


def columns(**values: list[float | None]) -> ModuleColumns:
    paths = [f"m{i}" for i in range(len(next(iter(values.values()))))]
    return ModuleColumns(path=paths, flags=[""] * len(paths), **values)  # type: ignore[arg-type]


def test_a_map_has_a_colour_for_each_decade_a_grey_for_zero_and_gaps() -> None:
    table = columns(grad_rms=[1e-9, 1.0, 0.0, None])
    source = page_of(Step(step=0, seq=1, modules=table), Step(step=1, seq=1, modules=table))
    assert 'stroke="#482475" d="M0 0h2"' in source
    assert 'stroke="#bddf26" d="M0 1h2"' in source
    assert 'class="zero" d="M0 2h2"' in source
    assert "m3" not in source.split("Findings, the cause first")[0]


def test_a_cell_that_is_not_finite_is_marked_by_more_than_colour() -> None:
    table = columns(grad_rms=[1.0, 1.0])
    broken = ModuleColumns(path=table.path, grad_rms=[1.0, None], flags=["", "n"])
    source = page_of(Step(step=0, seq=1, modules=table), Step(step=1, seq=1, modules=broken))
    assert 'class="bad" d="M1 1h1"' in source
    assert 'class="thin" d="M1 1h1"' in source
    assert "m1: 1 in step 0, not finite from step 1" in Page(source).values


def test_the_end_of_a_long_path_stays() -> None:
    paths = ["encoder.layers.11.self_attn.out_proj", "a" * 40, "decoder.norm"]
    table = ModuleColumns(path=paths, grad_rms=[1.0] * 3, flags=[""] * 3)
    told = Page(page_of(Step(step=0, seq=1, modules=table))).text()
    assert "…self_attn.out_proj" not in told
    assert "…out_proj" in told
    assert f"…{'a' * 14}decoder.norm" in told


def test_more_modules_than_rows_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_maps, "MOST_ROWS", 2)
    table = columns(grad_rms=[1.0, 1e-3, 1e-6, 1e-9, None])
    source = page_of(Step(step=0, seq=1, modules=table))
    assert "each row 2 modules, their median" in source
    assert "m0 … (2)" in source
    assert "m2, m3: 1e-09 in step 0" in Page(source).values


def test_a_page_stays_small_whatever_the_log_holds() -> None:
    """Every cell another value: the most that one page can come to."""
    paths = [f"blocks.{i}.{'inner' * 10}" for i in range(500)]

    def noise(step: int) -> list[float | None]:
        return [10.0 ** ((step * 7919 + i * 104729) % 40 - 30) for i in range(len(paths))]

    def steps() -> list[Record]:
        return [
            Step(step=i, seq=1, loss=1.0 + i % 7, grad_norm=1.0, modules=ModuleColumns(
                path=paths, output_rms=noise(i), zero_frac=noise(i), grad_rms=noise(i),
                update_ratio=noise(i), flags=[""] * len(paths)))
            for i in range(200)
        ]  # fmt: skip

    found = [make_finding(step=199, id=f"TT101-{i}", module=paths[i], explanation="why " * 900)
             for i in range(250)]  # fmt: skip
    assert len(page_of(*steps()[:199], *found, steps()[199])) < 2_000_000
    assert len(page_of(*steps())) < 2_000_000


def test_page_of_findings_that_are_very_long_stays_small() -> None:
    long = "<é>" * 2000
    place = Location(long, 1, long, long)
    found = [
        make_finding(id=f"TT101-{i}", message=long, explanation=long, fix=long, location=place,
                     evidence={f"key {n}": [{long: 1}] for n in range(90)} if i == 0 else {},
                     chain=[ChainLink(n, n, long, place) for n in range(90 if i == 0 else 0)])
        for i in range(200)
    ]  # fmt: skip
    page = page_of(*make_steps(1)[:-1], *found, make_steps(1)[-1])
    assert len(page.encode()) < 2_000_000
    told = Page(page).text()
    assert "and 50 more" in told
    assert re.search(r"\d+ more are in the log", told)
    short = [make_finding(id=f"TT101-{i}", explanation="why") for i in range(201)]
    told = Page(page_of(*make_steps(1)[:-1], *short, make_steps(1)[-1])).text()
    assert "1 more are in the log" in told


# -- what is wanted


def test_only_the_steps_and_modules_that_are_wanted_are_on_the_page() -> None:
    records = make_canonical()
    page = page_of(*records, wanted=Wanted(range(2, 3), ["encoder*"]))
    told = Page(page).text()
    assert "TT101" not in told
    assert "step 2" in told
    assert "head" not in told.split("Layers in step 2")[1].split("To walk the run")[0]


def test_every_rank_is_in_the_head_and_findings_say_theirs() -> None:
    runs = [
        open_run(write_log(Path(f"log.rank{rank}.jsonl"), [
            make_header(rank=rank, world_size=2), *make_calls(0),
            *([make_finding(step=0)] if rank else []), make_step(0, loss=1.0),
        ]))
        for rank in range(2)
    ]  # fmt: skip
    told = Page(render_page(runs)).text()
    assert "rank 0 of 2" in told
    assert "rank 1 of 2" in told
    assert "rank 1, step 0, forward" in told


def test_a_damaged_log_is_a_page_too(tmp_path: Path) -> None:
    whole = b"".join(encode(record) for record in make_canonical())
    for cut in range(len(encode(make_canonical()[0])), len(whole), 997):
        (tmp_path / "log.jsonl").write_bytes(whole[:cut] + b'{"kind":"step","step":9e9,\x00\n')
        assert_harmless(render_page([open_run(tmp_path / "log.jsonl")]))


def test_arrays_of_unequal_length_and_modules_met_twice_are_no_error() -> None:
    table = ModuleColumns(path=["a", "a", "b"], grad_rms=[1.0], output_rms=[1.0, 2.0, 3.0, 4.0],
                          flags=["n"])  # fmt: skip
    assert_harmless(page_of(Step(step=0, seq=1, modules=table)))
