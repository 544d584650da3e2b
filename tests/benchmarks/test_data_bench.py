"""The ratios of the benchmark are what their names say."""

from benchmarks.data_bench import median_figures, ratios_of
from benchmarks.measured_process import ProcessFigures


def took(seconds: float) -> ProcessFigures:
    return ProcessFigures(wall_seconds=seconds, cpu_seconds=seconds / 2, peak_gib=seconds)


def test_ratios() -> None:
    results = {
        "ours": {"1": {"a": took(1), "b": took(3)}, "2": {"a": took(1), "b": took(1)}},
        "limit": {"1": {"a": took(1), "b": took(1)}},
        "loop": {"1": {"a": took(40), "b": took(40)}, "2": {"a": took(20), "b": took(10)}},
        "datatrove": {"1": {"a": took(10), "b": took(10)}, "2": {"a": took(4), "b": took(4)}},
    }
    assert ratios_of(results) == {
        "fraction_of_limit": 0.5,
        "ratio_to_loop_per_core": 20.0,
        "ratio_to_loop_two_cores": 15.0,
        "ratio_to_datatrove": 5.0,
        "ratio_to_datatrove_two_cores": 4.0,
    }


def test_medians() -> None:
    assert median_figures([took(1), took(9), took(2)]) == ProcessFigures(
        wall_seconds=2, cpu_seconds=1, peak_gib=9
    )
