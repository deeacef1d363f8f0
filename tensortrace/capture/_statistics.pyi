from typing import TypeAlias

INSTRUCTIONS: str

_Row: TypeAlias = tuple[
    int, int, int, int,
    float | None, float | None, float | None, float | None, float | None,
    None, int | None,
]  # fmt: skip

def measure(address: int, count: int, dtype: int, /) -> _Row: ...
def measure_many(places: list[tuple[int, int, int]], /) -> list[_Row]: ...
def exponents(address: int, count: int, dtype: int, /) -> tuple[int, ...]: ...
