"""The state of an unfinished run on disk: complete or absent, never a pickle.

checkpoints/step-N/ holds state.safetensors (weights, buffers, AdamW's moments) and state.json
(step, seconds, run, sha256). It is written beside, synced and renamed; the two newest stay.
"""

import errno
import os
import shutil

from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from klsplice import distributed
from klsplice.errors import UserError, first_line
from klsplice.storage import digest, read_json, sync, write_json

KEPT = 2


def save(folder: str, learner, optimizer, *, step: int, seconds: float, run: str) -> None:
    """Write the state after `step` steps of `run` (a digest of its constants).

    A failure leaves the checkpoints there are untouched.
    """
    final = _path(folder, step)
    part = final + ".tmp"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    file = f"{part}/state.safetensors"
    save_file(_state(learner, optimizer), file)
    about = {"step": step, "seconds": seconds, "run": run, "sha256": digest(file)}
    write_json(os.path.join(part, "state.json"), about)
    sync(file)
    _sync_folder(part)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    _sync_folder(folder)
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


@distributed.main_process_first
def load(folder: str, learner, optimizer, *, run: str) -> tuple[int, float]:
    """Restore the newest good checkpoint of `run` -> (steps done, seconds so far), or (0, 0.0).

    Raises UserError where there are some and none is readable: never silently from zero.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            about, file = read_json(f"{path}/state.json"), f"{path}/state.safetensors"
            told = about["run"], about["sha256"], _path(folder, about["step"])
            if told != (run, digest(file), path):
                raise ValueError("it is another run's, or not as it was written")
            with open(file, "rb") as f:  # not mapped, which some file systems cannot
                _restore(learner, optimizer, load_tensors(f.read()))
            print(f"resuming after step {about['step']:,}")
            return about["step"], about["seconds"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            print(f"warning: checkpoint {path} is damaged ({first_line(e)}); using the one before")
    if paths:
        what = f"no checkpoint in {folder} is readable"
        raise UserError(what, "remove that folder to start again from step 0", code=1)
    return 0, 0.0


def _sync_folder(path: str) -> None:
    try:
        sync(path)
    except OSError as e:  # some shares sync files alone
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise


def _path(folder: str, step: int) -> str:
    return os.path.join(folder, f"step-{step:09d}")


def _newest_first(folder: str) -> list[str]:
    names = sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else []
    return [os.path.join(folder, n) for n in names if n.startswith("step-") and "." not in n]


def _state(learner, optimizer) -> dict:
    """Everything that training changes, as CPU tensors of their own."""
    state = {f"model.{name}": t for name, t in learner.state().items()}
    for i, p in enumerate(optimizer.adamw.param_groups[0]["params"]):
        for name, t in optimizer.adamw.state[p].items():
            state[f"adamw.{i}.{name}"] = t
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}


def _restore(learner, optimizer, state: dict) -> None:
    learner.load_state(_under("model.", state))
    for i, p in enumerate(optimizer.adamw.param_groups[0]["params"]):
        moments = _under(f"adamw.{i}.", state)
        optimizer.adamw.state[p] = {name: t.to(p.device, copy=True) for name, t in moments.items()}


def _under(prefix: str, state: dict) -> dict:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
