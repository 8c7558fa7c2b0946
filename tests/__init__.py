"""The tests; what has to be set before torch and Numba are loaded stands here."""

from __future__ import annotations

import os

# OpenMP's threads spin while they wait for each other, and where other processes want the cores
# too, a step of milliseconds then takes a second. Passive ones give the core away.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
