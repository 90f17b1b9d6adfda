"""Running one job on this host: claim, prepare, train in a child process, upload, write the outcome.

Owns the child process, the lease and the run's copy in the bucket; `grpo_core` trains. Invariant: a run writes only
below its own epoch's prefix, and nothing after it has lost its lease.
"""
