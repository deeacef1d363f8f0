"""Writing a log compressed with zstd, in frames that a crash cannot spoil.

Every flush ends a block, and whatever blocks are there can be unpacked: of a process that is killed
nothing is lost that a plain log would hold. After about 1 MB of lines a new frame begins, which
needs none of those before it, so damage costs one frame.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from tensortrace.errors import LogError
from tensortrace.log import zstd
from tensortrace.log.writing import LogWriter

FRAME = 1 << 20


class _Piece(NamedTuple):
    """Lines that were packed in one go, and where they end: as lines, and in the file."""

    lines: bytes
    nbytes: int
    packed_nbytes: int


class PackedWriter(LogWriter):
    """Writes ``.zst``; `nbytes` counts the lines as they are before they are packed.

    A KeyboardInterrupt may come between any two steps here, and what was compressed once cannot be
    taken back. So the pieces of the frame are kept: after an interrupt it is packed again up to
    there, which gives the same bytes, and a piece that was packed is written out before the next.
    """

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(path, fd)
        self._encoder = zstd.encoder()
        self._in_step = True  # whether the encoder holds the frame's pieces and nothing else
        self._frame: list[_Piece] = []
        self._begin = 0  # lines before this frame, in bytes
        # Packed but perhaps not written: the bytes, and the frame and its begin as they are then.
        self._next: tuple[bytes, list[_Piece], int] | None = None

    def _hand_on(self, data: memoryview) -> int:
        if self._next is None:
            self._next = self._pack(bytes(data))
        packed, frame, begin = self._next
        if self._flushed < frame[-1].packed_nbytes:
            super()._hand_on(memoryview(packed))
        self._frame, self._begin, self._next, self._in_step = frame, begin, None, True
        return len(frame[-1].lines)

    def _pack(self, lines: bytes) -> tuple[bytes, list[_Piece], int]:
        encoder, frame, begin, packed = self._current(), self._frame, self._begin, b""
        self._in_step = False
        before = frame[-1].nbytes if frame else begin
        if before - begin >= FRAME:
            packed, begin, frame = encoder.end(), before, []
            self._encoder = encoder = zstd.encoder()
        packed += encoder.block(lines)
        end = _Piece(lines, before + len(lines), self._flushed + len(packed))
        return packed, [*frame, end], begin

    def _current(self) -> zstd.Encoder:
        """The encoder after the pieces of the frame."""
        if not self._in_step:
            self._encoder = zstd.encoder()
            for piece in self._frame:
                self._encoder.block(piece.lines)
            self._in_step = True
        return self._encoder

    def truncate(self, nbytes: int) -> None:
        """Take back all but the first `nbytes` bytes of lines; they end in the last frame."""
        if os.getpid() != self._pid:
            return
        if self._closed:
            raise LogError(f"{self._name} is closed: it cannot go on")
        self.flush()
        if nbytes < self._begin:
            raise LogError(f"cannot go on with {self._name}: its frame is closed")
        kept = [piece for piece in self._frame if piece.nbytes <= nbytes]
        low = kept[-1].nbytes if kept else self._begin
        cut = self._frame[len(kept)].lines[: nbytes - low] if len(kept) < len(self._frame) else b""
        first = self._frame[0] if self._frame else None
        start = first.packed_nbytes - len(self._repack(first)) if first else self._flushed
        self._cut_file(kept[-1].packed_nbytes if kept else start)
        self._frame, self._in_step, self.nbytes = kept, False, nbytes
        self._buffer += cut
        self.flush()

    def _repack(self, piece: _Piece) -> bytes:
        """The bytes that the first piece of a frame takes in the file."""
        return zstd.encoder().block(piece.lines)

    def close(self) -> None:
        """Flush, end the frame and let go; closing again does nothing."""
        if os.getpid() != self._pid or self._closed:
            return
        self.flush()
        if self._frame:
            with contextlib.suppress(OSError):  # a frame without an end can be read, too
                os.write(self._fd, self._current().end())
        super().close()
