"""Faults put in on purpose; README.md is the table of cases, with what happens in each."""
