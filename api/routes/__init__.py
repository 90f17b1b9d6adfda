"""The routes, one module per noun. Handlers only translate; decisions are made in `jobs` and `grpo_core`."""
