"""The commands on patches: apply, remove, verify, inspect, sign."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg

from nest_rs.command import Command
from nest_rs.errors import NestError, listed

if TYPE_CHECKING:
    from nest_rs.patch import NestPatch

# What `verify` exits with; 2 is an error, as everywhere.
EXIT = {"patched": 0, "clean": 3, "other": 4, "tampered": 5}


class _OnTarget(Command):
    patch: CliPositionalArg[Path] = Field(description="patch file (nest_patch.safetensors)")
    target: CliPositionalArg[Path] = Field(description="Hugging Face folder, ONNX folder or .gguf file")
    base: Path | None = Field(None, description="the patch's base, for targets of less precision than it has")
    public_key: Path | None = Field(None, description="refuse a patch that this key has not signed (PEM, Ed25519)")

    def load(self) -> NestPatch:
        from nest_rs.patch import NestPatch

        patch = NestPatch.load(self.patch)
        if self.public_key is not None:
            from nest_rs.signing import check_signature

            check_signature(self.patch, patch, self.public_key)
        return patch


class _Write(_OnTarget):
    in_place: bool = Field(False, description="change the target itself")
    out: Path | None = Field(None, validation_alias=AliasChoices("o", "out"), description="write a changed copy here")

    def where(self) -> Path | None:
        if self.in_place == (self.out is not None):
            raise NestError("name the output: pass either --in-place or -o OUT")
        return self.out

    def show(self, result: dict[str, Any]) -> None:
        print(f"{result['path']}: patch {result['patch'][:16]} is {result['done']}")
        tensors = result.get("tensors")
        if tensors:
            rows, elements, changed = (sum(t[key] for t in tensors.values()) for key in ("rows", "elements", "changed"))
            kept = [t["kept"] for t in tensors.values()]
            print(
                f"{rows} rows of {len(tensors)} tensors; {changed} of {elements} elements changed; rounding keeps "
                f"{min(kept):.4f} to {max(kept):.4f} of each tensor's delta"
            )


class Apply(_Write):
    """Put a patch on a model, in place or on a copy; nothing is loaded, and a crash is mended by the next command."""

    target: CliPositionalArg[Path | None] = Field(  # type: ignore[assignment]
        None, description="Hugging Face folder, ONNX folder or .gguf file"
    )
    to_lora: bool = Field(False, description="write the patch itself as a PEFT LoRA adapter to OUT (no TARGET)")

    def run(self) -> dict[str, Any]:
        patch = self.load()
        if self.to_lora:
            if self.out is None:
                raise NestError("no output named for the adapter", mend="pass -o OUT")
            return {"path": str(patch.to_lora(self.out)), "patch": patch.id, "done": "written as a LoRA adapter"}
        if self.target is None:
            raise NestError("no target named for the patch", mend="pass TARGET, or --to-lora")
        done = patch.apply(self.target, out=self.where(), base=self.base)
        return {"path": str(done.path), "patch": done.patch, "done": "on", "tensors": done.tensors}


class Remove(_Write):
    """Take a patch off a model: every file is then what it was, to the bit."""

    def run(self) -> dict[str, Any]:
        done = self.load().remove(self.target, out=self.where(), base=self.base)
        return {"path": str(done.path), "patch": done.patch, "done": "off"}


class Verify(_OnTarget):
    """Tell whether a model carries a patch. Exit status: 0 patched, 3 clean, 4 another patch, 5 tampered, 2 error."""

    others: list[Path] = Field([], description="other patches of that base that may be on the target too")

    def run(self) -> dict[str, Any]:
        from nest_rs.patch import NestPatch

        patch = self.load()
        found = patch.verify(self.target, base=self.base, others=[NestPatch.load(path) for path in self.others])
        return {
            "state": found.state,
            "patch": patch.id,
            "tensor": found.tensor,
            "others": list(found.others),
            "exact": found.exact,
        }

    def show(self, result: dict[str, Any]) -> None:
        others = listed(patch[:16] for patch in result["others"])
        likely = "" if result["exact"] else " (by likeness: the target has less precision than the base)"
        print(
            {
                "patched": f"patched by this patch (`{result['patch'][:16]}`)"
                + (f" and by {others}" if others else ""),
                "clean": "clean: the patch's base",
                "other": f"patched by another patch: {others}",
                "tampered": f"tampered: the first differing tensor is `{result['tensor']}`",
            }[result["state"]]
            + likely
        )

    def status(self, result: dict[str, Any]) -> int:
        return EXIT[result["state"]]


class Sign(Command):
    """Sign a patch with an Ed25519 key; the signature lies beside it as PATCH.sig."""

    patch: CliPositionalArg[Path] = Field(description="patch file (nest_patch.safetensors)")
    key: Path = Field(description="private key (PEM)")

    def run(self) -> dict[str, Any]:
        from nest_rs.signing import sign

        return {"signature": str(sign(self.patch, self.key))}

    def show(self, result: dict[str, Any]) -> None:
        print(f"signature: {result['signature']}")


class Inspect(Command):
    """What a patch file holds, or which patches are on a model."""

    path: CliPositionalArg[Path] = Field(description="patch file, Hugging Face folder, ONNX folder or .gguf file")

    def run(self) -> dict[str, Any]:
        from nest_rs.deploy import applied_patches, describe, is_patch
        from nest_rs.patch import NestPatch

        if is_patch(self.path):
            return describe(NestPatch.load(self.path))
        return applied_patches(self.path)

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.evidence import lines

        for key, value in result.items():
            if key == "manifest":
                for name, entry in value.items():
                    if name != "tensors":
                        print(f"{name}: {entry}")
            elif key == "evidence":
                print("\n".join(lines(value)) if value else "evidence: none, the patch was not judged")
            else:
                print(f"{key}: {value}")
