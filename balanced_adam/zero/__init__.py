"""Everything that knows DeepSpeed: registration by name, patches of its defects on our paths, ZeRO's step in one
pass."""

from balanced_adam.zero.decision import describe
from balanced_adam.zero.packed_state import unpacking
from balanced_adam.zero.registration import TESTED_DEEPSPEED, register

__all__ = ["TESTED_DEEPSPEED", "describe", "register", "unpacking"]
