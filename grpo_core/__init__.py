"""GRPO training as a library: the job spec, rewards, data sets, records, and the loop that runs them.

Owns everything a run means; knows nothing of HTTP, queues or object storage. Torch comes only with the engines
themselves, with `checkpoints.writer`, `checkpoints.tensor_tree`, `compat.trl` and with `selftest`. Invariant: imports
between the subpackages point one way, from `training` through `engines` down to `spec` and `errors`; import-linter
checks it.
"""

__version__ = "0.1.0"
