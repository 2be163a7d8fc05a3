"""The state of an unfinished run on disk: complete or absent, never a pickle.

checkpoints/step-N/ holds state.safetensors (weights, buffers, AdamW's moments) and state.json
(step, seconds, run, sha256). It is written beside, synced and renamed; the two newest stay.
"""

import os
import shutil

from safetensors import safe_open
from safetensors.torch import save_file

from klsplice import distributed
from klsplice.errors import UserError, whole
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
    file = os.path.join(part, "state.safetensors")
    save_file(_state(learner, optimizer), file)
    about = {"step": step, "seconds": seconds, "run": run, "sha256": digest(file)}
    write_json(os.path.join(part, "state.json"), about)
    for path in (file, part):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    sync(folder)
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


@distributed.main_process_first
def load(folder: str, learner, optimizer, *, run: str) -> tuple[int, float]:
    """Restore the newest good checkpoint of `run` -> (steps done, seconds so far), or (0, 0.0).

    Raises UserError where there are some and none is readable: never silently from zero.
    """
    found = _newest_first(folder)
    for path in found:
        try:
            about = read_json(os.path.join(path, "state.json"))
            file = os.path.join(path, "state.safetensors")
            if digest(file) != about["sha256"]:
                raise ValueError("wrong checksum")
            if about["run"] != run:
                raise ValueError("it is of another run")
            if path != _path(folder, about["step"]):
                raise ValueError(f"it says that it is of step {about['step']}")
            _restore(learner, optimizer, file)
            print(f"resuming after step {about['step']:,}")
            return about["step"], about["seconds"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            cause = whole(e).strip()
            print(f"warning: checkpoint {path} is damaged ({cause}); using the one before")
    if found:
        what = f"no checkpoint in {folder} is readable"
        raise UserError(what, "remove that folder to start again from step 0", code=1)
    return 0, 0.0


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


def _restore(learner, optimizer, file: str) -> None:
    with safe_open(file, "pt") as tensors:
        state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    learner.load_state(_under("model.", state))
    for i, p in enumerate(optimizer.adamw.param_groups[0]["params"]):
        moments = _under(f"adamw.{i}.", state)
        optimizer.adamw.state[p] = {name: t.to(p.device) for name, t in moments.items()}


def _under(prefix: str, state: dict) -> dict:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
