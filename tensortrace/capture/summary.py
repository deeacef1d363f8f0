"""What the step line says: one row of numbers per module, gathered as records pass.

A call and a parameter need not be finished for it: of a thin step, those are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from math import sqrt

from tensortrace.capture.drafts import (
    CallDraft,
    GradientDraft,
    ParamDraft,
    ParameterGradientDraft,
    Unfinished,
)
from tensortrace.capture.tensors import TensorDraft
from tensortrace.records import (
    Action,
    Call,
    Finding,
    Line,
    Module,
    ModuleColumns,
    Optimizer,
    Param,
    Record,
    Scalar,
    Step,
    Tensor,
    from_scalar,
)

_FLOATS = ("float", "bfloat", "complex")


class _Row:
    __slots__ = ("bias_ratio", "flags", "grad", "output", "param_grad", "ratio", "zeros")

    def __init__(self) -> None:
        self.output: float | None = None
        self.zeros: float | None = None
        self.grad: float | None = None
        self.param_grad: float | None = None
        self.ratio: float | None = None
        self.bias_ratio: float | None = None
        self.flags = ""


class StepSummary:
    """Gathers a step line from the records of one step.

    The `flags` of a module: "n" a NaN and "i" an infinity, "o" in an output and "g" in a gradient,
    "f" a finding.

    Args:
        order: the rank of each module path by its first call in the run, which this adds to.
    """

    def __init__(self, order: dict[str, int]) -> None:
        self._order = order
        self._rows: dict[str, _Row] = {}
        self._tensors: dict[int, Tensor | TensorDraft] = {}
        self._scale = 1.0
        self._loss: Scalar | None = None
        self._clip_norm: Scalar | None = None
        self._optimizer: Optimizer | None = None
        self._lr: list[Scalar | None] = []
        self.records = 0

    def describe(self, records: Iterable[Record | Unfinished]) -> None:
        """Learn the tensors of a batch: what a call returns, a call inside it may describe. Hot."""
        known = self._tensors
        for record in records:
            if isinstance(record, Call):
                # The gradients of a node no other record has.
                if record.node is None:
                    for tensor in record.tensors:
                        known[tensor.id] = tensor
            elif isinstance(record, CallDraft):
                for draft in record.tensors:
                    known[draft.id] = draft
            elif isinstance(record, GradientDraft):
                if record.grad is not None:
                    known[record.tensor] = record.grad
            elif isinstance(record, Line):
                for tensor in record.tensors:
                    known[tensor.id] = tensor

    def add(self, record: Record | Unfinished) -> None:
        """Take in the next record of the step. Hot."""
        self.records += 1
        if isinstance(record, Call):
            if record.op is None and record.module is not None:
                self._add_call(record.module, record.phase, record.inputs, record.outputs)
        elif isinstance(record, Unfinished):
            self._add_unfinished(record)
        elif isinstance(record, Param):
            self._add_param(record.module, record.value.shape, from_scalar(record.update_ratio))
        elif isinstance(record, Optimizer):
            self._optimizer = record
            self._lr = [*self._lr, *record.lr]
        elif isinstance(record, Action):
            self._add_action(record)
        elif isinstance(record, Module):
            rank = self._order.setdefault(record.path, len(self._order))
            if record.alias is not None:
                self._order.setdefault(record.alias, rank)
        elif isinstance(record, Finding) and record.module is not None:
            _flag(self._row(record.module), "f")

    def _add_unfinished(self, draft: Unfinished) -> None:
        if isinstance(draft, ParameterGradientDraft):
            self._add_parameter_gradient(self._row(draft.module), draft.grad)
        elif isinstance(draft, GradientDraft):
            self._add_gradient(self._row(draft.module), self._tensors.get(draft.tensor))
        elif isinstance(draft, ParamDraft):
            change, weight = draft.norms()
            if change is not None and weight:
                self._add_param(draft.fields.get("module"), draft.value.shape, change / weight)
        elif isinstance(draft, CallDraft):
            fields = draft.fields
            path = fields.get("module")
            if path is not None and fields.get("op") is None:
                phase = fields.get("phase", "forward")
                self._add_call(path, phase, fields.get("inputs", ()), fields.get("outputs", ()))

    def forget_tensors(self) -> None:
        """Drop descriptions that no later part of the step needs."""
        self._tensors.clear()

    def _row(self, path: str) -> _Row:
        row = self._rows.get(path)
        if row is None:
            row = self._rows[path] = _Row()
        return row

    def _add_call(
        self,
        path: str,
        phase: str,
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
    ) -> None:
        row, known = self._row(path), self._tensors
        if phase == "forward":
            for _, number in outputs:
                _add_output(row, known.get(number))
            return
        for _, number in inputs:
            self._add_gradient(row, known.get(number))
        for _, number in outputs:
            self._add_parameter_gradient(row, known.get(number))

    def _add_gradient(self, row: _Row, grad: Tensor | TensorDraft | None) -> None:
        row.grad = _larger(row.grad, _rms_of(row, grad), self._scale)

    def _add_parameter_gradient(self, row: _Row, grad: Tensor | TensorDraft | None) -> None:
        row.param_grad = _larger(row.param_grad, _rms_of(row, grad), self._scale)

    def _add_param(
        self, module: str | None, shape: tuple[int, ...] | None, ratio: float | None
    ) -> None:
        if module is None or ratio is None or not math.isfinite(ratio):
            return
        row = self._row(module)
        # A weight that starts at zero has no scale yet: ratios of 1-d parameters count only where
        # a module has no others.
        if len(shape or ()) > 1:
            row.ratio = _larger(row.ratio, ratio)
        else:
            row.bias_ratio = _larger(row.bias_ratio, ratio)

    def _add_action(self, action: Action) -> None:
        if action.action == "loss":
            self._loss = action.detail.get("value", self._loss)
        elif action.action == "scale":
            scale = from_scalar(action.detail.get("scale"))
            if scale and math.isfinite(scale):
                self._scale = scale
        elif action.action == "clip" and action.detail.get("total_norm") is not None:
            self._clip_norm = action.detail["total_norm"]

    def step(
        self, *, number: int, seq: int, update: int, host_ns: int, time_ns: int, rested: bool
    ) -> Step:
        """The step line, but for what the journal counts."""
        if rested:  # gradients arrive in the order of backward
            last = len(self._order)
            paths = sorted(self._rows, key=lambda path: self._order.get(path, last))
            self._rows = {path: self._rows[path] for path in paths}
        rows = self._rows.values()
        optimizer = self._optimizer
        norm = self._clip_norm
        if norm is None and optimizer is not None:
            norm = optimizer.grad_norm
        return Step(
            step=number,
            seq=seq,
            update=update,
            time_ns=time_ns,
            host_ns=host_ns,
            loss=self._loss,
            grad_norm=norm,
            lr=self._lr,
            skipped=bool(optimizer and optimizer.skipped),
            records=self.records,
            rested=rested,
            modules=ModuleColumns(
                path=list(self._rows),
                output_rms=_short([row.output for row in rows]),
                zero_frac=_short([row.zeros for row in rows]),
                grad_rms=_short([row.grad for row in rows]),
                param_grad_rms=_short([row.param_grad for row in rows]),
                update_ratio=_short(
                    [row.bias_ratio if row.ratio is None else row.ratio for row in rows]
                ),
                flags=[row.flags for row in rows],
            ),
        )


def _rms_of(row: _Row, grad: Tensor | TensorDraft | None) -> float | None:
    """The rms of a gradient, which is flagged if it is not finite; None if it is not known."""
    if grad is None:
        return None
    _, rms, _, bad = _numbers(grad)
    if bad:
        _flag(row, bad + "g")
    return rms


def _add_output(row: _Row, made: Tensor | TensorDraft | None) -> None:
    if made is None:
        return
    dtype, rms, zeros, bad = _numbers(made)
    if dtype.startswith(_FLOATS):
        row.output = _larger(row.output, rms)
        if zeros is not None and (row.zeros is None or zeros > row.zeros):
            row.zeros = zeros
        if bad:
            _flag(row, bad + "o")


def _numbers(tensor: Tensor | TensorDraft) -> tuple[str, float | None, float | None, str]:
    """The dtype, the rms of what is finite, the share of zeros, "n" and "i" for what is not. Hot.

    None where that is not known.
    """
    if isinstance(tensor, TensorDraft):
        _, _, _, dtype, _, _, _, _, numel = tensor.head
        nan, posinf, neginf, zeros, _, _, _, _, norm, unmeasured, _, _ = tensor.stats()
    else:
        dtype, numel = tensor.dtype, tensor.numel
        nan, posinf, neginf = tensor.nan, tensor.posinf, tensor.neginf
        zeros, norm, unmeasured = tensor.zeros, tensor.norm, tensor.unmeasured
    finite = numel - nan - posinf - neginf
    rms = norm / sqrt(finite) if norm is not None and finite > 0 else None
    share = zeros / numel if numel and not unmeasured else None
    if finite == numel:
        return dtype, rms, share, ""
    return dtype, rms, share, "n" * bool(nan) + "i" * bool(posinf or neginf)


def _larger(old: float | None, new: float | None, scale: float = 1.0) -> float | None:
    if new is None:
        return old
    new /= scale
    return new if old is None or new > old else old


def _short(column: list[float | None]) -> list[float | None]:
    # Six digits are what a series needs, at a third of the bytes.
    return [None if x is None else float(f"{x:.6g}") for x in column]


def _flag(row: _Row, letters: str) -> None:
    for letter in letters:
        if letter not in row.flags:
            row.flags += letter
