"""Codecs of the mask bytes: what ``save_masked(codec=...)`` takes."""

import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class Codec:
    """A lossless pair of functions over bytes.

    Args:
        compress: of the packed mask.
        decompress: ``decompress(data, limit)`` undoes it, up to ``limit`` bytes: a small file
            cannot ask for a lot of memory. Raises ``ValueError`` for data that is not its own.
    """

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes]


def _raw(data: bytes, limit: int) -> bytes:
    return data[:limit]


def _zlib(data: bytes, limit: int) -> bytes:
    # A limit of 0 would mean "no limit" to zlib.
    try:
        return zlib.decompressobj().decompress(data, max(limit, 1))[:limit]
    except zlib.error as error:
        raise ValueError(f"zlib: {error}") from error


def _compress_lzma(data: bytes) -> bytes:
    # The file's digest already covers the bytes, so the stream carries no check of its own.
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE)


def _lzma(data: bytes, limit: int) -> bytes:
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, limit)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"lzma: {error}") from error


CODECS = {
    "raw": Codec(bytes, _raw),
    "zlib": Codec(lambda data: zlib.compress(data, 9), _zlib),
    "lzma": Codec(_compress_lzma, _lzma),
}
"""Codecs by the name a file records; earlier ones win ties under ``"auto"``."""


def check_codec(name: str) -> None:
    if name != AUTO and name not in CODECS:
        raise ValueError(f"codec: got {name!r}, expected one of {', '.join((AUTO, *CODECS))}")


def compress(data: bytes, name: str = AUTO) -> tuple[str, bytes]:
    """The codec used, and ``data`` under it; ``"auto"`` uses the one with the smallest result."""
    check_codec(name)
    names = CODECS if name == AUTO else (name,)
    return min(
        ((codec, CODECS[codec].compress(data)) for codec in names), key=lambda pair: len(pair[1])
    )


def decompress(data: bytes, name: str, size: int) -> bytes:
    """The ``size`` bytes that became ``data``; raises ``ValueError`` if it holds fewer or more."""
    plain = CODECS[name].decompress(data, size + 1)
    if len(plain) != size:
        count = f"{len(plain)}" if len(plain) < size else f"more than {size}"
        raise ValueError(f"codec {name}: got {count} bytes, expected {size}")
    return plain
