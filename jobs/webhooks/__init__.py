"""Webhooks: events of an owner's jobs, posted to addresses that the owner has registered.

Owns registration, which addresses may be called, signatures, and delivery. Nothing here delays a request or a job: the
scripts of the job store record each change, and a thread of the API (`courier`) does the rest. Invariant: the end of a
job is reported at least once to every webhook that asks for it, also after API processes were killed or Valkey lost its
writes; a webhook that fails for a day is disabled instead.
"""
