"""Records of the speedrun: every number computed from a log, every claim checkable.

`python -m records --help` lists the commands. This package reads text: it never imports the
trainer, the model, the optimizers, the data or torch. `records.log` is the one definition of the
log format, `records.rank` compares a run with the records.
"""
