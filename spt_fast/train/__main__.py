"""`torchrun -m spt_fast.train RECIPE` is `spt-fast train RECIPE`, for launchers that start a module on every rank."""

from __future__ import annotations

import sys

from spt_fast.cli import main

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N although LOCAL_RANK is set.
    sys.argv = ["spt-fast", "train", *(word for word in sys.argv[1:] if not word.startswith("--local_rank="))]
    main()
