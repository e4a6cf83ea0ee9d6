"""Spinning goes on while it pays and stops where it doesn't."""

from __future__ import annotations

from skynet.protocol.spin import MAX_REST, PATIENCE, Spinner


def spins(spinner: Spinner, pays: bool) -> bool:
    """One wait: whether it spun."""
    if spinner.begin(now=10.0) <= 10.0:
        return False
    if pays:
        spinner.hit()
    else:
        spinner.miss()
    return True


def test_spinning_that_pays_goes_on() -> None:
    spinner = Spinner(1e-4)
    assert all(spins(spinner, pays=True) for _ in range(1000))


def test_spinning_in_vain_becomes_rare_and_comes_back_when_it_pays() -> None:
    spinner = Spinner(1e-4)
    in_vain = [spins(spinner, pays=False) for _ in range(10_000)]
    assert all(in_vain[:PATIENCE])
    assert sum(in_vain) < 10_000 / MAX_REST + 20
    waits = [spins(spinner, pays=True) for _ in range(MAX_REST + 100)]
    assert all(waits[-99:])


def test_no_time_to_spin_means_never() -> None:
    assert not any(spins(Spinner(0.0), pays=True) for _ in range(10))
