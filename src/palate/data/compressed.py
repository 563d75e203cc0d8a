"""Compressed files as plain streams. A stream that ends too early is an error, never a shorter file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import zstandard

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What the streams raise when their file is damaged."""

_CHUNK = 1 << 16


class _Zstd(io.RawIOBase):
    """The frames of a .zst file. zstandard's own reader takes a torn frame for the end of the file, in silence."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (count := self._ready.readinto(buffer)) and self._advance():
            pass
        return count

    def _advance(self) -> bool:
        """Decompress some more; False at the end of the file."""
        raw = self._frame.unused_data if self._frame.eof else b""
        raw = raw or self._file.read(_CHUNK)
        if not raw:
            if self._begun and not self._frame.eof:
                raise EOFError("the last frame is not whole")
            return False
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = True
        self._ready = io.BytesIO(self._frame.decompress(raw))
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd(path: Path, mode: str) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(_Zstd(path)))


OPENERS: Mapping[str, Callable[..., IO[bytes]]] = {
    ".gz": cast(Callable[..., IO[bytes]], gzip.open),
    ".xz": cast(Callable[..., IO[bytes]], lzma.open),
    ".bz2": cast(Callable[..., IO[bytes]], bz2.open),
    ".zst": _zstd,
}
"""How a file of each ending is opened; every other file is plain."""


def opened(path: Path) -> IO[bytes]:
    """The plain content of a file."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")
