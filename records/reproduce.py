"""Unpack the program inside a log and run it again.

A log of ours holds every source, the recipe and the command line; a public log holds its training
script at most, which is unpacked with a list of its requirements. `--dry-run` runs nothing.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import tempfile
from pathlib import Path

from records import check, launch, stats
from records.history import FOLDER, clock, read_result
from records.log import SOURCE_CAP, parse, read_lines
from records.parse import CODE, RULE, Run


def reproduce(
    path: Path,
    *,
    into: Path | None = None,
    dry_run: bool = False,
    nproc: int | None = None,
    seed: int | None = None,
    options: str = "",
    root: Path = FOLDER,
) -> int:
    """Unpack and run. Exit status 0 if the run ended as the log or the record leads to expect."""
    record = None
    if (path / "result.json").is_file():
        record = read_result(path)
        path = check.folder_logs(path)[0]
    runs = parse(path, keep_sources=True)
    if not runs:
        raise ValueError(f"{path}: expected a log, found no measurement in it")
    run = runs[0]
    name = record["name"] if record else path.stem.split(".")[0]
    into = into or root.parent / "logs" / "reproduced" / name
    if into.exists():
        raise ValueError(f"{into} exists already: choose --into, or remove it")
    if run.format != "ours":
        return _public(path, run, into)
    program = launch.unpack(run, record["name"] if record else path.name, into,
                            root.parent.resolve(), shlex.split(options))
    nproc = nproc or run.result.get("world_size") or 1
    seed = run.result.get("seed") if seed is None else seed
    command = shlex.join(program.command(seed, nproc))
    if record:
        (into / path.name).write_bytes(b"".join(read_lines(path)))  # as it was closed
    print(f"{len(run.sources)} sources unpacked into {into}")
    print(f"made with Python {run.python}, torch {run.torch}, on {check.hardware(run)}")
    print(f"run with: cd {shlex.quote(str(into))} && {command}")
    if dry_run:
        return 0
    again = launch.execute(program, seed, nproc, into / "reproduce.out")
    return _compare(run, again, record, seed)


def _compare(run: Run, again: Run, record: dict | None, seed: int | None) -> int:
    print(f"there: val_loss {run.final_val_loss:.4f} in {clock(run.train_time_ms)} "
          f"on {check.hardware(run)}")
    print(f"here:  val_loss {again.final_val_loss:.4f} in {clock(again.train_time_ms)} "
          f"on {check.hardware(again)}")
    print(f"log: {again.path}")
    if run.result.get("data_digest") != again.result.get("data_digest"):
        print("not comparable: the corpus here is another one (data_digest differs)")
        return 1
    if check.recipe_sha256(run.recipe) != check.recipe_sha256(again.recipe):
        print("not the same training: the recipe differs from the log's")
        return 1
    same = [p.val_loss for p in run.points] == [p.val_loss for p in again.points]
    if same and seed == run.result.get("seed"):
        print("the losses are equal at every validation")
        return 0
    if record is None:
        print(f"difference: {again.final_val_loss - run.final_val_loss:+.4f}")
        return 0
    limit = stats.prediction_limit(record["losses"])
    if again.final_val_loss <= limit:
        print(f"as expected: 99 of 100 further runs of this record stay below {limit:.4f}")
        return 0
    print(f"not as claimed: 99 of 100 further runs of this record should stay below {limit:.4f}")
    return 1


FIRST_STEPS = 8  # rounding has not grown yet


class _Enough(Exception):
    """The replayed run is past its first validation after step 0."""


def replay(log: Path, root: Path = FOLDER) -> list[str]:
    """Run the program of a log of ours up to its second validation: losses that come out otherwise.

    Compared are the validation before the first step and the first training losses.
    """
    def stop(fraction: float) -> None:
        if fraction > 0:
            raise _Enough

    there = _first_losses(log)
    run = parse(log, keep_sources=True)[0]
    with tempfile.TemporaryDirectory(prefix="replay") as place:
        program = launch.unpack(run, log.name, Path(place, "program"), root.parent.resolve(), ())
        with contextlib.suppress(_Enough):
            launch.execute(program, run.result["seed"], run.result.get("world_size") or 1,
                           Path(place, "output"), stop)
        here = _first_losses(max((program.folder / "logs").rglob("*.txt")))
    return [f"{line}: the log has {loss:.4f}, its program gives {here[line]:.4f}"
            for line, loss in there.items() if line in here and abs(here[line] - loss) > 0.005]


def _first_losses(log: Path) -> dict[str, float]:
    """The first losses of a log, by their line's step and field."""
    found = {}
    for raw in read_lines(log):
        match = re.match(rb"(step:(\d{1,9})/\d{1,9} (?:val|train)_loss):(\d{1,6}\.\d+) ", raw)
        if match and int(match[2]) <= FIRST_STEPS:
            found[match[1].decode()] = float(match[3])
        if found and match and int(match[2]) > FIRST_STEPS:
            break
    return found


def _public(path: Path, run: Run, into: Path) -> int:
    """Write the script of a public log and print its requirements; it is not run from here."""
    code = embedded_code(path)
    if code is None:
        raise ValueError(f"{path}: expected the program inside the log, it does not hold one "
                         "(some logs never did; of others the source was removed)")
    into.mkdir(parents=True)
    (into / launch.SCRIPT).write_bytes(code)
    text = code.decode(errors="replace")
    modules = set(re.findall(r"^(?:import|from) ([A-Za-z_]\w*)", text, re.MULTILINE))
    local = sorted(modules & {"triton_kernels", "muon", "utils", "kernels", "model"})
    gpus = run.gpu_count or 8
    print(f"the script of the log is in {into / launch.SCRIPT} ({len(text.splitlines())} lines)")
    print("it is not run from here; it needs")
    print(f"  GPUs      {gpus}x {run.gpu or 'not in the log'}")
    print(f"  Python    {run.python or 'not in the log'}")
    print(f"  torch     {run.torch or 'not in the log'}, CUDA {run.cuda or 'not in the log'}")
    print(f"  packages  {', '.join(sorted(modules - _STANDARD)) or 'none'}")
    print("  data      python -m data.fineweb --shards 9, in the folder it reads "
          "(data/fineweb10B)")
    if local:
        print(f"  modules   {', '.join(local)}: imported, perhaps at the end of the script")
    print(f"then: cd {shlex.quote(str(into))} && torchrun --standalone --nproc_per_node={gpus} "
          f"{launch.SCRIPT}")
    return 0


def embedded_code(path: Path) -> bytes | None:
    """The program at the head of a public log, byte for byte; None if there is none.

    All before the first rule of 100 `=` (after a rule of 80 that opens some logs), if it imports
    anything.
    """
    kept, imports = bytearray(), False
    for raw in read_lines(path):
        if RULE.match(raw):
            if kept.strip():
                return bytes(kept) if imports else None
            kept.clear()
            continue
        imports = imports or CODE.match(raw) is not None
        kept += raw
        if len(kept) > SOURCE_CAP:
            return None
    return None


_STANDARD = set(sys.stdlib_module_names)
