"""`python -m flat N`: record N as one readable program."""
