"""Every change of a job's state outside a run: submit, commands, outcome, deletion, recovery, wake-ups.

Owns the order of writes to bucket and record; `jobs.store` stores them, and `jobs.worker` runs jobs. Invariant: what
decides about a job is written once to the bucket before its record changes, so every operation can be interrupted at
any point and repeated.
"""
