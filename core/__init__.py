"""The model, the decisions (pure) and the trio dataplane.

Everything outside :mod:`sapin.core.dataplane` is pure: no socket, no clock, no random source.
"""
