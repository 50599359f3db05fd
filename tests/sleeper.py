"""A program that hangs."""

import time

from train.common.processes import end_with_parent

end_with_parent()
time.sleep(10**6)
