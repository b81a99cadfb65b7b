"""Persistence: by which keys a returning client is recognised."""
