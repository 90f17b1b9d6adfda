"""What watches training step by step: the recorder, rules that stop a run, audits and experiment trackers.

Owns the numbers of a step and what follows from them; writes files only through `run_dir`. Invariant: nothing here
changes a weight, and nothing imports torch.
"""
