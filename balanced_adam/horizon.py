"""The former name of :mod:`balanced_adam.beta_schedule`, for one release."""

import warnings

from balanced_adam.beta_schedule import *  # noqa: F403
from balanced_adam.beta_schedule import resolve as choose  # noqa: F401
from balanced_adam.beta_schedule import schedule as course  # noqa: F401

warnings.warn("balanced_adam.horizon is now balanced_adam.beta_schedule", DeprecationWarning, stacklevel=2)
