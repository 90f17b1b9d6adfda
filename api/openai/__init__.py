"""The routes that speak OpenAI's API, under /v1, so that scripts written with its SDK run here."""
