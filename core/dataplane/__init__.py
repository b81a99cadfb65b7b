"""The trio dataplane: the only part of ``core`` that owns sockets, files, clocks and tasks."""
