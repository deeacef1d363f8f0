"""What backward starts from: the losses of a step, and what the loop does to their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.active import here
from tensortrace.capture.autograd_functions import watch_function
from tensortrace.capture.copied import copied
from tensortrace.capture.loss_graph import dim_beside_classes
from tensortrace.capture.stats.queue import is_known_bad
from tensortrace.capture.tensors import dtype_name
from tensortrace.capture.unwrap import quiet
from tensortrace.records import Location

if TYPE_CHECKING:
    from tensortrace.capture.drafts import ActionDraft
    from tensortrace.capture.recorder import Recorder


def record_losses(
    recorder: Recorder, losses: list[tuple[str, torch.Tensor]], location: Location | None
) -> None:
    """Record what backward is about to run on, with the nodes of its graph nearest to it."""
    gradients = recorder.carried.since_step()
    for _, tensor in losses:
        if tensor.requires_grad:
            watch_function(recorder, tensor, None)
        detail: dict[str, Any] = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
        if gradients:
            detail["gradients"] = gradients
        graph = recorder.graphs.nodes(tensor, location)
        found: dict[str, torch.Tensor] = {}
        if graph is not None:
            found = copied(tensor)
            detail["graph"], single = graph
            if single:
                detail["single"] = single
            beside = dim_beside_classes(tensor)
            if beside is not None:
                detail["beside_classes"], detail["classes_shape"] = beside
        if recorder.tensors.kept:
            detail["kept"], recorder.tensors.kept = recorder.tensors.kept, None
        known = recorder.tensors.id_of(tensor)
        action = recorder.action("loss", location=location, tensor=known, detail=detail)
        if tensor.numel() == 1:
            action.scalars["value"] = recorder.queue.add_scalars([tensor])[0]
        for name, value in found.items():
            action.scalars[name] = recorder.queue.add_scalars([value])[0]
        if recorder.full:
            _record_lone(recorder, tensor, action)
            _record_by_hand(recorder, tensor, detail)
        else:
            recorder.carried.by_hand.forget()


def _record_lone(recorder: Recorder, loss: torch.Tensor, action: ActionDraft) -> None:
    """Add to a loss what it has of parameters that nobody else knows."""
    lone = recorder.carried.lone(loss, recorder.names, recorder.parameters, recorder.update)
    if lone is None:
        return
    parameter, told = lone
    action.fields["detail"].update(told)
    if parameter.grad is not None and parameter.numel():
        with quiet():
            absmax = parameter.grad.detach().abs().max()
        action.scalars["left_absmax"] = recorder.queue.add_scalars([absmax])[0]


def _record_by_hand(recorder: Recorder, loss: torch.Tensor, detail: dict[str, Any]) -> None:
    """Add what a loop without an optimizer has done since the last backward."""
    if here.stack or recorder.optimizers.has_met():
        return
    moved = recorder.carried.by_hand.begins(loss, recorder.parameters)
    if moved is not None:
        detail["by_hand"] = moved


def record_scale(
    recorder: Recorder, losses: list[tuple[str, torch.Tensor]], scaler: Any, frame: FrameType
) -> None:
    """Record the losses that a GradScaler is about to scale, and by how much."""
    record_losses(recorder, losses, recorder.sources.locate_frame(frame))
    recorder.now.loss_scaled = True
    scale = recorder.action("scale", frame=frame)
    if isinstance(scaler._scale, torch.Tensor):
        scale.scalars["scale"] = recorder.queue.add_scalars([scaler._scale])[0]
    else:
        scale.fields["detail"] = {"scale": float(scaler._init_scale)}


def record_clip(
    recorder: Recorder,
    parameters: Sequence[torch.Tensor],
    max_norm: float | None,
    total_norm: torch.Tensor | None,
    frame: FrameType,
) -> None:
    """Record that the gradients of some parameters are about to be clipped by their total norm."""
    detail: dict[str, Any] = {"max_norm": max_norm}
    if recorder.carried.grown:
        detail["outside"] = recorder.carried.outside(parameters)
    owner = recorder.carried.owner(parameters)
    clip = recorder.action("clip", frame=frame, optimizer=owner, detail=detail)
    if total_norm is not None and total_norm.numel() == 1:
        ticket = clip.scalars["total_norm"] = recorder.queue.add_scalars([total_norm])[0]
        recorder.now.clip_spoilt = recorder.now.clip_spoilt or is_known_bad(ticket)
    recorder.now.clipped = True
