"""The process that owns the GPU: it claims jobs from the table and has them trained. Knows no HTTP.

`supervisor.py` is the process that writes to the database and never imports torch; `trainer.py` is its child, which
imports torch and never sees the database; `protocol.py` declares the messages between them.
"""
