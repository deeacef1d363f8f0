"""The command line: `tensortrace report | lines | export | explain | view | demo`.

Exit codes: 0 clean, 1 a finding of severity error, 2 a mistake in the command (one sentence on
stderr), 130 interrupted, 141 nobody reads our output any more. Nothing here imports torch, and
only `view` imports textual.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tensortrace.errors import NoLogYetError, TensortraceError, UsageError
from tensortrace.text import carries, escape, nbytes_text
from tensortrace.version import __version__

if TYPE_CHECKING:
    from tensortrace.export.contents import Found
    from tensortrace.export.lines import Listing
    from tensortrace.run import Ranks, Run

WIDTH = 100
# How often one who waits for a log looks whether it is there.
_LOOK_AGAIN_S = 0.3


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: what it is for, its arguments, what runs it, examples for its help."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    handler: Callable[[argparse.Namespace], int]
    examples: Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; those of the process by default.
    Returns:
        The exit code, see the module's docstring.
    """
    _open_closed()
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest:
            told = f"unrecognized arguments: {' '.join(rest)}"
            raise UsageError(f"{told}. See `tensortrace {arguments.command} --help`.")
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        _stop_writing()
        return 141
    except KeyboardInterrupt:
        return 130
    except TensortraceError as error:
        return _complain(str(error))
    except OSError as error:
        if error.filename is None:
            _stop_writing()
        return _complain(f"{error.strerror or error}: {error.filename or 'standard output'}")


def _open_closed() -> None:
    """Give a stream that was closed (`>&-`), which is None here, nothing to read or write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 (kept)


def _complain(sentence: str) -> int:
    sys.stderr.write(f"tensortrace: {' '.join(map(escape, sentence.splitlines()))}\n")
    return 2


def _stop_writing() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain either."""
    with Path(os.devnull).open("wb") as nothing, suppress(OSError, ValueError):
        os.dup2(nothing.fileno(), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    starts = "\n".join(f"  {line:<52}{why}" for c in COMMANDS for line, why in c.examples[:1])
    parser = _Parser(
        prog="tensortrace",
        description="The tensor-tracing debugger for PyTorch: what went wrong first, and where.",
        epilog=f"examples:\n{starts}\n\n`tensortrace COMMAND --help` has more.",
        formatter_class=style,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tensortrace {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        wide = max(52, *(len(line) + 2 for line, _ in command.examples))
        lines = "\n".join(f"  {line:<{wide}}{why}" for line, why in command.examples)
        one = commands.add_parser(
            command.name, help=command.summary, description=command.summary,
            epilog=f"examples:\n{lines}", formatter_class=style, allow_abbrev=False,
        )  # fmt: skip
        command.arguments(one)
        one.set_defaults(command=command.name, handler=command.handler)
    return parser


def _log_argument(parser: argparse.ArgumentParser) -> None:
    told = "the log, or all ranks of a run, or their folder; by default the newest here"
    parser.add_argument("log", nargs="*", type=Path, help=told)


def _log_and_step_arguments(parser: argparse.ArgumentParser) -> None:
    _log_argument(parser)
    parser.add_argument("--step", type=int, metavar="N", help="the step to show")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _log_and_step_arguments(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON document instead of text")
    add("--notes", action="store_true", help="notes in full; by default they are counted")
    add("--module", action="append", default=[], metavar="GLOB",
        help="only findings and layers whose module path matches; may be repeated")  # fmt: skip
    add("--select", metavar="CHECKS", help="run only these checks: codes, prefixes, names; commas")
    add("--ignore", metavar="CHECKS", help="run all checks but these")
    add("--set", action="append", default=[], metavar="CODE.NAME=VALUE",
        help="run the checks with another threshold; may be repeated")  # fmt: skip


def report(arguments: argparse.Namespace) -> int:
    """Print findings and the layer table; 1 if an error is among the findings shown."""
    with ExitStack() as opened:
        return _report(open_logs(arguments.log, opened), arguments)


def _report(runs: Sequence[Run], arguments: argparse.Namespace) -> int:
    from tensortrace.export.contents import gather, matching_nothing

    missed = matching_nothing(runs, arguments.module)
    found = _check_again(arguments, runs)
    contents = gather(runs, found, step=arguments.step, modules=arguments.module)
    for glob in missed:
        _complain(f"--module {glob!r} matches no module of the run.")
    if arguments.json:
        from tensortrace.export.report_json import render_json

        _write(render_json(contents))
    else:
        from tensortrace.export.text import render

        _write(render(contents, width=_width(), colour=_colour(), notes=arguments.notes))
    return 1 if contents.counts["error"] else 0


def _check_again(arguments: argparse.Namespace, runs: Sequence[Run]) -> list[Found] | None:
    """Run the checks over the logs if an option or the project asks for others; else None."""
    from tensortrace.config import load_config
    from tensortrace.export.contents import found_again

    config = load_config()
    asked = arguments.select is not None or arguments.ignore is not None or arguments.set
    # What `trace(checks=...)` was given wins over the project, and what ran as it says holds.
    options = [run.header.options for run in runs]
    same = all("checks" in o or o.get("pyproject") == str(config) for o in options)
    if not asked and (same or not config):
        return None
    chosen = None if arguments.select is None else _words("--select", arguments.select)
    ignored = None if arguments.ignore is None else _words("--ignore", arguments.ignore)
    checks = config.checks(chosen, ignored)
    if not checks:
        raise UsageError("what is selected is ignored too: no check is left to run.")
    settings = {**config.settings, **dict(_setting(text) for text in arguments.set)}
    found = []
    for run in runs:
        progress = Progress(run.last_step())
        found.append(found_again(run, checks, settings, progress.tick))
        progress.close()
    return found


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"{option} names no check. List all with `tensortrace explain`.")
    return words


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text!r} is not CODE.NAME=VALUE, as in TT201.ratio=50.")
    return name.strip(), value.strip()


class Progress:
    """A line on stderr that counts steps, for a person who has waited for a second."""

    def __init__(
        self, last: int, doing: str = "checking", line: str = "{doing} step {step} of {last}"
    ) -> None:
        self._last, self._doing, self._line = last, doing, line
        self._next = time.monotonic() + 1.0 if sys.stderr.isatty() else float("inf")
        self._width = 0

    def tick(self, step: int) -> None:
        """Say which step is at work, five times a second at most."""
        if time.monotonic() < self._next:
            return
        line = self._line.format(doing=self._doing, step=step, last=self._last)
        self._width, self._next = len(line), time.monotonic() + 0.2
        sys.stderr.write(f"\r{line}")
        sys.stderr.flush()

    def close(self) -> None:
        """Wipe the line."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")


def _lines_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _log_argument(parser)
    add("--rank", type=int, metavar="N", help="which rank's lines; by default the lowest")
    add("--step", metavar="N", help="only step N, or steps N:M; by default all")
    add("--function", metavar="NAME", help="only functions of this name: `forward`, `Net.forward`")
    add("--write", nargs="?", const=False, type=Path, metavar="FOLDER",
        help="write model.annotated.py with comments, beside model.py or in FOLDER, "
        "which is made if it is not there")  # fmt: skip
    add("--json", action="store_true", help="one JSON document instead of text")


def lines(arguments: argparse.Namespace) -> int:
    """Print the source lines of a run with what flowed through them, or write annotated copies."""
    from tensortrace.export.lines import gather_lines

    folder = arguments.write or None
    if folder is not None and folder.is_file():
        raise UsageError(f"--write takes a folder, and {folder} is a file: name the log first.")
    if arguments.write is not None and arguments.json:
        raise UsageError("--write makes copies and --json prints a document: choose one of them.")
    with ExitStack() as opened:
        run = _of_rank(open_logs(arguments.log, opened), arguments.rank, opened)
        progress = Progress(run.last_step(), "reading")
        steps = None if arguments.step is None else _steps(arguments.step)
        listing = gather_lines(run, steps=steps, function=arguments.function, tick=progress.tick)
        progress.close()
        if arguments.write is not None:
            return _write_copies(listing, folder)
        if arguments.json:
            from tensortrace.export.lines_json import render_lines_json

            _write(render_lines_json(listing))
            return 0
        from tensortrace.export.lines_text import render_lines

        plain = not carries(sys.stdout.encoding, "→…")
        for text in render_lines(listing, width=_width(), colour=_colour(), plain=plain):
            _write(text)
    return 0


def _of_rank(runs: Sequence[Run], rank: int | None, opened: ExitStack) -> Run:
    """Choose the log of a rank: of those that were named, or that lie beside the only one.

    Raises:
        UsageError: there is none of that rank.
    """
    by_rank = {run.header.rank: run for run in runs}
    first = runs[0]
    there = sorted({*by_rank, *first.ranks})
    if rank is None:
        if len(runs) > 1:
            _complain(f"this is rank {first.header.rank} of {_ranks(there)}; --rank shows another.")
        return first
    if rank in by_rank:
        return by_rank[rank]
    if rank not in first.ranks:
        raise UsageError(f"--rank {rank}: the run has {_ranks(there)}.")
    return open_logs(first.ranks[rank], opened)[0]


def _ranks(there: Sequence[int]) -> str:
    return f"rank{'s' * (len(there) > 1)} {', '.join(map(str, there))}"


def _write_copies(listing: Listing, folder: Path | None) -> int:
    from tensortrace.export.annotated import write_copies

    copied = write_copies(listing, folder)
    for one in copied:
        if one.copy is not None:
            _write(f"{escape(str(one.copy))}\n")
        else:
            _complain(f"no copy of {one.file}: {one.reason}.")
    if not copied:
        raise UsageError("no line of a function of yours is in these steps.")
    return 2 if any(one.copy is None for one in copied) else 0


def _steps(text: str, option: str = "--step") -> range:
    first, colon, last = text.partition(":")
    if not (first.isdecimal() and (last.isdecimal() if colon else True) and len(text) < 40):
        raise UsageError(f"{option} {text!r} is neither a step nor a range of steps, as in 10:20.")
    numbers = range(int(first), int(last if colon else first) + 1)
    if not numbers or numbers[-1] > 1 << 53:
        raise UsageError(f"{option} {text!r} holds no step: its first number is the smaller one.")
    return numbers


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _log_argument(parser)
    add("--out", "-o", metavar="FILE",
        help="in a folder that is there; its suffix says the format: .html, .csv, .txt, .json; "
        "- writes CSV to stdout; "
        "by default the log's name with .html")  # fmt: skip
    add("--what", metavar="PART",
        help="the table of a CSV: layers (the default), steps, tensors or findings")  # fmt: skip
    add("--steps", metavar="N:M", help="only steps N to M, or one step N; by default all")
    add("--module", action="append", default=[], metavar="GLOB",
        help="only modules whose path matches; may be repeated")  # fmt: skip
    add("--force", action="store_true", help="replace a file that is no export; never a log")


def export(arguments: argparse.Namespace) -> int:
    """Write a run in another format."""
    from tensortrace.export.contents import matching_nothing
    from tensortrace.export.exporter import Wanted, choose
    from tensortrace.export.saving import default_target, save
    from tensortrace.export.steps import require_steps

    steps = None if arguments.steps is None else _steps(arguments.steps, "--steps")
    if arguments.out is not None:  # before a long log is opened
        choose(arguments.out, arguments.what)
    with ExitStack() as opened:
        runs = open_logs(arguments.log, opened)
        if steps is not None:
            require_steps(runs, steps)
        target = arguments.out or default_target(runs)
        exporter = choose(target, arguments.what)
        for glob in matching_nothing(runs, arguments.module):
            _complain(f"--module {glob!r} matches no module of the run.")
        progress = Progress(runs[0].last_step(), "reading")
        opened.callback(progress.close)
        wanted = Wanted(steps, arguments.module, arguments.what, progress.tick)
        nbytes = save(runs, exporter, target, wanted, force=arguments.force)
    if nbytes:
        _write(f"{escape(target)}: {nbytes_text(nbytes)}\n")
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("check", nargs="?", help="a code, a prefix or a name; all by default")


def explain(arguments: argparse.Namespace) -> int:
    """Print a check's page, or the table of checks."""
    from tensortrace.checks import select
    from tensortrace.export.page import explain as page_of

    chosen = select(None if arguments.check is None else [arguments.check])
    if len(chosen) == 1 and arguments.check is not None:
        _write(page_of(chosen[0]))
        return 0
    code, name, severity = (
        max((len(text) for text in column), default=0)
        for column in zip(*((c.code, c.name, c.severity) for c in chosen), strict=True)
    )
    lines = [f"{c.code:<{code}}  {c.name:<{name}}  {c.severity:<{severity}}  {c.doc.summary}"
             for c in chosen]  # fmt: skip
    _write("\n".join(lines) + "\n")
    return 0


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    _log_and_step_arguments(parser)
    parser.add_argument("--finding", metavar="ID", help="open at a finding: its id, or a code")
    parser.add_argument("--module", metavar="PATH", help="open at the first call of a module")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="stay at the end while it is written; one to come is waited for",
    )
    parser.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")


def view(arguments: argparse.Namespace) -> int:
    """Open the viewer; where there is no terminal for it, print the report instead."""
    from tensortrace.tui.asked import check_place

    def check(runs: Sequence[Run]) -> None:
        if not arguments.follow:  # one that follows asks for what is to come
            check_place(runs, arguments.step, arguments.finding, arguments.module)

    if arguments.step is not None and arguments.finding is not None:
        raise UsageError("--step and --finding are two places: give one of them.")
    with ExitStack() as opened:
        keys = _keys(arguments.log) if sys.stdout.isatty() else None
        # A notebook lends what a cell runs a terminal to write to, which gives it no keys.
        notebook = "JPY_PARENT_PID" in os.environ
        if keys is None or notebook or os.environ.get("TERM") == "dumb":
            runs = open_logs(arguments.log, opened)
            check(runs)
            sys.stderr.write("tensortrace: no terminal for the viewer here; this is the report.\n")
            words = [] if arguments.step is None else ["--step", str(arguments.step)]
            return _report(runs, _parser().parse_args(["report", *words]))
        ranks = opened.enter_context(closing(_start(arguments.log, waits=arguments.follow)))
        check(ranks.runs)
        if keys:  # the log is read through a copy of the pipe by now
            os.dup2(keys, 0)
            os.close(keys)
        # How long to wait whether an Esc begins the code of another key: 100 ms unless told.
        os.environ.setdefault("ESCDELAY", "25")
        # How often the screen may change: a key waits for the next time.
        os.environ.setdefault("TEXTUAL_FPS", "120")
        from tensortrace.tui.app import view as open_viewer
        from tensortrace.tui.opening import Opening

        asked = Opening(arguments.step, arguments.finding, arguments.module, arguments.follow)
        return open_viewer(ranks, mouse=not arguments.no_mouse, opening=asked)


def _start(log: Sequence[Path], *, waits: bool) -> Ranks:
    """Open all logs of a run for the viewer.

    Args:
        log: as in `named_logs`.
        waits: whether to wait for a log of a run that is about to begin.
    Raises:
        LogError: there is no log, and none is waited for, or a file is not one.
    """
    from tensortrace.run import start_ranks

    waits = waits and log != [Path("-")]
    told = False
    while True:
        try:
            return start_ranks(log)
        except NoLogYetError:
            if not waits:
                raise
        if not told:
            where = " ".join(map(str, log)) or "this folder"
            _complain(f"no log in {where} yet: waiting for the run to begin; ctrl+c ends.")
            told = True
        time.sleep(_LOOK_AGAIN_S)


def _keys(log: Path | Sequence[Path] | None) -> int | None:
    """Where the viewer reads keys: 0 for standard input, or the terminal beside a pipe, as `less`.

    Args:
        log: ``-`` if the log comes through standard input.
    Returns:
        A file descriptor, None where there is no terminal.
    """
    if sys.stdin.isatty():
        return 0
    if log not in (Path("-"), [Path("-")]):
        return None
    try:
        return os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return None


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--view", action="store_true", help="open the viewer on the log")
    parser.add_argument("--keep", metavar="PATH", default="log.jsonl",
                        help="where to keep the log (default: %(default)s)")  # fmt: skip


def demo(arguments: argparse.Namespace) -> int:
    """Train on the digits with a planted fault."""
    from tensortrace.demo import main as run_demo

    code = run_demo(out=arguments.keep)
    return main(["view", arguments.keep]) if arguments.view else code


def open_logs(path: Path | Sequence[Path] | None, opened: ExitStack) -> list[Run]:
    """Open a log, or all ranks of a run, lowest rank first.

    Args:
        path: a log or the ranks of a run, see `named_logs`; None for the newest in the working
            folder.
        opened: closes them in the end.
    Raises:
        LogError: there is no log, or a file that was named is not one.
    """
    from tensortrace.run import open_ranks, open_run

    paths = [] if path is None else [path] if isinstance(path, Path) else path
    progress = Progress(100, "unpacking", "{doing} {step} %")
    ranks = open_ranks(
        paths,
        lambda one: open_run(one, lambda part: progress.tick(round(part * 100)), index=False),
    )
    opened.callback(ranks.close)
    progress.close()
    for sentence in ranks.unread:
        _complain(sentence)
    return ranks.runs


def _write(text: str) -> None:
    # A terminal of another encoding gets \u escapes, not a traceback.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout.write(text)


def _colour() -> bool:
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )  # fmt: skip


def _width() -> int:
    """Columns of the terminal; of a pipe, what COLUMNS says or 100."""
    if sys.stdout.isatty():
        return max(shutil.get_terminal_size((WIDTH, 24)).columns, 40)
    columns = os.environ.get("COLUMNS", "")
    return max(int(columns), 40) if columns.isdecimal() else WIDTH


COMMANDS = (
    Command("report", "Print findings in order of cause, then a table of the layers.",
            _report_arguments, report, (
        ("tensortrace report log.jsonl", "what went wrong first, and where"),
        ("tensortrace report", "the newest log here"),
        ("tensortrace report log.jsonl --step 12", "the layer table of step 12"),
        ("tensortrace report log.jsonl --module 'encoder.*'", "only what is in the encoder"),
        ("tensortrace report log.jsonl --select TT1,TT202", "run only these checks again"),
        ("tensortrace report log.jsonl --set TT201.ratio=50", "TT201 with another threshold"),
        ("tensortrace report log.jsonl --json", "for machines; exit 1 if any error"),
    )),
    Command("lines", "Print your source lines with the shapes that flowed through them.",
            _lines_arguments, lines, (
        ("tensortrace lines log.jsonl", "each line: shapes, time, what went wrong"),
        ("tensortrace lines log.jsonl --step 12", "only step 12; 10:20 for a range"),
        ("tensortrace lines log.jsonl --function forward", "only functions of that name"),
        ("tensortrace lines log.jsonl --write", "model.annotated.py, a copy with comments"),
        ("tensortrace lines runs/today --rank 2", "the newest run in a folder, its rank 2"),
        ("tensortrace lines log.jsonl --json", "for machines"),
    )),
    Command("export", "Write a run as one HTML page, or its numbers as CSV.",
            _export_arguments, export, (
        ("tensortrace export log.jsonl -o run.html", "one page for people who were sent a link"),
        ("tensortrace export log.jsonl -o run.csv", "a row per step and module"),
        ("tensortrace export -o - --what steps", "loss, gradient norm, lr of each step, to stdout"),
        ("tensortrace export -o t.csv --what tensors", "every tensor that the log describes"),
        ("tensortrace export -o run.html --steps 100:200", "only these steps"),
    )),
    Command("explain", "Explain a check: symptom, exact condition, source, fix, blind spots.",
            _explain_arguments, explain, (
        ("tensortrace explain TT202", "the page of one check"),
        ("tensortrace explain TT2", "the checks of a family"),
        ("tensortrace explain", "all checks"),
    )),
    Command("view", "Walk a run step by step, also while it is being written.",
            _view_arguments, view, (
        ("tensortrace view log.jsonl", "the viewer; press ? for its keys"),
        ("tensortrace view log.jsonl --step 12", "from step 12 on"),
        ("tensortrace view log.jsonl --finding TT101", "at the first finding of a code"),
        ("tensortrace view log.jsonl --module encoder.layers.3", "at the call of a module"),
        ("tensortrace view --follow", "the newest log, at its end while it grows"),
        ("tensortrace view runs/today", "the newest run in a folder, all its ranks"),
        ("tensortrace view --no-mouse", "the newest log, mouse left alone"),
    )),
    Command("demo", "Train a small network with a planted fault and let it be found.",
            _demo_arguments, demo, (
        ("tensortrace demo", "leaves log.jsonl here"),
        ("tensortrace demo --view", "opens the viewer on it"),
        ("tensortrace demo --keep digits.jsonl", "keeps the log under another name"),
    )),
)  # fmt: skip
