"""What a person sees while a model trains: a header, a progress bar, lines that stay.

Every line goes to the terminal and, where it belongs to the record of the run, to the log. Without
a terminal there is no bar; the lines are the same.
"""

import shutil
import sys
import textwrap

from tqdm import tqdm


class Screen:
    """Prints on the first rank, stays silent on the others."""

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.bar: tqdm | None = None

    def line(self, text: str = "") -> None:
        """One line that stays, above the bar where there is one."""
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def facts(self, rows: dict[str, object]) -> None:
        """Aligned `name  value` rows, wrapped to the terminal's width."""
        width = max(len(name) for name in rows) + 2
        columns = max(shutil.get_terminal_size((80, 24)).columns, width + 20)
        for name, value in rows.items():
            wrapped = textwrap.wrap(str(value), columns - width - 1) or [""]
            for i, part in enumerate(wrapped):
                self.line(f"{name if i == 0 else '':<{width}}{part}")

    def start(self, total_tokens: int, done_tokens: int = 0) -> None:
        """Show the bar; there is none without a terminal."""
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(total=total_tokens, initial=done_tokens, unit="tok", unit_scale=True,
                            dynamic_ncols=True, leave=False, mininterval=0.25, smoothing=0.1,
                            desc="training")

    def advance(self, tokens: int, loss: float | None) -> None:
        if self.bar is not None:
            if loss is not None:
                self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update(tokens)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
