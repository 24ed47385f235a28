"""What must be set before any test imports torch."""

import os

from hypothesis import settings

# Two threads that wait for each other by spinning, on cores that are busy, make a small eigenvalue problem
# two hundred times slower; asleep they cost nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A stalled machine is no error: no test asserts a time.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
