"""Deprecated alias of ``python -m train.requeue``, for copies of older batch scripts."""

import sys

from train.requeue import main

if __name__ == "__main__":
    print("train.restarts is now train.requeue; this name goes with the next release.", file=sys.stderr)
    sys.exit(main(sys.argv[1:]))
