"""Answers chat requests with a base model and a fixed list of adapters, in a process like the one that trains.

`wire` has the messages between the worker and this process, `run` the process itself. `asked` checks requests and
counts what was said, `completion` turns tokens into text. `batch` decides whose token is next for the two engines that
are a `Model`: `native_model`, with `pool` on a GPU, and `transformers_model`.
Importing this package imports no torch.
"""
