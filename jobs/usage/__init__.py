"""Usage and quotas of owners: GPU time and bytes in the bucket.

Owns the counts and the quotas; submission and upload refuse what exceeds them. Invariant: a quota never ends a job that
was accepted.
"""
