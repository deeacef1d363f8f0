"""Every key of the viewer, in one table: the bindings, the help and the footer are made from it."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding, BindingType

from tensortrace.tui.tabs import TABS


@dataclass(frozen=True, slots=True)
class Key:
    """What some keys do: `keys` as Textual names them, `shown` as a person does.

    `footer` is the short label in the footer, empty to leave the key out of it. `views` are those
    in which the key does this; empty: in all.
    """

    keys: str
    shown: str
    action: str
    help: str
    group: str
    footer: str = ""
    views: tuple[str, ...] = ()


STEP, ROW, MAP = ("step",), ("step", "tensor", "flow"), ("timeline", "layers")
FOUND, TENSOR, SOURCE = ("findings",), ("tensor",), ("source",)
LISTS = tuple(view for view in TABS if view != "timeline")
FIRST = ("tab", "shift+tab", "colon", "slash")

KEYS = (
    Key("j,down", "j ↓", "move(1)", "next line", "Move", "", LISTS),
    Key("k,up", "k ↑", "move(-1)", "previous line", "Move", "", LISTS),
    Key("space,pagedown", "space pgdn", "page(1)", "next page", "Move", "", LISTS),
    Key("pageup,ctrl+b", "pgup ctrl+b", "page(-1)", "previous page", "Move", "", LISTS),
    Key("ctrl+d", "ctrl+d", "page(0.5)", "half a page down", "Move", "", LISTS),
    Key("ctrl+u", "ctrl+u", "page(-0.5)", "half a page up", "Move", "", LISTS),
    Key("g,home", "g home", "top", "first line", "Move", "", LISTS),
    Key("G,end", "G end", "bottom", "last line", "Move", "", LISTS),
    Key("right_square_bracket", "]", "step(1)", "next step, same place", "Walk", "Step+"),
    Key("left_square_bracket", "[", "step(-1)", "previous step, same place", "Walk"),
    Key("e", "e", "finding(1)", "next finding", "Walk", "Finding"),
    Key("E", "E", "finding(-1)", "previous finding", "Walk"),
    Key("w", "w", "warning(1)", "next warning", "Walk"),
    Key("W", "W", "warning(-1)", "previous warning", "Walk"),
    Key("right_parenthesis", ")", "rank(1)", "same place on the next rank", "Walk"),
    Key("left_parenthesis", "(", "rank(-1)", "same place on the previous rank", "Walk"),
    Key("colon", ":", "ask_step", "go to a step by its number", "Walk"),
    Key("backspace,ctrl+o", "backspace ctrl+o", "jump_back", "back to before the jump", "Walk"),
    Key(
        "l,right",
        "l →",
        "unfold",
        "show the calls or ops inside a call, go into it",
        "Ops",
        "",
        STEP,
    ),
    Key(
        "h,left",
        "h ←",
        "fold",
        "hide what is inside a call, or go to the call around",
        "Ops",
        "",
        STEP,
    ),
    Key("plus", "+", "fold_all(True)", "show all calls, then all ops", "Ops", "", STEP),
    Key(
        "minus",
        "-",
        "fold_all(False)",
        "hide all ops, then the calls inside calls",
        "Ops",
        "",
        STEP,
    ),
    Key("i", "i", "sources", "go to what made an input", "Ops", "From", ROW),
    Key("o", "o", "uses", "go to what used an output", "Ops", "To", ROW),
    Key("b", "b", "counterpart", "from a call to its gradient, and back", "Ops", "", ROW),
    Key("p", "p", "before", "same place in an earlier step", "Ops", "", ROW),
    Key("c", "c", "causes", "walk the causes of a finding", "Ops", "Causes", ROW),
    Key("l,right", "l →", "column(1)", "later steps", "Columns", "", MAP),
    Key("h,left", "h ←", "column(-1)", "earlier steps", "Columns", "", MAP),
    Key("plus", "+", "zoom_steps(True)", "fewer steps in a column", "Columns", "Zoom in", MAP),
    Key("minus", "-", "zoom_steps(False)", "more steps in a column", "Columns", "Out", MAP),
    Key("m", "m", "quantity", "another quantity", "Columns", "Quantity", MAP),
    Key("g,home", "g home", "end(False)", "first step", "Columns", "", ("timeline",)),
    Key("G,end", "G end", "end(True)", "last step", "Columns", "", ("timeline",)),
    Key("t", "t", "chart", "a statistic of this tensor over all steps", "Tensors", "Chart", TENSOR),
    Key("l,right", "l →", "tensor(1)", "next tensor of the row", "Tensors", "", TENSOR),
    Key("h,left", "h ←", "tensor(-1)", "previous tensor of the row", "Tensors", "", TENSOR),
    Key("full_stop", ".", "line(1)", "next executed line", "Source", "Next", SOURCE),
    Key("comma", ",", "line(-1)", "previous executed line", "Source", "Previous", SOURCE),
    Key("greater_than_sign", ">", "line_over(1)", "next in this function", "Source", "", SOURCE),
    Key("less_than_sign", "<", "line_over(-1)", "previous in this function", "Source", "", SOURCE),
    Key("l,right", "l →", "line_into", "into what the line called", "Source", "Into", SOURCE),
    Key("h,left", "h ←", "line_out", "out, to the line that called", "Source", "Out", SOURCE),
    Key("c", "c", "causes", "walk the causes of the finding", "Findings", "Causes", FOUND),
    Key("f", "f", "family", "findings of the next family only", "Findings", "Family", FOUND),
    Key("v", "v", "severity", "only errors, warnings, notes", "Findings", "Severity", FOUND),
    Key("C", "C", "columns", "choose the columns of the table", "Ops", "", STEP),
    Key("slash", "/", "ask_search", "search the whole log", "Search", "Search"),
    Key("n", "n", "hit(1)", "next hit", "Search"),
    Key("N", "N", "hit(-1)", "previous hit", "Search"),
    Key("enter", "enter", "open", "open what is inside a call, or the detail", "Panes"),
    Key("escape", "esc", "leave", "cancel, close, or go up", "Panes"),
    Key("tab", "tab", "pane(1)", "next pane", "Panes"),
    Key("shift+tab", "shift+tab", "pane(-1)", "previous pane", "Panes"),
    Key("s", "s", "source", "show or hide the source", "Panes", "Source", STEP),
    Key("z", "z", "zoom", "one pane alone, and back", "Panes", "", STEP),
    Key("1", "1", "view('step')", "the calls of a step", "Views"),
    Key("2", "2", "view('timeline')", "all steps: loss, gradient norm, any statistic", "Views"),
    Key("3", "3", "view('layers')", "layers by steps, a heat map", "Views"),
    Key("4", "4", "view('tensor')", "all that is known of one tensor", "Views"),
    Key("5", "5", "view('flow')", "where tensors come from and go to", "Views"),
    Key("6", "6", "view('source')", "your lines one by one, and the variables", "Views"),
    Key("7", "7", "view('findings')", "all findings, the cause first", "Views"),
    Key("y", "y", "copy", "copy the record as JSON", "Other"),
    Key("x", "x", "ask_save", "write the view to a file, as text or .svg", "Other"),
    Key("equals_sign", "=", "follow", "follow a live run, or pause", "Other"),
    Key("ctrl+l", "ctrl+l", "paint_anew", "draw the screen again", "Other"),
    Key("question_mark,f1", "? F1", "help", "this help", "Other", "Help"),
    Key("ctrl+p", "ctrl+p", "command_palette", "all commands by name, and themes", "Other"),
    Key("q", "q", "quit", "quit", "Other", "Quit"),
)


def _views_of() -> dict[str, frozenset[str]]:
    """The views in which each action does something: asked for every binding at every change."""
    held: dict[str, frozenset[str]] = {}
    for key in KEYS:
        name = key.action.partition("(")[0]
        held[name] = held.get(name, frozenset()) | frozenset(key.views or TABS)
    return held


VIEWS_OF = _views_of()


def bindings() -> list[BindingType]:
    """Make Textual's bindings of the program: what holds in all views, or in that of the step."""
    return [_binding(key) for key in KEYS if not key.views or "step" in key.views]


def bindings_of(view: str) -> list[BindingType]:
    """Make Textual's bindings of a view: what only the views beside the step have."""
    return [_binding(key) for key in KEYS if view in key.views and "step" not in key.views]


def _binding(key: Key) -> Binding:
    return Binding(
        key.keys,
        key.action,
        key.footer or key.help,
        show=bool(key.footer),
        key_display=key.shown.split()[0],
        # Those that ask for letters come before the letters: a terminal may send all at once.
        priority=key.keys in FIRST,
    )


def in_view(action: str, view: str) -> bool:
    """Whether an action does something in a view; one that has no key always does."""
    return view in VIEWS_OF.get(action, TABS)


def help_lines(view: str = "step") -> list[tuple[str, str]]:
    """List the keys for a person: ``(keys, what they do)``, headings as ``(text, "")``.

    Those of the view that is shown come first, by group; then what only the others have.
    """
    lines: list[tuple[str, str]] = []
    here = [key for key in KEYS if not key.views or view in key.views]
    for group in dict.fromkeys(key.group for key in here):
        lines.append((group, ""))
        lines += [(key.shown, key.help) for key in here if key.group == group]
    elsewhere = [key for key in KEYS if key not in here]
    for views in dict.fromkeys(key.views for key in elsewhere):
        lines.append((f"Only in {', '.join(views)}", ""))
        lines += [(key.shown, key.help) for key in elsewhere if key.views == views]
    return lines
