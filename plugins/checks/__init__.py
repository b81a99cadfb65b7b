"""Health checks: whether a real server can take clients."""
