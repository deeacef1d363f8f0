from typing import TypeAlias

INSTRUCTIONS: str

_Row: TypeAlias = tuple[
    int, int, int, int,
    float | None, float | None, float | None, float | None, float | None,
    None, int | None, tuple[int, ...] | None,
]  # fmt: skip

def measure(address: int, count: int, dtype: int, /) -> _Row: ...
def measure_lean(address: int, count: int, dtype: int, /) -> _Row: ...
def measure_rows(
    address: int, columns: int, dtype: int, rows: int, pitch: int, lean: bool, /
) -> _Row: ...
def measure_closely(address: int, count: int, dtype: int, most: int, run: int, /) -> _Row: ...
def sample(address: int, count: int, dtype: int, most: int, run: int, /) -> bytes: ...
def moved(
    address: int, count: int, dtype: int, most: int, run: int, sample: bytes, /
) -> tuple[float, float]: ...
