"""The life of a job: its record and states, its lease, its objects in storage, and the worker that runs it.

Owns every write to Valkey and to object storage; serves no HTTP and trains nothing itself.
"""
