"""The digits that ship with the package, and `tensortrace demo`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tensortrace.demo import load_digits, main
from tensortrace.errors import UsageError
from tensortrace.run import open_run


def test_digits_are_those_of_the_uci_test_set() -> None:
    images, labels = load_digits()

    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert (images.min(), images.max()) == (0, 16)
    # Class sizes: UCI's own description of optdigits.tes.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The bytes of sklearn.datasets.load_digits().images (scikit-learn 1.9.1) as uint8.
    digest = hashlib.sha256(images.astype(np.uint8).tobytes()).hexdigest()
    assert digest == "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"


def test_demo_says_that_tracing_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORTRACE", "off")
    with pytest.raises(UsageError, match=r"switched off \(TENSORTRACE\)"):
        main()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_demo_finds_its_planted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main() == 0
    finally:
        torch.set_num_threads(threads)

    log = open_run("log.jsonl")
    list(log.index())
    (finding,) = [f for f in log.findings if f.severity != "note"]
    assert (finding.code, finding.step, finding.op) == ("TT101", 31, "log")
    place = finding.location
    assert place is not None
    assert (Path(place.file).name, place.function) == ("demo.py", "cross_entropy")
    source = log.source(place.file, place.line)
    assert source is not None
    assert "(1 - p).log()" in source.text.splitlines()[place.line - source.first_line]
    shown = capsys.readouterr()
    assert finding.message in shown.err
    assert "tensortrace view log.jsonl" in shown.out
    assert "tensortrace report log.jsonl" in shown.out
