"""Which of the times that a thing happens over and over are recorded."""

# The first ones; after them those at powers of two.
_FIRST = 3


def is_taken(nth: int) -> bool:
    """Whether a thing that happens over and over is recorded this time (from 0)."""
    return nth < _FIRST or not (nth + 1) & nth
