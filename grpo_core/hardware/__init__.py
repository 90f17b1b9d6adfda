"""What a run has to fit on: the visible GPUs, the base model's files and size, and the micro-batch.

Owns how they are found and measured; estimates for a spec without a machine are in `estimates`. Invariant: nothing
here imports torch.
"""
