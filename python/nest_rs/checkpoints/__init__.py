"""The forms in which a model is deployed, one module each, behind one interface (`nest_rs.checkpoints.base`)."""

from __future__ import annotations

from pathlib import Path

from nest_rs.checkpoints.base import Checkpoint
from nest_rs.errors import NestError


def open_checkpoint(path: Path) -> Checkpoint:
    """Find out what a path holds: a Hugging Face folder, an ONNX export or a GGUF file.

    Raises:
        NestError: none of them, or damaged.
    """
    if path.is_file() and path.suffix == ".gguf":
        from nest_rs.checkpoints.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.is_file() and path.suffix == ".onnx":
        path = path.parent
    if path.is_dir() and (path / "model.onnx").exists():
        from nest_rs.checkpoints.onnx import OnnxCheckpoint

        return OnnxCheckpoint(path)
    if path.is_dir():
        from nest_rs.checkpoints.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise NestError(f"no such file or folder: `{path}`")
    raise NestError(f"cannot tell what `{path}` is", mend="give a Hugging Face folder, an ONNX folder or a .gguf file")
