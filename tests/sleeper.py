"""A program that hangs."""

import time

time.sleep(10**6)
