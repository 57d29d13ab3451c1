"""One thread for each test process: two of them run side by side, and tiny tensors gain nothing from more."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
