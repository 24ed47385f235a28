"""What must be set before any test imports torch."""

import os

# Two threads that wait for each other by spinning, on cores that are busy, make a small eigenvalue problem
# two hundred times slower; asleep they cost nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
