"""Save, find and load what was trained: one file of named tensors, whole or not there at all.

A file is written under a temporary name, synced, verified, and only then renamed. It is verified
again before it is read, because torch.load reads a file with a flipped bit in its tensors without
a word; the zip container it writes does carry a CRC-32 of every member.

A checkpoint is `RUN_ID.stepNNNNNN.ckpt` beside the run's log. It knows nothing of ranks: full
tensors by name, a cursor into the stream of tokens. Every run has its own names, so runs in one
folder never touch each other's files.
"""

import contextlib
import fcntl
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from trainer.dist import World
from trainer.memory import short_of_memory

# What must be equal for a checkpoint to be continued; code and number of ranks may differ.
IDENTITY = ("seed", "recipe", "data_digest")
# The large part of a checkpoint; the rest is its head.
TENSORS = ("model", "optimizer", "random")


class CheckpointError(ValueError):
    """A file that cannot be trusted or does not fit; the message names it and the reason."""


# --- files ----------------------------------------------------------------------------------------

def verify(path: Path) -> None:
    """Raises CheckpointError unless every byte of `path` is what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from None
    if bad is not None:
        raise CheckpointError(f"{path}: damaged, its part {bad} does not match its checksum")


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors and plain containers) to `path`, whole or not at all.

    Raises OSError where the disk refuses; a file that was at `path` before is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # held while writing: see sweep
            try:
                torch.save(state, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path}: could not be written ({error})") from None
            file.flush()
            os.fsync(file.fileno())
            verify(temporary)
            os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name must survive a power cut too
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, mmap: bool = False) -> dict:
    """Read what `save` wrote, tensors on the CPU; with `mmap` only when they are looked at.

    Raises FileNotFoundError, or CheckpointError for a damaged file and for one that holds
    anything but tensors and plain containers (a pickle that would run code is refused).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    verify(path)
    return _read(path, mmap)


def _read(path: Path, mmap: bool = False) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(f"{path}: refused ({type(error).__name__}: "
                              f"{str(error).splitlines()[0]})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: refused (expected a dict, got {type(state).__name__})")
    return state


def check_folder(folder: Path) -> None:
    """Raise ValueError unless files can be made in `folder`; leaves nothing behind, also not the
    folder."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    probe = folder / f".{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise ValueError(f"--log_dir {folder}: expected a folder to write to, got "
                         f"{error.strerror}; choose another") from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def sweep(folder: Path) -> None:
    """Remove temporary files of writers that were killed: those without a lock."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


# --- checkpoints of a run -------------------------------------------------------------------------

def path_of(folder: Path, run_id: str, step: int) -> Path:
    return folder / f"{run_id}.step{step:06d}.ckpt"


def prune(folder: Path, run_id: str, keep: int) -> None:
    """Leave the last `keep` checkpoints of this run, and those of all other runs."""
    for path in sorted(folder.glob(f"{run_id}.step*.ckpt"))[:-keep]:
        path.unlink(missing_ok=True)


def differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """`key: checkpoint X, this run Y` for everything in which two nested dicts differ."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(b, a, f"{prefix}{key}.")
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            found.append(f"{prefix}{key}: checkpoint {a}, this run {b}")
    return found


def _belongs(state: dict, wanted: dict) -> list[str]:
    return differences({k: wanted[k] for k in IDENTITY}, {k: state.get(k) for k in IDENTITY})


def load_run(path: Path, wanted: dict) -> dict:
    """The checkpoint at `path` for a run of this identity. Raises CheckpointError, and names what
    differs, where it belongs to another one."""
    state = load(path, mmap=True)
    if state.get("kind") != "checkpoint":
        raise CheckpointError(f"{path}: expected a checkpoint (a .ckpt file), got "
                              f"{state.get('kind', 'something else')}, which cannot be continued")
    found = _belongs(state, wanted)
    if found:
        raise CheckpointError(f"{path}: belongs to another training: {'; '.join(found)}; give the "
                              "options that it was made with")
    return state


def newest(folder: Path, wanted: dict, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The latest whole checkpoint of this identity in `folder`. Damaged ones are passed over with
    a warning, those of other trainings in silence."""
    def when(path: Path) -> int:
        try:
            return path.lstat().st_mtime_ns
        except OSError:  # removed just now
            return 0

    for path in sorted(folder.glob("*.ckpt"), key=lambda p: (when(p), p.name), reverse=True):
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: points to a file that is not there")
            try:
                head = _read(path, mmap=True)  # tensors stay on disk: only the head is read
            except CheckpointError:
                verify(path)  # knows better words for what is wrong
                raise
            if head.get("kind") == "checkpoint" and not _belongs(head, wanted):
                return path, load_run(path, wanted)
        except (CheckpointError, OSError) as error:
            warn(f"passed over {error}")
    return None


class CheckpointWriter:
    """Writes the checkpoints of one run, one each `every` steps (0: none is due), and keeps the
    newest `number`. `identity`: seed, recipe, data, code, ranks."""

    def __init__(self, folder: Path, run_id: str, every: int, number: int, step: int,
                 identity: dict):
        self.folder, self.run_id, self.every, self.number = folder, run_id, every, number
        self.last = step
        self.identity = identity

    def due(self, step: int, run_ends: bool) -> bool:
        """Whether a multiple of `every` was passed since the last one, or the run ends."""
        passed = self.every > 0 and (run_ends or step // self.every > self.last // self.every)
        return passed and step > self.last

    def write(self, step: int, state: dict) -> Path:
        """Write `state` as the checkpoint of `step`. OSError where the disk refuses."""
        self.last = step  # also where it fails: the next one is tried when it is due
        path = path_of(self.folder, self.run_id, step)
        save(path, {"kind": "checkpoint", "run_id": self.run_id, "step": step,
                    **self.identity, **state})
        prune(self.folder, self.run_id, self.number)
        return path


def resume(what: str | None, folder: Path, mine: dict, say: Callable[[str], None],
           warn: Callable[[str], None]) -> dict | None:
    """The head, with its "path", of the checkpoint that --resume `what` (auto, a path, or nothing)
    means; None: start at step 0.

    mine: what this run is. Its folder is tried and tidied up on the way. Raises ValueError or
    FileNotFoundError for what cannot be used.
    """
    check_folder(folder)
    sweep(folder)
    if what is None:
        return None
    if what == "auto":
        path, state = newest(folder, mine, warn) or (None, None)
        if path is None:
            say(f"--resume auto: {folder} holds no checkpoint of this recipe and seed; starting "
                "at step 0")
            return None
    else:
        path = Path(what)
        state = load_run(path, mine)
    say(f"resuming from {path}: step {state['step']}, {state['elapsed_s']:.1f} s of training")
    if state["source_digest"] != mine["source_digest"]:
        warn("the code has changed since this checkpoint was made: the run goes on with the new "
             "code")
    if state["world_size"] != mine["world_size"]:
        warn(f"the checkpoint was made by {state['world_size']} ranks, these are "
             f"{mine['world_size']}: the same training up to rounding, not bit for bit")
    log = path.parent / f"{state['run_id']}.txt"  # without a closing block where its run was killed
    found = hashlib.sha256(log.read_bytes()).hexdigest() if log.is_file() else "log not found"
    head = {key: value for key, value in state.items() if key not in TENSORS}
    return head | {"path": str(path.resolve()), "log_sha256": found}


# --- state ----------------------------------------------------------------------------------------

def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that own their memory: a view would be saved with the whole buffer it looks into."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


def random_state() -> dict:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def capture(model: torch.nn.Module, optimizer_state: dict) -> dict:
    """Everything that training changes; optimizer_state: optimizer.state_dict(), which is a
    collective call and so is made on all ranks."""
    return {"model": on_cpu(model.state_dict()), "optimizer": to_cpu(optimizer_state),
            "random": random_state()}


def read_on_ranks(path: str, world: World) -> dict:
    """A checkpoint that rank 0 has verified, on every rank: read from the file where all ranks see
    it, else broadcast, which needs three copies per rank (18 GB for record #62)."""
    def read() -> dict:
        return load(Path(path), mmap=True)

    def size_and_time() -> tuple[int, int] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    shared_disk = len(set(world.gather(size_and_time()))) == 1
    return world.all_or_raise(read) if shared_disk else world.from_rank0(read)


def restore(state: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `capture` took, in place, on any number of ranks."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])


def to_cpu(tree):
    """A tree of dicts and lists with its tensors on the CPU; what is there already as it is."""
    if isinstance(tree, torch.Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {key: to_cpu(value) for key, value in tree.items()}
    return [to_cpu(v) for v in tree] if isinstance(tree, list) else tree


@contextlib.contextmanager
def restored_afterwards(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Whatever happens inside, parameters, gradients, optimizer state and random numbers are put
    back at the end, and compared with those before."""
    def state() -> dict[str, torch.Tensor]:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"grad.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        return tensors | {"rng": torch.get_rng_state()}

    before, optimizer_before = state(), optimizer.state_dict()
    if short_of_memory(next(model.parameters()).device):
        before, optimizer_before = on_cpu(before), to_cpu(optimizer_before)
    else:
        before = {k: v.clone() for k, v in before.items()}
    yield
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[f"model.{name}"])
        for name, p in model.named_parameters():
            grad = before.get(f"grad.{name}")
            p.grad = None if grad is None else grad.to(p.device)
    optimizer.load_state_dict(optimizer_before)
    optimizer.nonfinite.zero_()
    torch.set_rng_state(before["rng"])
    after = state()
    changed = [k for k in before.keys() | after.keys() if k not in before or k not in after
               or not torch.equal(after[k], before[k].to(after[k].device))]
    assert not changed, f"not restored: {changed}"
