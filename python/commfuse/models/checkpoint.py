"""Weights on disk, read slice by slice.

A rank of a tensor-parallel model needs a slice of each weight. :func:`open_checkpoint` opens a
Hugging Face directory or a GGUF file and reads only its headers; :meth:`Checkpoint.read` then
reads the bytes of one slice with ``pread`` into memory that the tensor owns. Nothing is mapped,
so the peak memory of a read is the slice and a chunk of about a megabyte, for slices along either
dimension and for quantised tensors too. The safetensors header is parsed here rather than by the
``safetensors`` package, whose slices are cut from a mapping that would count as resident memory.

Pickled checkpoints are refused: unpickling runs whatever code the file carries.

Sources: the safetensors format, https://github.com/huggingface/safetensors#format; GGUF, see
:mod:`commfuse.models.gguf`.
"""

import ctypes
import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from commfuse.errors import UsageError
from commfuse.models.config import ModelConfig, token_ids
from commfuse.models.tokenizer import Tokenizer

# Elements decoded at a time. Dequantising makes some float32 temporaries of this size.
_CHUNK_ELEMENTS = 1 << 16
# torch spreads larger copies over its threads, which takes milliseconds each while other ranks
# keep the cores busy.
_COPY_ELEMENTS = (1 << 15) - 1
_MAX_HEADER_BYTES = 100_000_000  # The limit that the safetensors format sets.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Kinds that old checkpoints use for buffers; no weight of a supported model has them.
_SAFETENSORS_BUFFERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


class TensorFile:
    """A file opened for reading whose errors name it. Not thread-safe to close while reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist") from None
        except OSError as error:
            raise UsageError(f"cannot open {path}: {error.strerror}") from None
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from byte ``offset``; UsageError when the file ends before."""
        if self._descriptor is None:
            raise UsageError(f"{self.path} was read after the checkpoint had been closed")
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise UsageError(f"{self.path} is truncated: it ends at byte {offset}")
            buffer, offset = buffer[count:], offset + count

    def read(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes from byte ``offset``; UsageError when the file ends before."""
        if offset + count > self.size:
            raise UsageError(
                f"{self.path} is truncated: it has {self.size} bytes, its header needs at least "
                f"{offset + count}"
            )
        data = bytearray(count)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file and how its bytes become numbers.

    shape: as Hugging Face has it, ``[out, in]`` or ``[n]``. A row is stored as ``in /
    block_elements`` blocks of ``block_bytes`` each (one element a block where not quantised).
    decode: uint8 array ``[rows, bytes]`` to a tensor ``[rows, elements]`` of any float dtype.
    rotary_head_dim: set where the rows of each head are stored interleaved (GGUF, llama): stored
    row ``2 j + p`` of a head is row ``p * head_dim / 2 + j`` of the rotate-half layout.
    """

    file: TensorFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_elements: int
    block_bytes: int
    decode: Callable[[np.ndarray], torch.Tensor]
    rotary_head_dim: int | None = None

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) // self.block_elements * self.block_bytes

    def read(self, rows: range, columns: range, dtype: torch.dtype) -> torch.Tensor:
        """Read a block of the matrix ``[shape[0], shape[1] or 1]`` into a new tensor."""
        width = self.shape[1] if len(self.shape) == 2 else 1
        row_bytes = width // self.block_elements * self.block_bytes
        # The blocks of a row that hold the columns.
        first = columns.start // self.block_elements
        last = -(-columns.stop // self.block_elements)
        skip = columns.start - first * self.block_elements
        out = torch.empty(len(rows), len(columns), dtype=dtype)
        if out.numel() == 0:
            return out
        span = (last - first) * self.block_bytes
        for start, stop in self._chunks(rows, (last - first) * self.block_elements):
            stored = self._stored_rows(start, stop)
            low, high = min(stored), max(stored) + 1
            raw = np.empty((high - low, span), dtype=np.uint8)
            self._read_rows(raw, self.offset + low * row_bytes, row_bytes, first * self.block_bytes)
            if isinstance(stored, list):
                raw = raw[np.asarray(stored) - low]
            decoded = self.decode(raw)[:, skip : skip + len(columns)]
            piece = max(1, _COPY_ELEMENTS // len(columns))
            target = out[start - rows.start : stop - rows.start]
            for to, of in zip(target.split(piece), decoded.split(piece), strict=True):
                to.copy_(of)
        return out

    def _chunks(self, rows: range, width: int) -> list[tuple[int, int]]:
        """Cut the rows into chunks; at head boundaries where heads are interleaved."""
        unit = self.rotary_head_dim or 1
        step = max(1, _CHUNK_ELEMENTS // (width * unit)) * unit
        edges = [rows.start, *range((rows.start // step + 1) * step, rows.stop, step), rows.stop]
        return list(itertools.pairwise(edges))

    def _stored_rows(self, start: int, stop: int) -> range | list[int]:
        if self.rotary_head_dim is None:
            return range(start, stop)
        half = self.rotary_head_dim // 2
        stored = []
        for row in range(start, stop):
            head, row = divmod(row, self.rotary_head_dim)
            part, index = divmod(row, half)
            stored.append(head * self.rotary_head_dim + 2 * index + part)
        return stored

    def _read_rows(self, raw: np.ndarray, offset: int, stride: int, skip: int) -> None:
        if raw.shape[1] == stride:
            self.file.read_into(memoryview(raw).cast("B"), offset)
            return
        for index in range(len(raw)):
            self.file.read_into(memoryview(raw[index]), offset + index * stride + skip)


class StoredTensors:
    """Open weights on disk, by name.

    Made by :func:`open_tensors`; a context manager.
    """

    def __init__(
        self, path: Path, tensors: dict[str, StoredTensor], dtype: torch.dtype | None = None
    ) -> None:
        self.path = path
        self._tensors = tensors
        self._dtype = dtype

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid; reading raises UsageError."""
        for tensor in self._tensors.values():
            tensor.file.close()

    def names(self) -> list[str]:
        """Return the names of the stored parameters, sorted."""
        return sorted(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is stored (quantised: of what it decodes to)."""
        return self._find(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, ``(out, in)`` or ``(n,)``."""
        return self._find(name).shape

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Read a slice of a parameter.

        name: Hugging Face name, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        rows, columns: contiguous slices of the first and the second dimension, within the shape;
        None is all. A vector has rows only. dtype: of the result; None is the checkpoint's
        ``config.dtype``, or without a configuration the stored one.

        Returns a contiguous CPU tensor ``[rows, columns]`` or ``[rows]`` that owns its memory.
        Raises UsageError for an unknown name, a slice outside the shape, or a file that ends
        before the data.

        Example::

            half = checkpoint.read("lm_head.weight", rows=slice(0, vocab_size // 2))
        """
        tensor = self._find(name)
        if len(tensor.shape) not in (1, 2):
            raise UsageError(f"{name} in {tensor.file.path} has {len(tensor.shape)} dimensions")
        if columns is not None and len(tensor.shape) == 1:
            raise UsageError(f"{name} is a vector of shape {tensor.shape}: it has no columns")
        width = tensor.shape[1] if len(tensor.shape) == 2 else 1
        result = tensor.read(
            _bounds(rows, tensor.shape[0], name, "rows"),
            _bounds(columns, width, name, "columns"),
            dtype or self._dtype or tensor.dtype,
        )
        return result if len(tensor.shape) == 2 else result.squeeze(1)

    def _find(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise UsageError(f"{self.path} has no tensor {name!r}")
        return self._tensors[name]


class Checkpoint(StoredTensors):
    """An open model on disk: its configuration, its weights by name, its tokenizer.

    Made by :func:`open_checkpoint`. Names and layouts are those of the Hugging Face implementation
    whatever the file is.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: dict[str, StoredTensor],
        make_tokenizer: Callable[[], Tokenizer],
    ) -> None:
        super().__init__(path, tensors, config.dtype)
        self.config = config
        self._make_tokenizer = make_tokenizer

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer; UsageError when the checkpoint has none that we support."""
        return self._make_tokenizer()


def open_tensors(path: str | Path) -> StoredTensors:
    """Open the weights of a Hugging Face directory of any architecture, reading only headers.

    The directory holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
    Raises UsageError, naming the file, for a missing, truncated, pickled or otherwise unusable
    one.

    Example::

        with open_tensors("models/SmolLM3-3B") as tensors:
            weight = tensors.read("model.norm.weight")
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    files: list[TensorFile] = []
    try:
        return StoredTensors(path, _directory_tensors(path, files))
    except BaseException:
        for file in files:
            file.close()
        raise


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file, reading only its headers.

    The directory holds ``config.json`` and ``model.safetensors`` or
    ``model.safetensors.index.json`` with its shards. Raises UsageError, naming the file, for a
    missing, truncated, pickled or otherwise unusable one.

    Example::

        with open_checkpoint("models/SmolLM2-135M-Instruct") as checkpoint:
            weight = checkpoint.read("model.embed_tokens.weight", rows=slice(0, 1024))
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.is_dir():
        return _open_directory(path)
    if path.suffix == ".gguf":
        # Imported here: the gguf package takes a while and a directory does not need it.
        from commfuse.models import gguf

        return gguf.open_gguf(path)
    if path.suffix in _PICKLES:
        raise UsageError(_pickle_refusal(path))
    raise UsageError(
        f"{path} is neither a GGUF file nor a directory with config.json and safetensors"
    )


def return_freed_memory() -> None:
    """Gives the system back what tensors have left behind that were read and packed.

    glibc keeps it, and fits new tensors badly into it, since these are aligned: while a model of
    270 MB is loaded by two ranks, 80 MB of holes would collect on each.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UsageError naming the file when it is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return content


def _open_directory(path: Path) -> Checkpoint:
    settings = read_json(path / "config.json")
    try:
        config = ModelConfig.from_hf(settings)
    except UsageError as error:
        raise UsageError(f"{path / 'config.json'}: {error}") from None
    files: list[TensorFile] = []
    try:
        tensors = _directory_tensors(path, files)
        config = _complete(config, path, settings, tensors)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(
        path, config, tensors, lambda: Tokenizer.from_directory(path, config.eos_token_ids)
    )


def _directory_tensors(path: Path, files: list[TensorFile]) -> dict[str, StoredTensor]:
    """Read the headers of all weight files; what is opened is appended to ``files``."""
    index_path = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.exists() or not index_path.exists():
        if not single.exists():
            pickled = sorted(p for p in path.iterdir() if p.suffix in _PICKLES)
            if pickled:
                raise UsageError(_pickle_refusal(pickled[0]))
            raise UsageError(f"{path} has neither {single.name} nor {index_path.name}")
        files.append(TensorFile(single))
        return _safetensors_header(files[0])
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UsageError(f"{index_path} has no weight_map")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            raise UsageError(f"{index_path} names {shard!r}, which is outside its directory")
        files.append(TensorFile(path / shard))
        stored = _safetensors_header(files[-1])
        for name in (name for name, at in index.items() if at == shard):
            if name not in stored:
                raise UsageError(f"{path / shard} has no tensor {name!r}, which its index names")
            tensors[name] = stored[name]
    return tensors


def _complete(
    config: ModelConfig, path: Path, settings: dict[str, Any], tensors: dict[str, StoredTensor]
) -> ModelConfig:
    """Add what config.json leaves to other files."""
    generation = path / "generation_config.json"
    if generation.exists():
        # What stops generation is said here; config.json often names fewer ids.
        eos = token_ids(read_json(generation).get("eos_token_id"))
        config = dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)
    embedding = tensors.get("model.embed_tokens.weight")
    if not (settings.get("dtype") or settings.get("torch_dtype")) and embedding is not None:
        config = dataclasses.replace(config, dtype=embedding.dtype)
    return config


def _safetensors_header(file: TensorFile) -> dict[str, StoredTensor]:
    (header_bytes,) = struct.unpack("<Q", file.read(8, 0))
    if header_bytes > _MAX_HEADER_BYTES:
        raise UsageError(f"{file.path} is not a safetensors file")
    try:
        header = json.loads(file.read(header_bytes, 8))
        header.pop("__metadata__", None)
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file.path} is not a safetensors file: {error}") from None
    base = 8 + header_bytes
    needed = base + max((end for *_, end in entries.values()), default=0)
    if needed > file.size:
        raise UsageError(
            f"{file.path} is truncated: it has {file.size} bytes, its header needs {needed}"
        )
    tensors = {}
    for name, (kind, shape, begin, end) in entries.items():
        if kind in _SAFETENSORS_BUFFERS:
            continue
        if kind not in _SAFETENSORS_DTYPES:
            raise UsageError(f"{file.path}: tensor {name!r} has the unsupported dtype {kind}")
        dtype = _SAFETENSORS_DTYPES[kind]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise UsageError(f"{file.path} is damaged: the extent of {name!r} is not its size")
        tensors[name] = StoredTensor(
            file=file,
            offset=base + begin,
            shape=shape,
            dtype=dtype,
            block_elements=1,
            block_bytes=dtype.itemsize,
            decode=plain_decoder(dtype),
        )
    return tensors


def plain_decoder(dtype: torch.dtype) -> Callable[[np.ndarray], torch.Tensor]:
    """Return a decoder for little-endian elements of ``dtype``."""
    return lambda raw: torch.from_numpy(raw).view(dtype)


def _bounds(part: slice | None, size: int, name: str, what: str) -> range:
    if part is None:
        return range(size)
    start = 0 if part.start is None else part.start
    stop = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise UsageError(f"cannot read {what} {start}:{stop} of {name}, which has {size} {what}")
    return range(start, stop)


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path} is a pickled checkpoint, which commfuse never loads (unpickling runs code from "
        "the file); convert it to safetensors"
    )
