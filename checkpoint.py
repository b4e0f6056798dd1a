"""Save and load what was trained: one file of named tensors, whole or not there at all.

A file is written under a temporary name, synced, verified, and only then renamed. It is verified
again before it is read, because torch.load reads a file with a flipped bit in its tensors without
a word; the zip container it writes does carry a CRC-32 of every member.
"""

import os
import zipfile
from pathlib import Path

import torch


class CheckpointError(ValueError):
    """A file that cannot be trusted; the message names it and the reason."""


def verify(path: Path) -> None:
    """Raises CheckpointError unless every byte of `path` is what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from None
    if bad is not None:
        raise CheckpointError(f"{path}: damaged, its part {bad} does not match its checksum")


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors and plain containers) to `path`, whole or not at all.

    Raises OSError where the disk refuses; what stood at `path` before then still stands there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path}: could not be written ({error})") from None
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Read what `save` wrote, tensors on the CPU.

    Raises FileNotFoundError, or CheckpointError for a damaged file and for one that holds
    anything but tensors and plain containers (a pickle that would run code is refused).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: refused ({type(error).__name__}: "
                              f"{str(error).splitlines()[0]})") from None
