"""One OpenMP thread, set before torch is imported: a fork of a process with more would hang."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
