from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch

INSTRUCTIONS: str

_Plain = TypeVar("_Plain", list[Any], dict[str, Any])
_Row: TypeAlias = tuple[
    int, int, int, int,
    float | None, float | None, float | None, float | None, float | None,
    None, int | None, tuple[int, ...] | None,
]  # fmt: skip

_Head: TypeAlias = tuple[
    int, tuple[int, ...], tuple[int, ...] | None, str, str, bool, bool, str | None, int
]  # fmt: skip

def prepare(
    tensor: type, parameter: type, dtypes: dict[torch.dtype, tuple[int, str]], small: int,
    least: int, most: int, run: int, /
) -> None: ...  # fmt: skip
def look(tensor: torch.Tensor, number: int, mode: int, /) -> tuple[_Head, _Row] | None: ...
def head(tensor: torch.Tensor, number: int, /) -> _Head | None: ...
def look_all(
    make: Callable[..., Any], table: Any, arrived: tuple[torch.Tensor | None, ...],
    made: tuple[torch.Tensor | None, ...], mode: int, /
) -> tuple[tuple[Any, ...], bool, bool] | None: ...  # fmt: skip
def untracked(plain: _Plain, /) -> _Plain: ...
def name_all(
    kind: type, came: tuple[str, ...], went: tuple[str, ...], grads: tuple[Any, ...], /
) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[Any]] | None: ...  # fmt: skip
def measure(address: int, count: int, dtype: int, /) -> _Row: ...
def measure_lean(address: int, count: int, dtype: int, /) -> _Row: ...
def measure_rows(
    address: int, columns: int, dtype: int, rows: int, pitch: int, lean: bool, /
) -> _Row: ...
def measure_closely(address: int, count: int, dtype: int, most: int, run: int, /) -> _Row: ...
def sample(tensor: torch.Tensor, most: int, run: int, /) -> tuple[bytes, int, int, int] | None: ...
def moved(
    tensor: torch.Tensor, most: int, run: int, taken: tuple[bytes, int, int, int], /
) -> tuple[float, float] | None: ...  # fmt: skip
def count_dead(
    tensor: torch.Tensor, last: torch.Tensor, apart: int, step: float, start: float, /
) -> tuple[int, float] | None: ...  # fmt: skip
def spread(
    tensor: torch.Tensor, rows: int, most_rows: int, most_columns: int, /
) -> float | None: ...  # fmt: skip
