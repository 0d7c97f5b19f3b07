"""Detached Ed25519 signatures of patches, by the `cryptography` package (`pip install 'nest-rs[sign]'`).

What is signed is the line "nest-patch/1 <id>", the id being the SHA-256 of the patch's arrays and manifest, and if the
patch carries evidence the line "evidence <its SHA-256>": 64 bytes, written beside the patch as `<patch>.sig`. Keys are
PEM files, as OpenSSL makes them:
`openssl genpkey -algorithm ed25519 -out key.pem` and `openssl pkey -in key.pem -pubout -out key.pub`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nest_rs.errors import NestError
from nest_rs.files import replacing
from nest_rs.patch import FORMAT, NestPatch, evidence_sha256

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def signature_path(patch: Path) -> Path:
    """Where the signature of a patch file lies."""
    return patch.with_name(f"{patch.name}.sig")


def sign(path: Path, key: Path) -> Path:
    """Sign a patch file.

    Args:
        path: The patch; it is read and checked first.
        key: An Ed25519 private key, PEM, not encrypted.

    Returns:
        The signature's path.

    Raises:
        NestError: not a patch, not such a key, or `cryptography` is missing.
    """
    patch = NestPatch.load(path)
    private = _private(key)
    out = signature_path(path)
    with replacing(out) as scratch:
        scratch.write_bytes(private.sign(_message(patch)))
    return out


def check_signature(path: Path, patch: NestPatch, key: Path) -> None:
    """Refuse a patch that the holder of a key has not signed.

    Args:
        path: The patch's file; the signature lies beside it.
        patch: The patch, as loaded.
        key: An Ed25519 public key, PEM.

    Raises:
        NestError: no signature, one of another key or patch, or not such a key.
    """
    from_key = _public(key)
    from cryptography.exceptions import InvalidSignature

    try:
        from_key.verify(signature_path(path).read_bytes(), _message(patch))
    except OSError as error:
        raise NestError(f"the patch `{path}` is not signed: no `{signature_path(path)}`") from error
    except InvalidSignature as error:
        raise NestError(f"the signature of `{path}` is not of this patch by the key `{key}`") from error


def _message(patch: NestPatch) -> bytes:
    evidence = f"evidence {evidence_sha256(patch.evidence)}\n" if patch.evidence is not None else ""
    return f"{FORMAT} {patch.id}\n{evidence}".encode()


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise NestError("signing needs `cryptography`", mend="pip install 'nest-rs[sign]'") from error
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise NestError(f"cannot read the private key `{path}` ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise NestError(f"`{path}` is not an Ed25519 key", mend="openssl genpkey -algorithm ed25519")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise NestError("checking a signature needs `cryptography`", mend="pip install 'nest-rs[sign]'") from error
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NestError(f"cannot read the public key `{path}` ({error})") from error
    if not isinstance(key, Ed25519PublicKey):
        raise NestError(f"`{path}` is not an Ed25519 key", mend="openssl pkey -in KEY -pubout")
    return key
