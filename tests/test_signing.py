"""Signed patches."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from nest_rs import NestPatch
from nest_rs.cli import main
from nest_rs.patch import evidence_sha256
from test_deploy import hashes, make_patch


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_only_what_the_key_signed_is_applied(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = write_keys(tmp_path, "ours")
    _, other = write_keys(tmp_path, "theirs")
    patch = tmp_path / "patch.safetensors"
    make_patch(tiny).save(patch)
    apply = ["apply", str(patch), str(tiny), "-o", str(tmp_path / "out"), "--public-key"]

    def refused(key: Path, message: str) -> None:
        before = hashes(tmp_path)
        assert main([*apply, str(key)]) == 2
        assert message in capsys.readouterr().err
        assert hashes(tmp_path) == before

    refused(public, "is not signed")
    assert main(["sign", str(patch), "--key", str(private)]) == 0
    assert len((tmp_path / "patch.safetensors.sig").read_bytes()) == 64
    refused(other, "is not of this patch by the key")
    refused(private, "cannot read the public key")
    assert main([*apply, str(public)]) == 0
    assert main(["verify", str(patch), str(tmp_path / "out"), "--public-key", str(public)]) == 0
    judged = NestPatch.load(patch)
    judged.evidence = {"sha256": evidence_sha256({})}
    judged.save(patch)  # what it claims to have been seen to do is not what was signed
    assert main(["verify", str(patch), str(tmp_path / "out"), "--public-key", str(public)]) == 2
    make_patch(tiny, seed=3).save(patch)  # another patch under the old signature
    assert main(["verify", str(patch), str(tmp_path / "out"), "--public-key", str(public)]) == 2
    assert main(["sign", str(patch), "--key", str(public)]) == 2
