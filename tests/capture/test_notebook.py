"""What a notebook shows of a trace, before, during and after its run."""

from __future__ import annotations

import html
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tensortrace import trace
from tests.capture.lifecycle import make_net, train


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Frame(HTMLParser):
    """The one element that is shown, and the page in it."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(shown)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def page(self) -> str:
        assert [tag for tag, _ in self.tags] == ["iframe"]
        return self.tags[0][1]["srcdoc"] or ""


def test_a_trace_shows_its_page_in_a_frame_without_rights_during_and_after_the_run() -> None:
    with trace("run.jsonl") as t:
        train(make_net(poison=[0]), 2)
        during = Frame(t._repr_html_())
    after = Frame(t._repr_html_())
    assert after.tags[0][1]["sandbox"] == ""
    for page in (during.page, after.page):
        assert page.startswith("<!doctype html>")
        assert "TT101" in page
    assert "no end line: still running" in during.page
    assert "exit after" in after.page


def test_a_decorated_function_shows_the_run_so_far() -> None:
    t = trace("run.jsonl")
    run = t(lambda: train(make_net(), 1))
    run()
    assert "no findings" in Frame(t._repr_html_()).page
    t.close()
    assert "no findings" in Frame(t._repr_html_()).page


def test_a_nested_block_shows_the_run_that_it_joined() -> None:
    with trace("run.jsonl"), trace() as inner:
        train(make_net(), 1)
        assert "run.jsonl" in Frame(inner._repr_html_()).page


@pytest.mark.parametrize("off", [False, True], ids=["not begun", "switched off"])
def test_without_a_run_a_sentence_says_so(off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if off:
        monkeypatch.setenv("TENSORTRACE", "off")
    shown = trace()._repr_html_()
    assert (
        shown
        == f"<p>trace: {'Tracing is switched off (TENSORTRACE).' if off else 'Not begun yet.'}</p>"
    )


def test_without_a_file_a_sentence_says_why_and_the_findings_are_told() -> None:
    with trace(out=lambda record: None) as t:
        train(make_net(poison=[0]), 1)
    shown = t._repr_html_()
    assert "no page: the records go to out=" in shown
    assert "error TT101" in html.unescape(shown)


def test_a_log_that_was_taken_away_is_a_sentence_and_no_error(folder: Path) -> None:
    with trace("run.jsonl") as t:
        train(make_net(), 1)
    (folder / "run.jsonl").write_text("<script>alert(1)</script>")
    shown = t._repr_html_()
    assert shown.startswith("<p>trace: no page: ")
    assert "<script" not in shown
