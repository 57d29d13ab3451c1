"""The campaign of tests/fuzz.py, with the machine beside its results: `python -m benchmarks.fuzz --help`."""

from benchmarks.machine import machine
from tests import fuzz

if __name__ == "__main__":
    fuzz.main(machine("torch", "numpy"))
