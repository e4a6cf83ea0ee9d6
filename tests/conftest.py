"""Shared by all tests: strict deadlines, and what a machine may lack."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch: tests share two cores
