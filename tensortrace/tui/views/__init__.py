"""The views beside that of the step; the order of the tabs and their keys are in `tabs.TABS`.

One file a view: `timeline`, `layers`, `tensor`, `flow`, `source`, `findings`, each a `View`
(`view`; `span_view` where columns are steps). They are drawn by `heat`, `plot` and `columns`, and
read by `tracks`, `site`, `site_track`, `executed`, `source_lines`, `call_lines`, `variables`.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from tensortrace.tui.tabs import TABS
from tensortrace.tui.views.view import View

# The step comes first and is no `View`: its panes are those of the main screen.
NAMES = TABS


def kind_of(name: str) -> type[View]:
    """The class of a view; its module is loaded when it is first asked for.

    The first screen needs none of them: together they take a tenth of the start.
    """
    module = import_module(f"tensortrace.tui.views.{name}")
    return cast("type[View]", getattr(module, f"{name.capitalize()}View"))
