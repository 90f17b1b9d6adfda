"""Authentication: API keys, keys for scrapers, browser sessions and the limit on requests.

Owns what is stored about callers; the API decides which route needs which scope. Invariant: keys and session tokens are
never stored or logged, only their digests.
"""
