"""The self-test at the end of a run: with plain PEFT, the saved adapter must compute what the trainer's model computes.

Owns the checks, the texts they compare and the reference process; an engine only answers. Invariant: a run whose
result does not pass is never reported as succeeded.
"""
