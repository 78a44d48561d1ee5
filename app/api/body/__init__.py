"""Bodies of requests, from bytes to models."""
