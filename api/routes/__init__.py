"""The routes, one module a noun. Handlers translate; what is decided is decided in `jobs` and `grpo_core`."""
