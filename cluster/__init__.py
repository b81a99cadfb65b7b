"""The high-availability pair: two nodes, of which one is active, and the other has everything that it needs to take over.

Pure are the role, replication and their joint machine (:mod:`~sapin.cluster.pair`); :mod:`~sapin.cluster.node` joins them to the
link, the guard, the dataplane, the disk and the clock. Core knows nothing of it.
"""
