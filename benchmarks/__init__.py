"""Measurements, with the machine recorded. Libraries to compare with may be in build/peers (`make peers`)."""

import sys
from pathlib import Path

_PEERS = Path(__file__).parents[1] / "build" / "peers"
if _PEERS.is_dir() and str(_PEERS) not in sys.path:
    sys.path.append(str(_PEERS))  # last, so that installed packages come first
