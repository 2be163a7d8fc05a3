"""What the program runs on: its commit, the device, the memory that was used."""

import functools
import glob
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata

import torch

from klsplice import distributed
from klsplice.errors import UserError, first_line
from klsplice.storage import digest_of

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARIES = ("torch", "transformers", "datasets", "huggingface_hub", "numpy", "safetensors")


@functools.cache
def git_commit() -> str | None:
    """The commit of this program when it was started, "+" when the tree had changes; None outside
    git."""
    said = []
    try:
        for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"]):
            git = subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True)
            said.append(git.stdout.strip())
            git.check_returncode()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{said[0]}+" if said[1] else said[0]


@functools.cache
def code_digest(*further: str) -> str:
    """sha256 of the files that decide what an evaluation finds, and of further ones at the top, as
    they were at the start."""
    found = [f"{HERE}/{name}.py" for name in ("sae", "eval", "data", *further)]
    for folder in ("learners", "klsplice"):
        found += sorted(glob.glob(f"{glob.escape(HERE)}/{folder}/**/*.py", recursive=True))
    return digest_of([path for path in found if os.path.exists(path)])


def note_code() -> None:
    """Ask for these now: the program may be edited while it runs."""
    git_commit(), code_digest(), code_digest("finetune")


def code_changed(about: dict) -> bool:
    """Whether a run began with other code. about: its run.json."""
    return about.get("code") != code_digest("finetune")


def check_device(name: str, dtype: str = "float32") -> None:
    """Raises UserError where there is no such device, or one that cannot work in `dtype`."""
    if name.startswith("mps"):
        what = f"DEVICE = {name!r} is not supported: the method is exact on cpu and on cuda alone"
        raise UserError(what, "set DEVICE=cpu")
    try:
        device = torch.device(name)
        distributed.check_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        what = f"DEVICE = {name!r} is not there: {first_line(e, 120)}"
        hint = "wanted cuda, cuda:N or cpu; on a laptop set recipes/small.py after the recipe"
        raise UserError(what, f"{hint}, as `make demo` does, without an account") from None
    half = device.type == "cuda" and dtype == "bfloat16"
    if half and torch.cuda.get_device_capability(device) < (8, 0):
        what = f"{torch.cuda.get_device_name(device)} has no bfloat16"
        raise UserError(what, "set DTYPE=float32, or use a GPU from the A100 on")
    if device.type == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16():
        note_slow()


def cpu_has_bfloat16() -> bool:
    """Whether this CPU's matrix products take bfloat16 by its own instructions."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache  # once a command
def note_slow() -> None:
    slow = "has no bfloat16 instructions, and a step may take a hundred times as long"
    print(f"warning: {cpu_name()} {slow}: set DTYPE=float32", flush=True)


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        name, processes = torch.cuda.get_device_name(device), distributed.size()
        return f"{processes} x {name}" if processes > 1 else name
    vectors = torch.backends.cpu.get_cpu_capability()  # that PyTorch uses, like AVX2 or AVX512
    half = ", bfloat16" if cpu_has_bfloat16() else ""
    return f"{torch.get_num_threads()} CPU cores ({cpu_name()}; {vectors}{half})"


def cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def peak_memory_gb(device: str) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def check_space(name: str, folder: str, needed: float) -> None:
    """Raise UserError where the disk of `folder`, the value of `name`, has too few bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"{name} = {folder!r} has {free / 1e9:.2f} GB free; up to {needed / 1e9:.2f} GB are"
        raise UserError(f"{what} written", f"free some, or set {name} to another disk")


def versions(*more: str) -> dict[str, str | None]:
    """Of LIBRARIES, None for what is not installed; and of `more`, as far as it is."""
    found = dict.fromkeys(LIBRARIES)
    for library in (*LIBRARIES, *more):
        with suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found | {"torch": torch.__version__}  # with its build, +cpu or +cu130
