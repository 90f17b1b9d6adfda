"""Manifests for Kubernetes, and the worker that `scaledjob.yaml` runs."""
