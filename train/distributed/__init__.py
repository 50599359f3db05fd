"""The ranks of a run: launch environment, process group, watchdog and stop requests."""
