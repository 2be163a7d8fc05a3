"""Files that are written whole or not at all, and read with one line where they are damaged."""

import errno
import fcntl
import hashlib
import json
import math
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from klsplice.errors import UserError, first_line

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}  # some NFS, some Lustre


def lock(file, what: str, *, wait: bool) -> None:
    """Lock an open file; without a lock, and with a warning, where its file system has none.

    what: the constant that names its folder. Raises BlockingIOError where another process has it,
    unless `wait`, and OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        print(f"warning: {what} is on a file system without locks: let no two runs write there")


def in_use(path: str) -> bool:
    """Whether some process holds that lock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as e:
        return isinstance(e, BlockingIOError)


def read_json(path: str):
    """Raises OSError or ValueError where it is absent or no JSON."""
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_run_json(path: str):
    """A JSON file of a run folder. Raises UserError where it is absent or no JSON."""
    try:
        return read_json(path)
    except (OSError, ValueError) as e:
        what = f"{path} cannot be read: {first_line(e)}"
        raise UserError(what, "wanted runs/<name> of a finished run") from None


def write_json(path: str, value: dict) -> None:
    """Synced to disk before it takes the place of the file there was."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def finite(line: dict) -> dict:
    """JSON has no NaN: what is not finite becomes null."""
    return {n: v if not isinstance(v, float) or math.isfinite(v) else None for n, v in line.items()}


def mapped(path: str, shape=None) -> np.ndarray:
    """An array that is read as it is needed; at once where its file system cannot map files.

    shape: of uint32 without a header; else a .npy. Raises OSError, ValueError."""
    try:
        if shape is None:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return np.memmap(path, np.uint32, "r", shape=shape)
    except OSError as e:
        if e.errno != errno.ENODEV:
            raise
    if shape is None:
        return np.load(path, allow_pickle=False)
    return np.fromfile(path, np.uint32, math.prod(shape)).reshape(shape)


def read_npz(path: str) -> dict | None:
    """The arrays of an .npz, or None where it is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def write_npz(path: str, **arrays) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}.npz"  # several processes may write the same one
    np.savez(part, **arrays)
    os.replace(part, path)


def digest(path: str) -> str:
    """sha256 of a file. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(paths: list[str]) -> str:
    """sha256 of several files, with their names. Raises OSError."""
    with ThreadPoolExecutor() as pool:  # shards of an LM, side by side
        lines = [f"{d}  {os.path.basename(p)}" for p, d in zip(paths, pool.map(digest, paths))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sync(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def save_tensors(tensors: dict, path: str) -> None:
    """A .safetensors; safetensors itself would let only the owner read it."""
    from safetensors.torch import save

    with open(path, "wb") as f:
        f.write(save(tensors))


def public(value):
    """A local path, or several with commas between, by its last part, since the rest says something
    of a machine; else as it is."""
    if isinstance(value, str) and "," in value and not os.path.exists(value):
        return ",".join(map(public, value.split(",")))
    local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.normpath(value)) if local else value
