"""The run folder: its layout, and the records and events in it. The contract between a run and its readers.

Owns the names, columns and formats of those files (docs/reference/run-folder.md), and not what fills them.
Invariant: a file appears under its name only when it is complete, and a line of a log is written in one piece.
"""
