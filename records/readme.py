"""The README of a record folder: numbers are filled in, prose is asked of the author.

The part between the `numbers` markers is written from result.json and checked against it. Each
question is an HTML comment; the record is finished when the author has replaced all of them.
"""

from __future__ import annotations

import math
import re

from records import rules
from records.history import amount, clock, count, metric_value
from records.stats import comparison_words

BEGIN, END = "<!-- numbers:begin (written by python -m records) -->", "<!-- numbers:end -->"
_ASK = re.compile(r"<!-- write: ([^<>]{1,300}?) -->")


def _value(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def numbers(result: dict) -> str:
    """The table of a record's numbers, markers included."""
    track = rules.track(result["track"])
    loss, time = result["val_loss"], result["train_time_ms"]
    rows = [
        ("track", f"{track.name}: {track.title}"),
        ("validation loss", f"mean {_value(loss['mean'], '.4f')}, sd {_value(loss['sd'], '.4f')}, "
                            f"n = {result['num_runs']}; target {track.target:g}"),
    ]
    if track.test == "fixed_sigma":
        rows.append(("rule", f"(target - mean) * sqrt(n) = {_value(result.get('margin'), '.5f')}, "
                             f"at least {track.margin:g} is asked"))
    else:
        asked = f", p < {track.alpha:g} is asked" if track.alpha else ""
        exempt = "; a systems-only record is exempt" if result["systems_only"] else ""
        rows.append(("p, one-sided t-test", f"{_value(result['p'], '.2g')}{asked}{exempt}"))
    rows += [
        ("training time", f"mean {clock(time['mean'])}, sd {clock(time['sd'])}"),
        ("steps", count(result["steps"])),
        ("tokens", f"{result['tokens']:,}" if result["tokens"] else "-"),
        ("parameters", f"{result['parameters']:,}" if result.get("parameters") else "-"),
        ("hardware", result["hardware"] or "-"),
        ("software", f"Python {result['python'] or '-'}, torch {result['torch'] or '-'}"),
        ("seeds", ", ".join(str(seed) for seed in result["seeds"])),
        ("corpus digest", (result["data_digest"] or "-")[:16]),
        ("losses", ", ".join(f"{value:.4f}" for value in result["losses"])),
        ("times", ", ".join(clock(value) for value in result["times_ms"])),
    ]
    race = result.get("race")
    if race:
        rows.append(("race", comparison_words(race["a"], race["b"])))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    metric = track.metric[0]
    best = amount(metric_value(result, metric), metric)
    head = f"{best}, {result['date']}, by {', '.join(result['by'])}."
    return f"{BEGIN}\n{head}\n\n| | |\n| --- | --- |\n{table}\n{END}"


def renew(text: str, result: dict) -> str:
    """The README with the numbers of `result`; the prose stays as it is."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"README.md of {result['name']}: its markers {BEGIN} and {END} are gone")
    return text[:start] + numbers(result) + text[end + len(END) :]


def unanswered(text: str) -> list[str]:
    """The questions that the author has not answered yet."""
    return [" ".join(question.split()) for question in _ASK.findall(text)]


def changed(text: str) -> str:
    """What changed, in one line: the first paragraph under that heading, as the table shows it."""
    part = text.partition("\n## What changed\n")[2].partition("\n## ")[0]
    part = re.sub(r"<!--.{0,1000}?-->", "", part[:10_000], flags=re.DOTALL).strip()
    return " ".join(part.partition("\n\n")[0].split())


def template(result: dict) -> str:
    """The README of a new record folder."""
    folder = f"records/{result['track']}/{result['date']}_{result['name']}"
    before = f"record `{result['prior']}`" if result.get("prior") else "the recipe it starts from"
    return f"""# {result["name"]}

{numbers(result)}

![loss curves](curves.png)

## What changed

<!-- write: One or two sentences: what is different from {before}? The table shows them. -->

## Why it should work

<!-- write: The idea and its source, in your own words. -->

## What else was tried

<!-- write: What did not help, with numbers; or "nothing else". -->

## Verify it

    python -m records check {folder}
    python -m records reproduce {folder}

The first derives every number above from the logs again, the second unpacks the program and runs
it.
"""
