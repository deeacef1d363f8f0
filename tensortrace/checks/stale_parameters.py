"""TT405: an optimizer that holds older copies of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tensortrace.checks import Draft, StepView, check, unheld

_Shape = tuple[int, ...]


@check("TT405", "stale-parameters", until=("threads",))
def stale_parameters(
    step: StepView, memory: dict[str, Any], *, updates: int = 4
) -> Iterator[Draft]:
    """The optimizer holds older copies of parameters that the model has replaced.

    Symptom:    the loss does not fall, or a resized layer stays at its initial weights, although
                the optimizer was given model.parameters()
    Threshold:  in `updates` optimizer steps running parameters have gradients and no optimizer,
                while an optimizer that steps holds parameters without gradient that no module that
                ran has (any more), of the same shapes or, for a resized one and its bias, of the
                same but for the first dim. An error if each of those has its match in shape, of two
                dims or more
    Source:     torch.optim docs up to 1.13, on .cuda() after the optimizer was made: parameters
                "will be different objects with those before the call"; `updates` as in TT401
    Fix:        make the optimizer after the model is what it will be: after resize, copy.deepcopy,
                weight_norm or a wrapper, .to(); or exchange what it holds in
                optimizer.param_groups and its state
    Misses:     a module that ran before and still lives beside its copy keeps its names, so that
                is TT401; flattened parameters (FSDP) have other shapes; copies that get zeros as
                gradients from zero_grad(set_to_none=False)
    Example:    optimizer = torch.optim.AdamW(model.parameters())
                model.resize_token_embeddings(len(tokenizer))
    Fixed:      model.resize_token_embeddings(len(tokenizer))
                optimizer = torch.optim.AdamW(model.parameters())
    """
    missing = unheld(step)
    unowned: dict[int, list[_Shape]] = memory.setdefault("unowned", {})
    running: dict[int, int] = memory.setdefault("running", {})
    for optimizer in step.optimizers:
        index = optimizer.index
        if optimizer.parameters is not None:
            unowned[index] = [tuple(shape) for shape in optimizer.unowned]
        old = unowned.get(index, ())
        if optimizer.skipped:
            continue
        running[index] = running.get(index, 0) + 1 if old and optimizer.no_grad >= len(old) else 0
        if not (running[index] and missing):
            continue
        forgotten = {name: shape for path, (count, names) in missing.items() if count >= updates
                     for name, shape in _shapes(step, path, names)}  # fmt: skip
        pairs = _matched(old, forgotten) if running[index] >= updates else []
        if not pairs:
            continue
        exact = sum(one == forgotten[name] for one, name in pairs)
        certain = exact == len(old) and any(len(one) > 1 for one, _ in pairs)
        one, name = next((pair for pair in pairs if pair[0] != forgotten[pair[1]]), pairs[0])
        yield Draft(
            message=f"optimizer {index}, {optimizer.cls}, holds {len(old)} parameters that no "
            f"module that ran has and that get no gradient, {running[index]} steps running (limit "
            f"{updates}); {len(pairs)} like them with gradients in no optimizer: {name} "
            f"{list(forgotten[name])} for {list(one)}",
            cause=f"optimizer {index}", severity="error" if certain else "warning",
            phase="optimizer", module=name.rpartition(".")[0], param=name, value=len(pairs),
            limit=0, location=optimizer.location,
            evidence={"optimizer": index, "parameters": [name for _, name in pairs]},
        )  # fmt: skip


def _shapes(step: StepView, path: str, names: list[str]) -> Iterator[tuple[str, _Shape]]:
    shapes = {p.name: tuple(p.shape) for p in step.modules[path].parameters}
    for name in names:
        yield name, shapes[name.removeprefix(f"{path}.")]


def _matched(old: Sequence[_Shape], forgotten: dict[str, _Shape]) -> list[tuple[_Shape, str]]:
    """Pair each older shape with a parameter of the same, then of another first dim."""
    pairs: list[tuple[_Shape, str]] = []
    left = dict(forgotten)
    rest: list[_Shape] = []
    for one in old:
        name = next((n for n, shape in left.items() if shape == one), None)
        if name is None:
            rest.append(one)
        else:
            del left[name]
            pairs.append((one, name))
    for one in rest:
        # Vectors are alike too easily: only the bias of a layer whose weight is matched counts.
        layers = {name.rpartition(".")[0] for _, name in pairs}
        name = next((n for n, s in left.items() if len(s) == len(one) and s[1:] == one[1:]
                     and (len(one) > 1 or n.rpartition(".")[0] in layers)), None)  # fmt: skip
        if name is not None:
            del left[name]
            pairs.append((one, name))
    return pairs
