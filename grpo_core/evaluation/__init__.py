"""Held-out evaluation: greedy answers before and after training, and the statistics that compare them.

Owns how answers are generated, read and compared; which rows are trained on is decided in `held_out` alone. Invariant:
no held-out question is ever trained on.
"""
