"""Usage and quotas of owners: GPU time and bytes in the bucket.

Owns the counts, the quotas, prices and reports; submission and upload refuse what exceeds quotas. Invariant: a quota
never ends a job that was accepted.
"""
