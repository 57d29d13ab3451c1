"""The campaign of tests/faults.py, with the machine beside its results: `python -m benchmarks.faults --help`."""

from benchmarks.machine import machine
from tests import faults

if __name__ == "__main__":
    faults.main(machine("torch", "deepspeed"))
