"""The published test vector, read from the format's description alone: a reader in another language can follow it.

`tests/vector/` holds a 4 x 3 bf16 matrix and a patch that adds (0.3, 0.0625, -0.3) to its rows 1 and 3.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest

from nest_rs import NestPatch

VECTOR = Path(__file__).parent / "vector"
T = "model.layers.0.mlp.up_proj.weight"
ID = "cf0b61888098bc2421116a574ca54cbc1b31ce2b40104116795051e084ea088c"


def read(path: Path) -> tuple[dict[str, dict[str, object]], dict[str, bytes], str]:
    """A safetensors file by hand: header entries, bytes of each array, the patch's JSON."""
    content = path.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    text = header.pop("__metadata__", {}).get("nest_patch", "{}")
    data = {
        name: content[8 + n + entry["data_offsets"][0] : 8 + n + entry["data_offsets"][1]]
        for name, entry in header.items()
    }
    return header, data, text


def bf16_bits(value: float) -> int:
    """float32 to bfloat16, nearest even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def bf16_value(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def key(bits: int) -> int:
    magnitude = bits & 0x7FFF
    return -magnitude - 1 if bits & 0x8000 else magnitude


def unkey(number: int) -> int:
    return number if number >= 0 else 0x8000 | -(number + 1)


def test_the_vector_is_what_the_description_says() -> None:
    header, data, text = read(VECTOR / "nest_patch.safetensors")
    manifest = json.loads(text)
    assert struct.unpack("<2i", data[f"{T}.rows"]) == (1, 3)
    assert struct.unpack("<2h", data[f"{T}.cluster"]) == (0, 0)
    delta = struct.unpack("<3f", data[f"{T}.delta"])
    assert delta == tuple(map(single, (0.3, 0.0625, -0.3)))
    assert struct.unpack("<4f", data[f"{T}.sketch"])[:2] == (-0.25, -0.25)

    # The id.
    assert manifest.pop("sha256") == ID
    names = {"I32": "int32", "I16": "int16", "F32": "float32", "U8": "uint8"}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(data):
        shape = "x".join(map(str, header[name]["shape"]))  # type: ignore[call-overload]
        digest.update(f"{name} {names[str(header[name]['dtype'])]} {shape}\n".encode() + data[name])
    assert digest.hexdigest() == ID

    # The fold, the hashes, and the residual.
    weights = read(VECTOR / "model.safetensors")[1][T]
    seal = manifest["tensors"][T]
    old = [struct.unpack_from("<3H", weights, 6 * row) for row in (1, 3)]
    new = [tuple(bf16_bits(single(bf16_value(v) + u)) for v, u in zip(row, delta, strict=True)) for row in old]
    moved = bytearray(weights)
    for row, values in zip((1, 3), new, strict=True):
        struct.pack_into("<3H", moved, 6 * row, *values)
    assert seal["sha256_before"] == hashlib.sha256(weights).hexdigest()
    assert seal["sha256_after"] == hashlib.sha256(moved).hexdigest()
    assert seal["rows_sha256_before"] == hashlib.sha256(weights[6:12] + weights[18:]).hexdigest()
    assert seal["rows_sha256_after"] == hashlib.sha256(moved[6:12] + moved[18:]).hexdigest()
    stream = iter(zlib.decompress(data[f"{T}.residual"], wbits=-15))
    for before, after in zip(old, new, strict=True):
        for want, bits, u in zip(before, after, delta, strict=True):
            number, shift = 0, 0
            for byte in stream:
                number |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            step = number >> 1 ^ -(number & 1)
            assert unkey(key(bf16_bits(single(bf16_value(bits) - u))) + step) == want
    assert next(stream, None) is None


def test_we_read_write_and_apply_the_vector(tmp_path: Path) -> None:
    patch = NestPatch.load(VECTOR / "nest_patch.safetensors")
    assert patch.id == ID
    patch.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (VECTOR / "nest_patch.safetensors").read_bytes()
    target = Path(shutil.copytree(VECTOR, tmp_path / "target", ignore=shutil.ignore_patterns("nest_patch*")))
    patch.apply(target)
    weights = read(target / "model.safetensors")[1][T]
    assert hashlib.sha256(weights).hexdigest() == patch.manifest["tensors"][T]["sha256_after"]
    assert bf16_value(struct.unpack_from("<H", weights, 6)[0]) == pytest.approx(0.55, abs=0.002)
    patch.remove(target)
    assert (target / "model.safetensors").read_bytes() == (VECTOR / "model.safetensors").read_bytes()
