"""The high-availability pair: roles, replication and takeover attach here.

Nothing is replicated yet. What a peer will need is already published by ``core``: the change feed of
:mod:`sapin.core.affinity` and the flow records of :mod:`sapin.core.journal`.
"""
