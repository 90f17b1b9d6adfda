"""Reads what the API shows of jobs: events, metrics, rollouts, queue positions, and numbers for monitoring.

Owns queries and their paging; writes nothing. Invariant: an answer comes from the objects that are now valid for the
job, and no decision about the job depends on it.
"""
