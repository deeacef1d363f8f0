"""Zstandard from wherever it is: Python itself since 3.14, else the package `zstandard`.

Both are used through four small functions, so that nothing else needs to know which it is. Each
raises ImportError if neither is there.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

MAGIC = b"\x28\xb5\x2f\xfd"
LEVEL = 3
INSTALL = "pip install 'tensortrace[zstd]'"


class Decoder(Protocol):
    """Unpacks one frame; what `zlib.decompressobj` returns is one, too."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""

    @property
    def unused_data(self) -> bytes:
        """What came after its end."""

    def decompress(self, data: bytes, /) -> bytes:
        """Unpack some more, as far as it can be."""


class Encoder(Protocol):
    """Packs one frame piece by piece."""

    def block(self, data: bytes) -> bytes:
        """Pack so that everything so far can be unpacked."""

    def end(self) -> bytes:
        """End the frame."""


def decoder() -> Decoder:
    """Make what unpacks one frame."""
    own = _of_python()
    if own is not None:
        return cast(Decoder, own.ZstdDecompressor())
    return cast(Decoder, importlib.import_module("zstandard").ZstdDecompressor().decompressobj())


def encoder() -> Encoder:
    """Make what packs one frame, with a checksum: the same input gives the same bytes."""
    own = _of_python()
    if own is not None:
        return _PythonEncoder(own)
    return _PackageEncoder(importlib.import_module("zstandard"))


def available() -> bool:
    """Whether there is any."""
    try:
        encoder()
    except ImportError:
        return False
    return True


def errors() -> tuple[type[Exception], ...]:
    """What unpacking raises on damaged data."""
    own = _of_python()
    module = importlib.import_module("zstandard") if own is None else own
    return (cast("type[Exception]", module.ZstdError),)


def _of_python() -> Any:
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return None


class _PythonEncoder:
    def __init__(self, module: Any) -> None:
        options = {
            module.CompressionParameter.compression_level: LEVEL,
            module.CompressionParameter.checksum_flag: 1,
        }
        self._packer = module.ZstdCompressor(options=options)

    def block(self, data: bytes) -> bytes:
        return cast(bytes, self._packer.compress(data, self._packer.FLUSH_BLOCK))

    def end(self) -> bytes:
        return cast(bytes, self._packer.flush(self._packer.FLUSH_FRAME))


class _PackageEncoder:
    def __init__(self, module: Any) -> None:
        packer = module.ZstdCompressor(level=LEVEL, write_checksum=True)
        self._packer = packer.compressobj()
        self._block = module.COMPRESSOBJ_FLUSH_BLOCK
        self._finish = module.COMPRESSOBJ_FLUSH_FINISH

    def block(self, data: bytes) -> bytes:
        return cast(bytes, self._packer.compress(data) + self._packer.flush(self._block))

    def end(self) -> bytes:
        return cast(bytes, self._packer.flush(self._finish))
