"""How the service is run: the local stack, containers and Kubernetes; nothing here knows what a job is."""
