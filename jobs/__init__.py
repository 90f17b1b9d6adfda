"""The life of a job, from submission to its artifacts: everything but HTTP and training.

Owns every write to Valkey and to object storage; serves no HTTP and imports no torch. Invariant: imports between the
subpackages point one way, from `worker` and `service` to `lifecycle` and `read`, to `auth`, to `store`; import-linter
checks it.
"""
