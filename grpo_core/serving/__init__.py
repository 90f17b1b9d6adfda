"""Answers chat requests with a base model and a fixed list of adapters, in a process like the one that trains.

`wire` has the messages between the worker and this process, `run` the process itself. Both engines are a `Model`:
`native_model` and `transformers_model`. `batch` decides whose token is next, `completion` turns tokens into text.
Importing this package imports no torch.
"""
