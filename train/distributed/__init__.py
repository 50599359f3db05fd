"""Who the ranks are: launch environments, the process group, the watchdog and requests to stop."""
