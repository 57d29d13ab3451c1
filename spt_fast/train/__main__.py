"""`torchrun -m spt_fast.train RECIPE` is `spt-fast train RECIPE`, for launchers that start a module on every rank."""

from __future__ import annotations

import os
import sys

from spt_fast.cli import main

if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(
            f"spt-fast: WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains in one process; "
            "launch it with --nproc_per_node=1",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = ["spt-fast", "train", *sys.argv[1:]]
    main()
