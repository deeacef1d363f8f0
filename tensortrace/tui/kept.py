"""What was made lately, so many at most."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(dict[K, V]):
    """A dict of at most `most` things: the eldest is given up first.

    Textual's own cache is a ring of lists: of one that is dropped with its table, all that it held
    waits for the garbage collector, which stops the screen. This one goes by itself.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.most and key not in self:
            del self[next(iter(self))]
        super().__setitem__(key, value)
