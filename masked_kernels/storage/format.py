"""The contents of a file and its bytes: safetensors, manifest, digest (docs/format.md)."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..mask import PackedMask
from ..models.registry import ModelSpec
from ..prototype import Prototype
from .codecs import CODECS, decompress
from .origin import Origin

KEY = "masked_kernels"
VERSION = 2
KINDS = ("linear", "conv2d")
VALUES = ("prototype", "weight", "kept")

_NO_DIGEST = "0" * 64


class FormatError(ValueError):
    """A file that is damaged, of another kind or version, or does not fit the model."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of any FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error.__cause__


@dataclass(frozen=True)
class LayerRecord:
    """One masked layer of the file.

    Args:
        name: of the module in its model.
        kind: ``linear`` or ``conv2d``.
        shape: of the weight.
        geometry: constructor arguments, as the layer classes of ``nn`` report them.
        codec: of the bytes in the tensor ``mask/NAME``.
        values: name of the frozen values: ``prototype/NUMBER``; ``weight/LAYER``, a dense weight;
            or ``kept/LAYER``, a dense weight without the elements that its mask drops.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    geometry: dict[str, Any]
    codec: str
    values: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.codec not in CODECS:
            raise ValueError(f"codec: got {self.codec!r}, expected one of {', '.join(CODECS)}")
        if self.values.partition("/")[0] not in VALUES:
            raise ValueError(f"values: got {self.values!r}, expected one of {', '.join(VALUES)}")
        if not all(isinstance(size, int) and size >= 0 for size in self.shape):
            raise ValueError(f"shape: got {self.shape}, expected sizes")
        if not isinstance(self.geometry, dict):
            raise ValueError(f"geometry: got {self.geometry!r}, expected an object")

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Contents:
    """Everything in a file.

    Args:
        model: the call that rebuilds the model, if ``create_model`` built it.
        layers: masked layers, in module order.
        tied: further names of stored tensors, as ``{name: stored name}``.
        origins: of the prototypes that are not stored as they are.
        tensors: stored tensors: ``mask/LAYER`` (uint8, under the layer's codec), ``seed/NUMBER``
            (int64), ``prototype/NUMBER``, ``weight/LAYER``, ``kept/LAYER``, ``bias/LAYER``,
            ``scale/LAYER``, and ``state/NAME`` for the rest of the model's state.
    """

    model: ModelSpec | None
    layers: tuple[LayerRecord, ...]
    tied: dict[str, str]
    origins: dict[str, Origin]
    tensors: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of that name, tied or not; None if the file has none."""
        return self.tensors.get(self.tied.get(name, name))

    def require(self, name: str) -> Tensor:
        tensor = self.tensor(name)
        if tensor is None:
            raise FormatError(f"got no tensor {name!r}, expected it from the manifest")
        return tensor

    def mask(self, layer: LayerRecord) -> PackedMask:
        stored = self.require(f"mask/{layer.name}")
        try:
            data = decompress(stored.numpy().tobytes(), layer.codec, (layer.numel + 7) // 8)
            return PackedMask.from_bytes(data, layer.shape)
        except ValueError as error:
            raise FormatError(f"mask of layer {layer.name!r}: {error}") from error

    def values_dtype(self, layer: LayerRecord) -> torch.dtype:
        origin = self.origins.get(layer.values)
        return origin.torch_dtype if origin else self.require(layer.values).dtype

    def period(self, layer: LayerRecord) -> int | None:
        """Of the layer's prototype; None for a dense weight."""
        if not layer.values.startswith("prototype/"):
            return None
        origin = self.origins.get(layer.values)
        return origin.period if origin else self.require(layer.values).numel()

    def make_values(self, layer: LayerRecord) -> Tensor | Prototype:
        """The layer's frozen values, on the CPU: a dense weight, or a new Prototype."""
        stored = self.tensor(layer.values)
        try:
            if layer.values in self.origins:
                return self.origins[layer.values].make(stored)
            if stored is None or layer.values.startswith("weight/"):
                return self.require(layer.values)
            if layer.values.startswith("prototype/"):
                return Prototype(stored)
            kept = self.mask(layer).unpack()
            if tuple(stored.shape) != (count := int(kept.sum()),):
                raise ValueError(f"got shape {tuple(stored.shape)}, expected ({count},)")
        except ValueError as error:
            raise FormatError(f"values of layer {layer.name!r}: {error}") from error
        return stored.new_zeros(layer.shape).masked_scatter_(kept, stored)

    def state_names(self) -> set[str]:
        """Names, in the model, of the tensors that belong to no masked layer."""
        names = (*self.tensors, *self.tied)
        return {name.removeprefix("state/") for name in names if name.startswith("state/")}


def encode(contents: Contents) -> bytes:
    """The bytes of the file; equal contents give equal bytes."""
    seeds = {seed: name for name, seed in _seeds(contents.tensors).items()}
    manifest = {
        "version": VERSION,
        "sha256": _NO_DIGEST,
        "model": contents.model and asdict(contents.model),
        "layers": [asdict(layer) for layer in contents.layers],
        "tied": contents.tied,
        "origins": {name: o.to_dict(seeds) for name, o in contents.origins.items()},
    }
    # One metadata entry only: safetensors writes several in no fixed order.
    metadata = {KEY: json.dumps(manifest, separators=(",", ":"))}
    data = safetensors.torch.save(contents.tensors, metadata)
    return data.replace(_digest_field(_NO_DIGEST), _digest_field(_digest(data, _NO_DIGEST)), 1)


def decode(data: bytes) -> Contents:
    """The contents of a file; ``FormatError`` if incomplete, altered or of another kind."""
    manifest = _manifest(data)
    recorded = str(manifest.get("sha256"))
    if (actual := _digest(data, recorded)) != recorded:
        raise FormatError(
            f"altered: its SHA-256 is {actual[:12]}..., expected {recorded[:12]}... as saved"
        )
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise FormatError(f"damaged container: {error}") from error
    try:
        seeds = _seeds(tensors)
        spec = manifest["model"]
        contents = Contents(
            model=None if spec is None else ModelSpec(spec["name"], dict(spec["arguments"])),
            layers=tuple(
                LayerRecord(**{**fields, "shape": tuple(fields["shape"])})
                for fields in manifest["layers"]
            ),
            tied=dict(manifest["tied"]),
            origins={
                name: Origin.from_dict(fields, seeds)
                for name, fields in manifest["origins"].items()
            },
            tensors=tensors,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"malformed manifest: {error!r}") from error
    _check_names(contents)
    return contents


def read(path: Path) -> tuple[Contents, int]:
    """The checked contents of the file at ``path``, and its size in bytes."""
    data = path.read_bytes()
    with naming(path):
        return decode(data), len(data)


def write(path: Path, data: bytes) -> None:
    """Replace the file at ``path`` in one step: it is the old one, then the whole new one."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _manifest(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or data[8:9] != b"{":
        raise FormatError(f"got {len(data)} bytes that are no safetensors file")
    if 8 + size > len(data):
        raise FormatError(
            f"truncated: got {len(data)} bytes, expected a header of {size} after the first 8"
        )
    header = _json_object(data[8 : 8 + size], "header")
    metadata = header.get("__metadata__")
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FormatError(f"got a safetensors file without {KEY} metadata, expected a saved model")
    manifest = _json_object(text, "manifest")
    if manifest.get("version") != VERSION:
        raise FormatError(f"got format version {manifest.get('version')}, expected {VERSION}")
    expected = 8 + size + _data_size(header)
    if len(data) < expected:
        raise FormatError(f"truncated: got {len(data)} bytes, expected {expected}")
    return manifest


def _json_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"damaged {what}: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"damaged {what}: got {type(value).__name__}, expected an object")
    return value


def _data_size(header: dict[str, Any]) -> int:
    """Bytes after the header; 0 if the header is too damaged to tell: the digest will."""
    try:
        return max(
            (t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"),
            default=0,
        )
    except (KeyError, IndexError, TypeError):
        return 0


def _digest_field(digest: str) -> bytes:
    # The manifest is a JSON string inside the container's JSON header, hence the backslashes.
    return rf"\"sha256\":\"{digest}\"".encode()


def _digest(data: bytes, recorded: str) -> str:
    """SHA-256 of a file with zeros for the digits of the digest ``recorded`` in its header."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[:start].replace(_digest_field(recorded), _digest_field(_NO_DIGEST))
    sha256 = hashlib.sha256(header)
    sha256.update(memoryview(data)[start:])
    return sha256.hexdigest()


def _seeds(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The seeds that are stored, by the tensor's name."""
    seeds = {name: t for name, t in tensors.items() if name.startswith("seed/")}
    for name, t in seeds.items():
        if t.dtype != torch.int64 or t.shape != (1,):
            raise ValueError(f"{name}: got {t.dtype} {tuple(t.shape)}, expected torch.int64 (1,)")
    return {name: int(t) for name, t in seeds.items()}


def _check_names(contents: Contents) -> None:
    """Every tensor that the manifest needs is there, and every tensor that is there has a use."""
    used = set()
    largest = max((layer.numel for layer in contents.layers), default=0)
    for layer in contents.layers:
        contents.require(f"mask/{layer.name}")
        origin = contents.origins.get(layer.values)
        if origin is None or origin.draw is None:
            contents.require(layer.values)
        if origin is not None and origin.period > largest:  # a small file cannot ask for much
            raise FormatError(
                f"{layer.values!r}: got period {origin.period}, expected at most {largest}"
            )
        used |= {layer.values, *(f"{part}/{layer.name}" for part in ("mask", "bias", "scale"))}
    seeds = {seed for origin in contents.origins.values() for seed in origin.seeds().values()}
    used |= {name for name, seed in _seeds(contents.tensors).items() if seed in seeds}
    for name in contents.origins.keys() - used:
        raise FormatError(f"got the origin of {name!r}, which no layer of the manifest uses")
    for name in (*contents.tensors, *contents.tied):
        if name not in used and not name.startswith("state/"):
            raise FormatError(f"got tensor {name!r}, which no layer of the manifest uses")
        contents.require(name)
