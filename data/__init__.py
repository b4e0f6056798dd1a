"""Tokens on disk, batches in order: the part of the harness that records do not change.

shards.py (the .bin format), loader.py (batches), corpus.py (built-in text), fineweb.py (fetch),
text.py, tokenizer.py and prepare.py (your own text). Nothing is imported here: corpus.py runs
without torch, shards.py with numpy alone.
"""
