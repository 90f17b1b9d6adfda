"""GRPO training as a library: the job spec, rewards, data sets, records, and the loop that runs them.

Owns everything a run means; knows nothing of HTTP, queues or object storage. Importing this package, or
anything outside `engines`, `training` and `evaluation`, never imports torch.
"""

__version__ = "0.1.0"
