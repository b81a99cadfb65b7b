"""The high-availability pair: who is active, what the standby has, and how it takes over.

The pure half decides: :mod:`~sapin.cluster.pair` with the role, the streams, the watch over the peer and the alarms. The
other half does: the link, the guard that holds the virtual addresses, the disk, joined by :mod:`~sapin.cluster.node`.
"""
