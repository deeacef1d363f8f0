"""The views beside that of the step; the order of the tabs and their keys are in `tabs.TABS`."""

from __future__ import annotations

from tensortrace.tui.findings_view import FindingsView
from tensortrace.tui.flow_view import FlowView
from tensortrace.tui.layers_view import LayersView
from tensortrace.tui.source_view import SourceView
from tensortrace.tui.tensor_view import TensorView
from tensortrace.tui.timeline_view import TimelineView
from tensortrace.tui.view import View

VIEWS: tuple[type[View], ...] = (
    TimelineView,
    LayersView,
    TensorView,
    FlowView,
    SourceView,
    FindingsView,
)
# The step comes first and is no `View`: its panes are those of the main screen.
NAMES = ("step", *(view.NAME for view in VIEWS))
