"""Every way in for people and tools: the command line, the control socket and the daemon."""
