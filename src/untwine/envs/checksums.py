"""SHA256SUMS: checksums of the data files of a folder, as `sha256sum --check` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from untwine.errors import EnvError

SUMS_NAME = "SHA256SUMS"


def checksum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def known_checksums(folder: Path) -> dict[str, str]:
    """File name -> checksum; empty when the folder has no SHA256SUMS."""
    path = folder / SUMS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {file: checksum for checksum, file in (line.split("  ", 1) for line in lines)}


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Take the checksums of these files anew; those of others stay."""
    sums = known_checksums(folder)
    sums |= {name: checksum_of((folder / name).read_bytes()) for name in names}
    lines = [f"{checksum}  {file}\n" for file, checksum in sorted(sums.items())]
    (folder / SUMS_NAME).write_bytes("".join(lines).encode())


def read_checked(path: Path) -> bytes:
    """A data file of the package. EnvError when it is missing or differs from its checksum."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvError(
            f"data file {path} cannot be read: {error.strerror}; reinstall untwine"
        ) from error
    if known_checksums(path.parent).get(path.name) != checksum_of(content):
        raise EnvError(
            f"data file {path} differs from its checksum in {SUMS_NAME}; reinstall untwine"
        )
    return content
