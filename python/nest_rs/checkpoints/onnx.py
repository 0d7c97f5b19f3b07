"""An ONNX export: patched, it is the re-export of the merged model, byte for byte.

Two exporters are known. onnxruntime-genai's builder names its weights after the model's. PyTorch's
(`torch.onnx.export(dynamo=True)`, and so `transformers.exporters`) numbers them, but each node says in its metadata,
under `pkg.torch.onnx.name_scopes`, which module it came from.

Weights lie in a data file, where the graph's initialisers say. In fp32, fp16 and bf16 a matrix is stored transposed, so
that a row of the model is a column (PyTorch's exporter leaves it as it is where it does not fold the transposition); in
int4 and int8 (MatMulNBits) a row is quantised by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nest_rs.checkpoints.base import Bytes, Checkpoint, Floats, Place, narrow, plain_places, widen
from nest_rs.errors import NestError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

_DTYPES = {1: "F32", 10: "F16", 16: "BF16"}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_UINT8 = 2
_SCOPES = "pkg.torch.onnx.name_scopes"


class _Array(NamedTuple):
    file: str
    type: int
    shape: tuple[int, ...]
    begin: int
    length: int


class _Matrix(NamedTuple):
    """A matrix of the model: its weight, and for MatMulNBits its scales and how it is quantised."""

    weight: _Array
    transposed: bool = False
    scales: _Array | None = None
    bits: int = 0
    block: int = 0


class OnnxCheckpoint(Checkpoint):
    """Reads the graph without its data."""

    kind = "onnx"

    def __init__(self, path: Path) -> None:
        super().__init__(path, path, path / ".nest-rs")
        self._found: dict[str, _Matrix] = {}

    @cached_property
    def _model(self) -> onnx.ModelProto:
        try:
            import onnx
            from google.protobuf.message import DecodeError
        except ImportError as error:
            raise NestError("patching ONNX needs `onnx`", mend="pip install 'nest-rs[onnx]'") from error
        path = self.root / "model.onnx"
        try:
            model = onnx.load(path, load_external_data=False)
        except (DecodeError, OSError, ValueError, RuntimeError) as error:
            raise NestError(f"`{path}` is not a valid ONNX file ({error})") from error
        if not _is_text(model):
            raise NestError(f"`{path}` is not a valid ONNX file (a name in it is not UTF-8)")
        # ONNX Runtime keeps what it pre-packed beside the weight, under keys of the external data.
        packed = any(entry.key.startswith("prepacked") for a in model.graph.initializer for entry in a.external_data)
        if packed or any(a.name == "weight_prepacked" and a.i for node in model.graph.node for a in node.attribute):
            raise NestError(f"`{path}` holds pre-packed weights", mend="patch the export it was made from")
        # An optimiser that saves the graph declares all the operator sets it knows.
        domains = {entry.domain for entry in model.opset_import} - {"", "ai.onnx", "com.microsoft"}
        if domains:
            raise NestError(
                f"`{path}` was rewritten by an optimiser (it declares `{min(domains)}`)",
                mend="patch the export it was made from, then optimise that",
            )
        if model.producer_name != "pytorch" and "onnxruntime-genai" not in model.producer_name:
            raise NestError(
                f"`{path}` was written by `{model.producer_name or 'an unknown tool'}`",
                mend="patch the export of onnxruntime-genai's builder or PyTorch, before any optimiser or quantiser",
            )
        return model

    @property
    def _graph(self) -> onnx.GraphProto:
        return self._model.graph

    @cached_property
    def _arrays(self) -> dict[str, _Array]:
        arrays = {}
        for tensor in self._graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.data_location != 1 or "location" not in where:
                continue
            file = where["location"]
            if not file or Path(file).name != file or "\\" in file or file in (".", ".."):
                raise NestError(f"`{self.path}` keeps `{tensor.name}` in `{file}`, which is not in this folder")
            if not (self.root / file).is_file():
                raise NestError(f"the data file `{file}` of `{self.path}` is missing")
            try:
                begin, length = int(where.get("offset", "0")), int(where["length"])
            except (ValueError, KeyError):
                begin, length = -1, -1
            if min(begin, length) < 0 or begin + length > (self.root / file).stat().st_size:
                raise NestError(f"`{self.path}` claims bytes of `{file}` for `{tensor.name}` that are not there")
            arrays[tensor.name] = _Array(file, tensor.data_type, tuple(tensor.dims), begin, length)
        return arrays

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.iterdir() if path.is_file())

    def _matrix(self, name: str) -> _Matrix:
        if name not in self._found:
            self._found[name] = self._look(name)
        return self._found[name]

    def _look(self, name: str) -> _Matrix:
        return self._look_by_scope(name) if self._model.producer_name == "pytorch" else self._look_by_name(name)

    @cached_property
    def _scopes(self) -> dict[str, list[onnx.NodeProto]]:
        """Matrix products by the module they came from."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self._graph.node:
            scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
            # The names of the modules from the root inwards, then the operation's own: a list as Python prints it.
            names = re.findall("'([^']*)'", scopes)
            if len(names) > 1 and node.op_type in ("MatMul", "Gemm", "MatMulNBits", "FusedMatMul"):
                found.setdefault(names[-2], []).append(node)
        return found

    def _look_by_scope(self, name: str) -> _Matrix:
        nodes = self._scopes.get(name.removesuffix(".weight"), [])
        if [node.op_type for node in nodes] != ["MatMul"]:
            what = f"a `{nodes[0].op_type}`, one of {len(nodes)}" if nodes else "not there"
            raise NestError(
                f"the matrix product of `{name}` in `{self.path}` is {what}",
                mend="only PyTorch's own export can be patched, with its metadata; is this the patch's base?",
            )
        weight, transposed = nodes[0].input[1], True
        makers = [node for node in self._graph.node if weight in node.output]
        if makers and makers[0].op_type == "Transpose" and self._users(weight) == 1:
            weight, transposed = makers[0].input[0], False
        array = self._arrays.get(weight)
        if array is None or weight == nodes[0].input[0]:
            raise NestError(f"the weight `{weight}` for `{name}` of `{self.path}` is not in its data file")
        if self._users(weight) != 1:
            raise NestError(f"the weight `{weight}` for `{name}` of `{self.path}` is used in several places")
        self._check_plain(name, array)
        return _Matrix(array, transposed)

    def _users(self, value: str) -> int:
        return sum(value == taken for node in self._graph.node for taken in node.input)

    def _look_by_name(self, name: str) -> _Matrix:
        stem = f"{name.removesuffix('.weight')}.MatMul.weight"
        users = [node for node in self._graph.node if any(i == stem or i.startswith(f"{stem}_") for i in node.input)]
        if len(users) != 1 or users[0].op_type not in ("MatMul", "MatMulNBits"):
            what = f"used by {', '.join(f'`{node.op_type}`' for node in users)}" if users else "not there"
            raise NestError(
                f"the weight `{stem}` of `{self.path}` is {what}",
                mend="only the builder's own exports can be patched, before any optimiser; is this the patch's base?",
            )
        (node,) = users
        inputs = [self._arrays.get(i) for i in node.input[1:]]
        weight = inputs[0] if inputs else None
        if weight is None or node.input[1] == node.input[0]:
            raise NestError(f"the weight `{stem}` of `{self.path}` is not in its data file")
        if node.op_type == "MatMul":
            self._check_plain(stem, weight)
            return _Matrix(weight, transposed=True)
        values = {attribute.name: attribute.i for attribute in node.attribute}
        bits, block = values.get("bits", 4), values.get("block_size", 0)
        scales = inputs[1] if len(inputs) > 1 else None
        if len([i for i in node.input[1:] if i]) != 2 or scales is None or scales.type not in _DTYPES:
            raise NestError(
                f"the weight `{stem}` of `{self.path}` is quantised with zero points or an index",
                mend="calibrated and asymmetric exports are not patched: patch the model, then quantise it",
            )
        rows, width = values.get("N", 0), values.get("K", 0)
        blocks = -(-width // block) if block > 0 else 0
        right = (
            bits in (4, 8)
            and weight.type == _UINT8
            and weight.shape == (rows, blocks, block * bits // 8)
            and int(np.prod(scales.shape, dtype=np.int64)) == rows * blocks
        )
        if not right:
            raise NestError(f"the quantised weight `{stem}` of `{self.path}` has the shape `{list(weight.shape)}`")
        self._check_length(stem, weight, 1)
        self._check_length(stem, scales, _SIZES[_DTYPES[scales.type]])
        return _Matrix(weight, False, scales, bits, block)

    def _check_plain(self, name: str, weight: _Array) -> None:
        if weight.type not in _DTYPES or len(weight.shape) != 2:
            raise NestError(f"the weight `{name}` of `{self.path}` has the ONNX type `{weight.type}`")
        self._check_length(name, weight, _SIZES[_DTYPES[weight.type]])

    def _check_length(self, name: str, array: _Array, size: int) -> None:
        if array.length != int(np.prod(array.shape, dtype=np.int64)) * size:
            raise NestError(f"`{self.path}` claims `{array.length}` bytes for `{name}` of `{list(array.shape)}`")

    def dtype(self, name: str) -> str:
        matrix = self._matrix(name)
        return f"int{matrix.bits}" if matrix.scales is not None else _DTYPES[matrix.weight.type]

    def locate(self, name: str, shape: Sequence[int], rows: NDArray[np.integer[Any]]) -> list[Place]:
        weight, transposed, scales, bits, block = self._matrix(name)
        count, width = shape
        found = tuple(reversed(weight.shape)) if transposed else weight.shape
        wanted = (count, width) if scales is None else (count, -(-width // block), block * bits // 8)
        if found != wanted:
            raise NestError(
                f"the weight for `{name}` of `{self.path}` has the shape `{list(found)}`, not that of `{list(shape)}`",
                mend="is this the patch's base?",
            )
        if transposed:
            size = _SIZES[_DTYPES[weight.type]]
            offsets = (weight.begin + rows.astype(np.int64) * size).tolist()
            return [Place(weight.file, size, size * count, width, offsets)]
        return [
            plain_places(array.file, array.begin, array.length // count, rows) for array in (weight, scales) if array
        ]

    def decode(self, name: str, stored: list[Bytes], width: int) -> Floats:
        _, _, scales, bits, block = self._matrix(name)
        if scales is None:
            return widen(stored[0], self.dtype(name), width)
        factors = widen(stored[1], _DTYPES[scales.type], -(-width // block))
        packed = stored[0].reshape(len(factors), -1)
        if bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(factors), -1)
        centred = packed.astype(np.float32) - (8 if bits == 4 else 128)
        values: Floats = (centred.reshape(*factors.shape, block) * factors[:, :, None]).reshape(len(factors), -1)
        return np.ascontiguousarray(values[:, :width])

    def encode(self, name: str, values: Floats, places: list[Place]) -> list[Bytes]:
        _, _, scales, bits, block = self._matrix(name)
        if scales is None:
            return [narrow(values, self.dtype(name))]
        return _quantise(values, bits, block, _DTYPES[scales.type])


def _is_text(message: Message) -> bool:
    """Whether all strings of a message are text: what is not UTF-8, protobuf hands over as bytes."""
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING and any(isinstance(entry, bytes) for entry in values):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


def _quantise(values: Floats, bits: int, block: int, scale_type: str) -> list[Bytes]:
    """Rows as MatMulNBits holds them, by ONNX Runtime's own quantiser: each row by itself."""
    from onnxruntime.capi import _pybind_state as ort

    rows, width = values.shape
    blocks = -(-width // block)
    transposed = np.ascontiguousarray(values.T)
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * (-(-blocks // (8 // bits))), np.uint8)
    work = ort.quantize_matmul_4bits if bits == 4 else ort.quantize_matmul_8bits
    work(packed, transposed, scales, zeros, block, rows, width, True)
    return [packed.reshape(-1), narrow(scales, scale_type)]
