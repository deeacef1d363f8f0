"""Shapes that do not go together: products, broadcasts, layers, views, targets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from tensortrace.checks.exception.facts import (
    Facts,
    Match,
    Told,
    code_name,
    dims_in,
    first_line,
    operands_text,
    quoted,
    shape_of,
    stated,
)
from tensortrace.text import shape_text


def matmul(facts: Facts, found: Match) -> Told:
    """Two matrices whose inner dims differ."""
    a, b, c, d = map(int, found.groups())
    if facts.settings.get("in_features") == c and facts.entered:
        x = facts.entered[0]
        shape = shape_of(x)
        fix = f"nn.Linear({b}, {d}), or give {facts.place} a tensor whose last dim is {c}"
        if len(shape) > 2 and math.prod(shape[1:]) == c:
            fix = f"{code_name(x, 'x')}.flatten(1)  # [{shape[0]}, {c}]"
        return Told(
            f"mat1 is {shape_text(shape)}, weight of {facts.place} wants [*, {c}]: the last dim of "
            f"{quoted(x['name'])} ({b}) must equal in_features ({c})",
            f"a linear layer multiplies the last dim of its input by its weight [{d}, {c}]", fix,
        )  # fmt: skip
    left, right = _pair(facts, lambda s: s[-1] == b, lambda s: s[-2:] in ((c, d), (c,)))
    one, other = code_name(left, "a"), code_name(right, "b")
    fix = f"give {other} a first dim of {b}"
    if b == d or a == c:
        fix = f"{one} @ {other}.T" if b == d else f"{one}.T @ {other}"
    told = (f"{stated(left)}, {stated(right)}" if left and right
            else f"the matrices are [{a}, {b}] and [{c}, {d}]")  # fmt: skip
    return Told(
        f"{told}: the last dim of {quoted(left['name']) if left else 'the first'} ({b}) must equal "
        f"the first dim of {quoted(right['name']) if right else 'the second'} ({c})",
        "a matrix product sums over the last dim of the left and the first of the right", fix,
    )  # fmt: skip


def _pair(
    facts: Facts,
    left: Callable[[tuple[int, ...]], bool],
    right: Callable[[tuple[int, ...]], bool],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The two operands whose shapes torch complains of, in order."""
    shaped = [one for one in facts.tensors() if shape_of(one)]
    for i, one in enumerate(shaped):
        if left(shape_of(one)):
            for other in shaped[i + 1 :] + shaped[:i]:
                if right(shape_of(other)):
                    return one, other
    return None, None


def batched_matmul(facts: Facts, found: Match) -> Told:
    """Batches of matrices that cannot be multiplied."""
    batch, inner, batch_2, inner_2 = map(int, found.groups())
    left, right = _pair(facts, lambda s: len(s) > 2 and s[-1] == inner,
                        lambda s: len(s) > 2 and s[-2] == inner_2)  # fmt: skip
    told = f"{stated(left)}, {stated(right)}" if left and right else first_line(facts.text)
    one, other = code_name(left, "a"), code_name(right, "b")
    first = left["name"] if left else "the first"
    second = right["name"] if right else "the second"
    if batch != batch_2:
        return Told(
            f"{told}: the batch dims differ, {batch} and {batch_2}",
            "a batched product pairs the matrices of both sides one by one",
            f"give {other} the batch of {one}, or use torch.matmul, which broadcasts a batch of 1",
        )
    turned = right is not None and shape_of(right)[-1] == inner
    return Told(
        f"{told}: the last dim of {quoted(first)} ({inner}) must equal the last but one of "
        f"{quoted(second)} ({inner_2})",
        "a batched product sums over the last dim of the left and the last but one of the right",
        f"{one} @ {other}.transpose(-2, -1)"
        if turned
        else f"give {other} a last but one dim of {inner}",
    )


def vector(facts: Facts, found: Match) -> Told:
    """A matrix or vector times a vector of another length."""
    have, want = (int(n) for n in found.groups()[-2:])
    left, right = _pair(facts, lambda s: s[-1] == have, lambda s: s == (want,))
    told = f"{stated(left)}, {stated(right)}" if left and right else first_line(facts.text)
    first = quoted(left["name"] if left else "the first")
    second = quoted(right["name"] if right else "the second")
    return Told(
        f"{told}: the last dim of {first} ({have}) must equal the length of {second} ({want})",
        "a product with a vector sums over its only dim",
        f"give {code_name(right, 'the vector')} {have} elements",
    )


def broadcast(facts: Facts, found: Match) -> Told:
    """Two shapes that do not broadcast."""
    a, b, dim = map(int, found.groups())
    shaped = [one for one in facts.tensors() if shape_of(one)]
    for i, one in enumerate(shaped):
        for other in shaped[i + 1 :]:
            clash = _clash(shape_of(one), shape_of(other))
            if clash is None or {clash[1], clash[2]} != {a, b}:
                continue
            _, left, right = clash
            small, large = sorted((one, other), key=lambda t: len(shape_of(t)))
            fix = "give both the same shape, or a dim of 1 where they differ"
            gap = len(shape_of(large)) - len(shape_of(small))
            if gap and _clash(shape_of(small) + (1,) * gap, shape_of(large)) is None:
                fix = f"{code_name(small, 'it')}[{', '.join(['...'] + ['None'] * gap)}]"
                fix += f"  # {shape_text(shape_of(small) + (1,) * gap)}"
            return Told(
                f"{stated(one)}, {stated(other)}: they do not broadcast, dim {dim} is {left} in "
                f"{quoted(one['name'])} and {right} in {quoted(other['name'])}",
                "shapes are compared from the last dim; two dims fit if equal or if one is 1", fix,
            )  # fmt: skip
    seen = operands_text(facts)
    return Told(
        f"two tensors do not broadcast: dim {dim} is {a} in the first and {b} in the second"
        + (f" ({seen})" if seen else ""),
        "shapes are compared from the last dim; two dims fit if equal or if one is 1",
        "give both the same shape, or a dim of 1 where they differ",
    )


def _clash(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The last dim, counted from the end, in which two shapes do not broadcast."""
    for i, (a, b) in enumerate(zip(reversed(left), reversed(right), strict=False)):
        if a != b and 1 not in (a, b):
            return i, a, b
    return None


def channels(facts: Facts, found: Match) -> Told:
    """A convolution that gets another number of channels."""
    shape, want, got = dims_in(found[1]), int(found[2]), int(found[3])
    name = facts.entered[0]["name"] if facts.entered else "the input"
    code = code_name(facts.entered[0] if facts.entered else None, "x")
    fix = f"in_channels={got}, or give {facts.place} {want} channels"
    if len(shape) > 2 and shape[-1] == want:
        order = (0, len(shape) - 1, *range(1, len(shape) - 1))
        fix = f"{code}.permute({', '.join(map(str, order))})  # channels come second"
    return Told(
        f"{quoted(name)} is {shape_text(shape)}, {facts.place} wants {want} channels: dim 1 is "
        f"{got}, in_channels is {want}",
        "a convolution reads [batch, channels, ...]; dim 1 must be its in_channels", fix,
    )  # fmt: skip


def features(facts: Facts, found: Match) -> Told | None:
    """A norm or a recurrent layer that gets another number of features."""
    x = facts.entered[0] if facts.entered else facts.argument("input")
    want = next((facts.settings[k] for k in ("num_features", "normalized_shape", "input_size")
                 if k in facts.settings), None)  # fmt: skip
    if x is None or not shape_of(x) or want is None:
        return None
    dim = "dim 1" if "num_features" in facts.settings else "the last dim"
    text = str(list(want)) if isinstance(want, (list, tuple)) else str(want)
    got = shape_of(x)[1] if dim == "dim 1" and len(shape_of(x)) > 1 else shape_of(x)[-1]
    return Told(
        f"{stated(x)}, {facts.place} wants {text}: {dim} is {got}",
        f"{facts.place} was made for {text} features",
        f"make {facts.place} with {got}, or give it a tensor with {text} there",
    )


def norm_of_one(facts: Facts, found: Match) -> Told:
    """A norm that has one value for each of its channels."""
    why = "the variance of one value is 0: nothing could be learnt from what comes out"
    if "spatial" in found[0]:
        return Told(
            f"{facts.place} normalises each channel over its positions, and [{found[1]}] has one",
            why, "a larger image, fewer strides or poolings before it, or nn.LayerNorm",
        )  # fmt: skip
    return Told(
        f"{facts.place} normalises over the batch, and [{found[1]}] has one value for each channel",
        f"{why} (see TT707)",
        "DataLoader(..., drop_last=True) if it is the last batch; a larger batch; model.eval() for "
        "one sample; nn.GroupNorm or nn.LayerNorm, which need no batch",
    )


def viewed(facts: Facts, found: Match) -> Told:
    """A shape that the elements of a tensor do not fill."""
    one = next((one for one in facts.operands if "dtype" in one), None)
    told = f"{stated(one)}, " if one else ""
    rest = math.prod(n for n in map(int, re.findall(r"-?\d+", found[1])) if n > 0)
    count = int(found[2])
    fix = "-1 for one dim lets torch find it"
    if rest and count % rest:
        fix = f"the dims given make {rest}, which does not divide {count}"
    return Told(
        f"{told}{count} elements: they cannot be arranged as {found[1]}",
        "another shape has as many elements as the tensor", fix,
    )  # fmt: skip


def joined(facts: Facts, found: Match) -> Told:
    """Tensors that cannot be concatenated or stacked."""
    parts = [one for one in facts.operands if one["name"].endswith("]") and shape_of(one)]
    told = ", ".join(stated(one) for one in parts[:4]) or first_line(facts.text)
    return Told(
        f"{told}: they cannot be joined, all dims but the joined one must be equal",
        first_line(facts.text), "cut or pad what differs, or join along the dim that differs",
    )  # fmt: skip


def collated(facts: Facts, found: Match) -> Told | None:
    """Samples of a dataset that do not make a batch; None of another stack."""
    two = re.search(r"got \[([\d, ]*)\] at entry (\d+) and \[([\d, ]*)\] at entry (\d+)",
                    facts.text)  # fmt: skip
    if two is None or not any("collate" in name for name in facts.torch):
        return None
    first, other = dims_in(two[1]), dims_in(two[3])
    fix = "resize, crop or pad them to one shape in the dataset, or in a collate_fn of your own"
    if len(first) == len(other) == 3 and first[1:] == other[1:] and {first[0], other[0]} <= {1, 3}:
        fix = 'open every image as Image.open(path).convert("RGB"): one of 1 channel is grey'
    return Told(
        f"the samples of the dataset differ in shape: {shape_text(first)} at place {two[2]} of the "
        f"batch, {shape_text(other)} at place {two[4]}",
        "the collate_fn of the DataLoader stacks them to a batch, and all must have one shape",
        fix,
    )


def hidden_state(facts: Facts, found: Match) -> Told | None:
    """A hidden state that is not [layers, batch, features]; None where nothing is known of it."""
    want, got = dims_in(found[1]), dims_in(found[2])
    if len(want) != 3 or len(got) != 3:
        return None
    told = f"the hidden state of {facts.place} is {shape_text(got)}, and has to be "
    told += shape_text(want)
    why = "its dims are layers times directions, batch, features"
    if want[0] != got[0] or want[2] != got[2]:
        return Told(told, why, f"torch.zeros{want}")
    first = shape_of(facts.entered[0])[:1] if facts.entered else ()
    batch = f"x.size({0 if first == want[1:2] else 1})"
    return Told(
        f"{told}: it is that of a batch of {got[1]}, and this one is of {want[1]}", why,
        f"make it from the batch, torch.zeros({want[0]}, {batch}, {want[2]}); if only the last "
        "batch of the data is smaller, DataLoader(..., drop_last=True)",
    )  # fmt: skip


def target(facts: Facts, found: Match) -> Told | None:
    """A target whose shape the loss does not take."""
    x, y = facts.argument("input"), facts.argument("target")
    if x is None or y is None:
        return None
    logits, target = shape_of(x), shape_of(y)
    told = f"{stated(y)}, {stated(x)}"
    name = code_name(y, "target")
    if facts.function not in ("cross_entropy", "nll_loss"):
        fix = "give both one shape"
        if math.prod(logits) == math.prod(target):
            fix = f"{name}.view_as({code_name(x, 'input')})"
        return Told(
            f"{told}: {facts.function} wants the same shape for both",
            "one target for each number that the model gives", fix,
        )  # fmt: skip
    want = (logits[0], *logits[2:]) if len(logits) > 1 else ()
    fix = f"give the target the shape {shape_text(want)}"
    if len(target) > 1 and target[:1] + target[2:] == want and target[1] == 1:
        fix = f"{name}.squeeze(1)  # {shape_text(want)}"
    elif target == logits:
        fix = f"{name}.argmax(1), or {name}.float() for class probabilities"
    elif math.prod(target) == math.prod(want):
        fix = f"{name}.view({', '.join(map(str, want))})"
    elif len(logits) == 3 and target == logits[:2]:
        fix = f"{facts.function}({code_name(x, 'logits')}.transpose(1, 2), {name})"
    return Told(
        f"{told}: {facts.function} wants class indices of shape {shape_text(want)}",
        "a target is one class index for each row of the logits, without a dim for the classes",
        fix,
    )
