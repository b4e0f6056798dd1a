"""python -m records: tables, checks and comparisons of speedrun records.

    table                 the record tables of all tracks
    check [FOLDER|LOG..]  re-derive every number; exit status 1 and every reason by name
    add LOGS.. --name X   make a record folder from logs that pass the rules
    race A B              run two programs by turns on this machine and compare their times
    reproduce LOG|RECORD  unpack the program of a log and run it again
    plot RUNS..           loss curves over the published ones, as PNG and SVG
    rank LOG              each validation of a finished log beside the records, and its place
    audit ARCHIVE         a clone of the public records, held to its logs
    ladder                every rung of the ladder at pocket scale, beside the published one

`python -m records COMMAND --help` lists the options; records/README.md is the guide.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from records import check, claim, history, ladder, race, reproduce, rules, table
from records.log import parse
from records.parse import printable
from records.rank import progress, rank, record_of


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.command in ("race", "reproduce"):  # their options are the arguments of a function
            options = vars(args)
            return options.pop("function")(**{k: v for k, v in options.items() if k != "command"})
        return args.function(args)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        lines = str(error).split("\n")
        print(f"records {args.command}:", *map(printable, lines), sep="\n" if lines[1:] else " ",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m records",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=history.FOLDER, help="another records folder")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, function: Callable, text: str) -> Callable:
        older = ["stand"] if name == "rank" else []
        sub = commands.add_parser(name, help=text, description=text, aliases=older)
        sub.set_defaults(function=function)
        return sub.add_argument

    def track(add: Callable) -> None:
        add("--track", choices=list(rules.TRACKS), help="default: the track that the logs name")

    def claims(add: Callable) -> None:
        track(add)
        add("--systems-only", action="store_true",
            help="the change leaves the mathematics alone (no p where the track allows)")
        add("--differs", action="append", default=[], metavar="SOURCE",
            help="a source that may differ between the runs (repeatable)")

    add = command("table", _table, "Show the record tables, or write them into the Markdown files.")
    add("tracks", nargs="*", metavar="TRACK", help="default: all")
    add("--markdown", action="store_true",
        help="write README.md, records/TABLES.md and the numbers in the README of each record")
    add("--json", action="store_true", help="print everything as JSON")
    add("--last", type=int, metavar="N", help="only the last N rows of each track")

    add = command("check", _check, "Re-derive every number of all records, of folders, or of logs.")
    add("paths", nargs="*", type=Path, metavar="FOLDER|LOG",
        help="record folders, or the logs of one claim; default: everything")
    claims(add)
    add("--at", type=int, metavar="STEP", help="judge the losses of this step, not of the last")
    add("--loss", default="val_loss", metavar="FIELD", help="the field of the loss: val_ema_loss")
    add("--claim", choices=["-"], help="hold the logs to the text on stdin, not to a README.md")
    add("--deep", action="store_true", help="run the program of each record's best log for a few "
        "steps; read programs of unknown authors first")
    add("--waive", action="append", default=[], metavar="NAME",
        help="a reason, by name, that is shown and does not count (repeatable)")

    add = command("add", _add, "Make a record folder from logs that pass the rules.")
    add("logs", nargs="+", type=Path, metavar="LOG")
    add("--name", required=True, help="short name of the record")
    add("--by", action="append", default=[], metavar="AUTHOR",
        help="an author (repeatable); default: git's user name")
    claims(add)
    add("--baseline", dest="kind", action="store_const", const="baseline", default="record",
        help="a reference that need not be ahead of the record before it")
    add("--race", type=Path, metavar="JSON", help="race.json against the prior record")

    add = command("rank", _rank, "Compare a finished log with the records, as its run did live.")
    add("log", type=Path)
    track(add)
    add("--every", type=int, default=1, metavar="N", help="every N-th validation")

    add = command("plot", _plot, "Loss curves of runs, against time and tokens, as PNG and SVG.")
    add("runs", nargs="+", metavar="[LABEL=]LOG|FOLDER",
        help="logs or record folders; LABEL= puts logs into one group")
    add("--out", type=Path, help="OUT.png and OUT.svg (default logs/curves)")
    track(add)
    add("--title", default="")
    add("--no-published", action="store_true", help="leave out the published curves")

    add = command("race", race.race, "Run A and B by turns on this machine and compare them.")
    add("a", metavar="A", help="a record's number, a record folder, a git revision or a working "
        "tree; options of train_gpt.py may follow in the same quotes: '6 --matrix_lr 0.01'")
    add("b", metavar="B", help="the same, for the new program")
    add("--runs", type=int, default=5, metavar="N", help="runs of each (default 5)")
    add("--seed", type=int, default=0, help="of the first run of each (default 0)")
    add("--nproc", type=int, default=1, help="ranks of a run (torchrun above 1)")
    add("--options", default="", help="options for both, in quotes")
    add("--out", type=Path, help="folder of the race (default logs/race/A_vs_B/DIGEST)")
    add("--report", dest="report_only", action="store_true", help="only report the runs so far")

    add = command("reproduce", reproduce.reproduce,
                  "Unpack the program inside a log into a folder and run it. Read programs of "
                  "unknown authors first (--dry-run).")
    add("path", type=Path, metavar="LOG|RECORD")
    add("--into", type=Path, help="folder to unpack into (default: below logs)")
    add("--dry-run", action="store_true", help="unpack and print the command, run nothing")
    add("--nproc", type=int, help="ranks (default: as in the log, or 1)")
    add("--seed", type=int, help="another seed than the log's")
    add("--options", default="", help="further options for the program, in quotes")

    add = command("audit", _audit, "Hold a clone of the public records to its logs: AUDIT.md.")
    add("archive", type=Path, metavar="ARCHIVE", help="the folder `records` of the clone")
    add("--history", action="store_true", help="write n, mean, sd, p of the logs to history.json")
    ladder.add_arguments(command(
        "ladder", ladder.ladder, "Train every rung of the ladder at pocket scale; table and plot."))
    return parser


def _table(args) -> int:
    chosen = [rules.track(name) for name in args.tracks or rules.TRACKS]
    if args.markdown:
        print("\n".join(table.write_markdown(args.root)))
    elif args.json:
        print(table.as_json(chosen, args.root))
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        found = [(track, table.rows(track, args.root)[-(args.last or 0) :]) for track in chosen]
        print("\n\n".join(table.terminal(track, rows, width) for track, rows in found))
    return 0


def _check(args) -> int:
    unknown = set(args.waive) - set(check.RULES)
    if unknown:
        raise ValueError(f"--waive: expected names of reasons ({', '.join(check.RULES)}), "
                         f"got {', '.join(sorted(unknown))}")
    for path in args.paths:
        _must_exist(path)
    folders = [p for p in args.paths if (p / "result.json").is_file()]
    verdicts = [(str(folder), check.check_folder(folder, args.root)) for folder in folders]
    places = [p for p in args.paths if p not in folders]
    if not places and (args.claim or args.at is not None or args.loss != "val_loss"):
        raise ValueError("--claim, --at, --loss: expected logs or a public folder; a record here "
                         "is held to its result.json")
    if places:
        logs = [log for place in places for log in _logs(place)]
        texts = [sys.stdin.read()] if args.claim == "-" else [
            history.read_text(p / "README.md") for p in places if (p / "README.md").is_file()]
        track = rules.track(_track(args, check.load(logs)[0], places))
        verdicts += claim.judge(logs, track, at=args.at, loss_key=args.loss, text="\n".join(texts),
                                differs=args.differs, systems_only=args.systems_only)
    if not args.paths:
        verdicts = table.check_all(args.root)
    failed = 0
    for label, verdict in verdicts:
        if args.deep and (ours := [r for r in verdict.runs if r.complete and r.format == "ours"]):
            best = Path(min(ours, key=lambda run: run.final_val_loss).path)
            for line in reproduce.replay(best, args.root):
                verdict.add("not-reproduced", best.name, line)
        counted = [r for r in verdict.reasons if r.name not in args.waive]
        failed += bool(counted)
        lines = summary_lines(verdict)
        lines += [f"{'waived ' if reason.name in args.waive else ''}{reason}"
                  for reason in check.grouped(verdict.reasons)]
        lines += [*verdict.notes, check.outlook(verdict, args.root) if counted else None]
        lines = [f"{'FAIL' if counted else 'ok'}  {label}", *filter(None, lines)]
        print("\n      ".join(map(printable, lines)))
    if not args.paths:
        print(f"{len(verdicts) - 1} record{'s' * (len(verdicts) != 2)} and the tables checked, "
              f"{failed or 'nothing'} failed")
    if any(run.format == "ours" for _, verdict in verdicts for run in verdict.runs):
        print("not proven: that the runs were made as the logs say. `python -m records reproduce` "
              "runs a program again")
    return 1 if failed else 0


def _track(args, runs, places: Sequence[Path] = ()) -> str:
    parts = {part for place in places for part in place.resolve().parts}
    public = [track.name for track in rules.TRACKS.values() if track.archive in parts]
    name = args.track or check.track_of(runs) or next(iter(public), None)
    if name is None:
        raise ValueError(f"--track: the logs do not name one track; expected one of "
                         f"{', '.join(rules.TRACKS)}")
    return name


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a log or a record folder, found nothing")


def _logs(path: Path) -> list[Path]:
    if path.is_dir():
        found = claim.log_files(path)
        if not found:
            raise FileNotFoundError(f"{path}: expected logs or a record folder, found neither")
        return found
    return [path]


def summary_lines(verdict) -> list[str]:
    """The numbers of a verdict, as `check` and `add` print them."""
    result, number = verdict.result, table.number
    if not result:
        return []
    loss, time = result["val_loss"], result["train_time_ms"]
    lines = [f"{result['track']}: n = {result['num_runs']}, loss mean {number(loss['mean'], 5)}, "
             f"sd {number(loss['sd'], 5)}, p = {table.p_value(result['p'])}"]
    measures = []
    if time["mean"] is not None:
        measures.append(f"time mean {time['mean'] / 1000:.3f} s, sd {number(time['sd'], 0)} ms")
    if result["steps"]:
        measures.append(f"{result['steps']:,} steps")
    if result["tokens"]:
        measures.append(f"{result['tokens']:,} tokens")
    return lines + [", ".join(measures)] * bool(measures)


def _add(args) -> int:
    from records.add import Refused, add

    try:
        folder = add(args.logs, args.name, by=args.by, track=args.track, kind=args.kind,
                     systems_only=args.systems_only, differs=args.differs, race=args.race,
                     root=args.root)
    except Refused as refused:
        lines = [*summary_lines(refused.verdict), *check.grouped(refused.verdict.reasons),
                 refused.advice]
        print("These runs are not a record yet:", *(line for line in lines if line), sep="\n  ",
              file=sys.stderr)
        print("Nothing was written.", file=sys.stderr)
        return 1
    print(f"{folder} made")
    print("\n".join(table.write_markdown(args.root)))
    print(f"next: answer the questions in {folder / 'README.md'}, then\n"
          "      python -m records table --markdown && python -m records check")
    return 0


def _rank(args) -> int:
    runs, status = parse(args.log), 0
    if not runs:
        raise ValueError(f"{args.log}: expected a log, found no measurement in it")
    for run in runs:
        name = _track(args, [run])
        same = {"data_digest": run.result.get("data_digest"), "folder": args.root}
        curve: list[tuple[int, float]] = []
        for i, point in enumerate(run.points):
            curve.append((point.step, point.val_loss))
            if i % args.every == 0 or point is run.final:
                print(f"step:{point.step}/{point.total or '?'} " + progress(
                    name, point.val_loss, point.train_time_ms, run.tokens_at(point.step),
                    history=curve, num_iterations=point.total, step=point.step, **same))
        said = [f"warning: {fault}" for fault in [*run.edits, *run.faults]]
        if not run.complete:
            said.insert(0, f"{args.log}: not a finished run: {run.why_incomplete}")
        elif owner := record_of(run, args.root):
            print(f"this is the log of {owner}")
        else:
            print(rank(name, run.train_time_ms, run.tokens, run.final_val_loss,
                       steps=run.final_step, **same))
        print(*map(printable, said), sep="\n", end="\n" * bool(said))
        status |= bool(said)
    return status


def _label(path: Path) -> str:
    """The name of a log without its uuid, short enough for a legend."""
    text = re.sub(r"[_-]?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "", path.stem) or path.stem
    return text if len(text) <= 40 else text[:39] + "…"


def _plot(args) -> int:
    from records import plot

    groups: dict[str, list] = {}
    for text in args.runs:
        label, equals, name = text.partition("=")
        path = Path(name if equals else text)
        _must_exist(path)
        if (path / "result.json").is_file():
            result, logs = history.read_result(path), check.folder_logs(path)
            label = label if equals else result["name"]
        else:
            logs = _logs(path)
            label = label if equals else _label(path)
        runs, unread = check.load(logs)
        for reason in unread:  # logs/*.txt holds profiled runs too
            print(f"passed over {reason}", file=sys.stderr)
        if drawn := [run for run in runs if run.points]:
            groups.setdefault(label, []).extend(drawn)
    if not groups:
        raise ValueError("expected at least one log with a measurement, got none")
    every = [run for runs in groups.values() for run in runs]
    name = args.track or check.track_of(every)
    track = rules.track(name) if name else None
    out = args.out or args.root.parent / "logs" / "curves"
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in plot.draw(list(groups.items()), track, out, title=args.title, root=args.root,
                          published=not args.no_published):
        print(path)
    return 0


def _audit(args) -> int:
    history.write(args.root / "AUDIT.md", claim.audit(args.archive, args.root).encode())
    print(args.root / "AUDIT.md")
    if args.history:
        print(claim.renew_history(args.archive, args.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
