"""The local stack behind `grpo up` and `grpo down`: Valkey, SeaweedFS, the API and one worker on this machine.

Owns their processes, ports, secrets and data folder; not what they do. Everything listens on 127.0.0.1 only,
and nothing outlives its supervisor.
"""
