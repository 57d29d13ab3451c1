"""A sample of the soak: what a run holds on to does not grow with its steps."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak import Sample, growth, is_flat, soak


def test_a_run_holds_no_more_files_and_threads_as_it_goes_on(tmp_path: Path) -> None:
    samples = soak(tmp_path, 60)
    assert len(samples) == 21
    assert samples[-1].step == 60
    grown = growth(samples)
    assert (grown["files"], grown["threads"]) == (1, 1)


def test_what_grows_is_found() -> None:
    leaky = [Sample(i, 100.0, 10 + i // 10, 3) for i in range(20)]
    assert not is_flat(growth(leaky))
    assert not is_flat(growth([Sample(i, 100.0 + i, 10, 3) for i in range(20)]))
    assert is_flat(growth([Sample(i, 100.0, 10, 3) for i in range(20)]))
