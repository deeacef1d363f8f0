"""Which gradients outlive their step, and whose they are.

No hook says that a gradient was cleared: `zero_grad` is one way, ``p.grad = None`` another. So the
first gradient of each optimizer stands for all of its own: it is looked at after a step and again
when the next backward begins. Identity and version are compared, no value is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensortrace.capture.active import slot
from tensortrace.capture.gradients import pointer_of
from tensortrace.capture.loop.by_hand import ByHand
from tensortrace.capture.loss_graph import leaves_near
from tensortrace.capture.tensors import version_of

if TYPE_CHECKING:
    from tensortrace.capture.gradients import Parameters
    from tensortrace.capture.loop.optimizers import Optimizers
    from tensortrace.capture.names import ModuleNames

# How many names of parameters an action carries.
_EXAMPLES = 5
_MOST_LONE = 64


class Carried:
    """Follow gradients from one optimizer step to the next; keeps no tensor alive.

    Where there is no optimizer, `by_hand` follows them from one backward to the next. Where several
    threads train nothing is followed: torch writes ``.grad`` without the lock that Python has, and
    to read one that the backward of another thread writes ends the process.

    Args:
        optimizers: those met so far; shared with the recorder.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self.by_hand = ByHand()
        # By optimizer: group and place of the parameter, identity and version of its gradient.
        self._stepped: dict[int, tuple[int, int, int, int]] = {}
        # Those whose gradient was untouched when the backward that runs began, and where it lay;
        # and those to whose gradient one has added since.
        self._untouched: dict[int, int] = {}
        self._added: set[int] = set()
        self._left: tuple[int, int] | None = None
        self.grown = 0
        # By identity of a lone parameter: identity and version of its gradient, its own version,
        # and the update since which the gradient has only grown.
        self._lone: dict[int, tuple[int, int, int, int]] = {}

    def stepped(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember the first gradient of an optimizer, as its step has left it. Hot."""
        slot.note_training()
        self._stepped.pop(index, None)
        self._added.discard(index)
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is not None:
                    self._stepped[index] = (g, i, id(grad), version_of(grad))
                    return

    def since_step(self) -> dict[str, str]:
        """Tell, as a backward begins, what became of the gradients of earlier optimizer steps. Hot.

        Returns:
            "kept" by optimizer if the gradient is untouched, "changed" if it was written since;
            nothing where there is none any more, or was none.
        """
        fates: dict[str, str] = {}
        self._untouched = {}
        slot.note_training()
        for index, optimizer in self._followed():
            if index not in self._stepped:
                continue
            grad = self._gradient_of(index, optimizer)
            if grad is not None:
                _, _, key, version = self._stepped[index]
                same = id(grad) == key and version_of(grad) == version
                fates[str(index)] = "kept" if same else "changed"
                if same:
                    self._untouched[index] = pointer_of(grad)
        return fates

    def awaits_end(self) -> bool:
        """Whether there is anything to note when the backward that runs has ended. Hot."""
        return bool(self._untouched) or self.by_hand.follows()

    def backward_ended(self) -> None:
        """Note which of the gradients that lay untouched a backward has added to. Hot."""
        self.by_hand.ended()
        untouched, self._untouched = self._untouched, {}
        for index, optimizer in self._followed():
            if index in untouched:
                _, _, key, version = self._stepped[index]
                grad = self._gradient_of(index, optimizer)
                # With create_graph the sum is another tensor, which may be where the old one was.
                now = None if grad is None else (id(grad), version_of(grad), pointer_of(grad))
                if now is not None and now != (key, version, untouched[index]):
                    self._added.add(index)

    def added_to(self, index: int) -> bool | None:
        """Whether a backward has added to the gradient that the last step has left, None if none.

        None has where each step is given gradients that were computed otherwise: for float32 copies
        of the weights, by torch.autograd.grad, by another model.
        """
        return index in self._added if index in self._stepped else None

    def _gradient_of(self, index: int, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """The gradient that is followed of an optimizer, as it is now."""
        g, i, _, _ = self._stepped[index]
        try:
            grad: torch.Tensor | None = optimizer.param_groups[g]["params"][i].grad
        except IndexError:  # its groups are not what they were
            return None
        return grad

    def reached(self, parameters: Iterable[torch.Tensor]) -> list[int]:
        """The numbers of the optimizers that hold any of these parameters."""
        given = set(map(id, parameters))
        return [
            index
            for index, optimizer in self._optimizers.met()
            if any(id(p) in given for group in optimizer.param_groups for p in group["params"])
        ]

    def owner(self, tensors: Sequence[torch.Tensor]) -> int | None:
        """The number of the first optimizer that holds any of these parameters or gradients."""
        wanted = set(map(id, tensors))
        for index, optimizer in self._optimizers.met():
            for group in optimizer.param_groups:
                if any(id(p) in wanted for p in group["params"]) or (
                    not slot.several_train() and any(id(p.grad) in wanted for p in group["params"])
                ):
                    return index
        return None

    def left_over(self, names: ModuleNames) -> dict[str, Any]:
        """Describe, after a zero_grad, the gradients of parameters that no optimizer holds.

        Returns:
            Nothing if there are none. Else ``left`` (how many), ``left_names`` (the first five) and
            ``grown``: over how many calls of zero_grad, running, the first of them was added to.
        """
        if slot.several_train():
            return {}
        held = self._held()
        found: list[tuple[str, torch.Tensor]] = []
        for name, parameter in names.parameters():
            if id(parameter) not in held and parameter.is_leaf and parameter.grad is not None:
                held.add(id(parameter))  # a tied weight has several names
                found.append((name, parameter.grad))
        if not found:
            self._left, self.grown = None, 0
            return {}
        now = (id(found[0][1]), version_of(found[0][1]))
        before, self._left = self._left, now
        if before is None or before[0] != now[0] or before[1] > now[1]:
            self.grown = 0
        elif before[1] < now[1]:
            self.grown += 1
        examples = [name for name, _ in found[:_EXAMPLES]]
        return {"left": len(found), "left_names": examples, "grown": self.grown}

    def moved(self, names: ModuleNames, parameters: Parameters) -> list[str]:
        """Name the parameters for which it is no fault that no optimizer has them by that name.

        They are copies of what one holds, made anew or written by the loop; or the gradient that
        they got was taken by torch.autograd.grad, so that the loop has it and they do not; or they
        are tied, and held by another name.
        """
        if slot.several_train():
            return []
        held = self._held()
        named: dict[int, list[str]] = {}
        for name, p in names.parameters():
            if id(p) in held:
                named.setdefault(id(p), []).append(name)
        tied = (name for known in named.values() if len(known) > 1 for name in known)
        got = [(name, p) for name, p in names.parameters()
               if id(p) not in held and p.is_leaf and parameters.take_reached(p)]  # fmt: skip
        kept = ((name, p) for name, p in got if p.grad is not None)
        return [
            *(name for name, p in got if p.grad is None), *self.by_hand.moved(kept), *tied,
        ]  # fmt: skip

    def lone(
        self, loss: torch.Tensor, names: ModuleNames, parameters: Parameters, update: int
    ) -> tuple[nn.Parameter, dict[str, Any]] | None:
        """Find what a loss has of parameters that neither a module that ran nor an optimizer holds.

        A plain tensor is none of them: an input that requires a gradient may keep it.

        Returns:
            The one whose gradient, there already, has grown over most updates, and ``left`` (how
            many there are), ``left_shape`` and ``left_updates`` (over how many); None if there is
            none. Nobody has written its value meanwhile, as one who updates it by hand does.
        """
        near = (leaf for leaf in leaves_near(loss) if isinstance(leaf, nn.Parameter))
        found = [p for p in near if parameters.name_of(p) is None]
        if not found:
            return None
        held = self._held()
        most: tuple[int, nn.Parameter] | None = None
        count = 0
        for parameter in found:
            if id(parameter) in held or names.owner_of(parameter) is not None:
                continue
            updates = self._grown_over(parameter, update)
            if updates is not None:
                count += 1
                if most is None or updates > most[0]:
                    most = updates, parameter
        if most is None:
            return None
        shape = list(most[1].shape)
        return most[1], {"left": count, "left_shape": shape, "left_updates": most[0]}

    def _grown_over(self, parameter: nn.Parameter, update: int) -> int | None:
        before, grad = self._lone.pop(id(parameter), None), parameter.grad
        if grad is None or grad.layout is not torch.strided:
            return None
        key, version, own = id(grad), version_of(grad), version_of(parameter)
        since = update
        if before is not None and (before[0], before[2]) == (key, own) and before[1] <= version:
            since = before[3]
        if len(self._lone) < _MOST_LONE:
            self._lone[id(parameter)] = key, version, own, since
        # As it was: backward was asked for the gradients of others only.
        grown = before is not None and before[1] < version
        return update - since if grown else None

    def outside(self, parameters: Sequence[torch.Tensor]) -> int:
        """Count those of some parameters that have a gradient and that no optimizer holds."""
        held = self._held()
        return sum(id(p) not in held and p.is_leaf and p.grad is not None for p in parameters)

    def _followed(self) -> Iterator[tuple[int, torch.optim.Optimizer]]:
        for index, optimizer in self._optimizers.met():
            if slot.several_train():  # asked each time: another thread may begin meanwhile
                return
            yield index, optimizer

    def _held(self) -> set[int]:
        met = (optimizer for _, optimizer in self._optimizers.met())
        return {id(p) for o in met for group in o.param_groups for p in group["params"]}
