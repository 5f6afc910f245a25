"""A response's numbers are plain means of what counts, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from collectors.measure import WINDOW, measure_response


@st.composite
def responses(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, k = draw(st.integers(0, 60)), draw(st.integers(1, 4))
    numbers = st.floats(-1e4, 1e4, width=32)
    values = draw(arrays.arrays(np.float32, (tokens, k), elements=numbers))
    counted = draw(arrays.arrays(np.bool_, tokens))
    readout = draw(arrays.arrays(np.float64, k, elements=st.floats(-2, 2)))
    return values, counted, readout


@settings(max_examples=200, deadline=None)
@given(responses())
def test_against_the_definition(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    values, counted, readout = drawn
    measured = measure_response(values, counted, readout)
    kept = [row.astype(np.float64) for row, counts in zip(values, counted, strict=True) if counts]
    if not kept:
        assert measured is None
        return
    assert measured is not None
    assert measured.tokens == len(kept)
    mean = sum(kept) / len(kept)
    windows = [sum(kept[i : i + WINDOW]) / WINDOW for i in range(len(kept) - WINDOW + 1)] or [mean]
    assert np.allclose(measured.mean, mean, atol=1e-6)
    assert np.allclose(measured.last_window, windows[-1], atol=1e-6)
    assert float(measured.lowest_window @ readout) == pytest.approx(min(w @ readout for w in windows), abs=1e-6)
    assert any(np.allclose(measured.lowest_window, window, atol=1e-6) for window in windows)


def test_the_lowest_window_follows_the_readout() -> None:
    values = np.zeros((40, 2), np.float32)
    values[4:20, 0] = -1.0
    values[20:36, 1] = -1.0
    everything = np.ones(40, np.bool_)
    first = measure_response(values, everything, np.array([1.0, 0.0]))
    second = measure_response(values, everything, np.array([0.0, 1.0]))
    assert first is not None and second is not None
    assert first.lowest_window.tolist() == [-1.0, 0.0]
    assert second.lowest_window.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_counts_only_where_its_token_does(bad: float) -> None:
    values = np.ones((20, 2), np.float32)
    values[7, 1] = bad
    counted = np.ones(20, np.bool_)
    assert measure_response(values, counted, np.ones(2)) is None
    counted[7] = False
    measured = measure_response(values, counted, np.ones(2))
    assert measured is not None and measured.mean.tolist() == [1.0, 1.0]


def test_a_long_response_loses_no_digits() -> None:
    # Windows are differences of running sums: after 100,000 tokens of 1e3 the last one must still be exact.
    values = np.full((100_000, 1), 1e3, np.float32)
    values[-WINDOW:] = 1.5
    measured = measure_response(values, np.ones(len(values), np.bool_), np.ones(1))
    assert measured is not None
    assert measured.last_window[0] == pytest.approx(1.5, abs=1e-6)
