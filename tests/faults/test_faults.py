"""Whatever happens to workers, the client's text is the undisturbed one, each token once."""

from __future__ import annotations

import pytest

from .conftest import LONG, Patient, cut_neighbours, cut_off, held, join, join_mid_answer, kill_first, kill_last

pytestmark = pytest.mark.timeout(180)


def test_a_killed_worker_is_replaced_mid_answer(patient: Patient) -> None:
    patient.assert_undisturbed(patient.answer({20: kill_last}))


def test_a_join_takes_over_mid_answer(short_patient: Patient) -> None:
    """The new replica, with the newcomer in the place of the one that was missing, goes on with what runs."""
    patient = short_patient
    before = {node.name for stage in patient.serving() for node in stage}
    patient.assert_undisturbed(patient.answer({20: join_mid_answer}, LONG))
    patient.assert_moved()
    after = {node.name for stage in patient.serving() for node in stage}
    assert before < after
    assert len(after) == patient.swarm.num_workers


def test_a_worker_that_hangs_is_replaced_mid_answer(patient: Patient) -> None:
    patient.assert_undisturbed(patient.answer({20: lambda p: p.holding(0, 0).pause()}))


@pytest.mark.usefixtures("cuttable")
def test_two_workers_whose_connections_die_silently_link_anew_mid_answer(patient: Patient) -> None:
    coordinator = patient.swarm.coordinator
    assert coordinator is not None
    seen = len(coordinator.lines)
    patient.assert_undisturbed(patient.answer({20: cut_neighbours}))
    coordinator.wait_for("replica broken", 1, seen)
    assert not [line for line in coordinator.lines[seen:] if "worker lost" in line], "both were there all the time"


@pytest.mark.usefixtures("cuttable")
def test_a_worker_whose_connections_to_the_coordinator_die_silently_comes_back(patient: Patient) -> None:
    victim = patient.holding(-1, 0)
    seen = len(victim.lines)
    patient.assert_undisturbed(patient.answer({20: cut_off}))
    victim.wait_for("worker ready", 30, seen)


def test_a_clean_leave_moves_the_work_mid_answer_and_aborts_nothing(patient: Patient) -> None:
    coordinator, leaver = patient.swarm.coordinator, patient.holding(0, -1)
    assert coordinator is not None
    seen = len(coordinator.lines)
    patient.assert_undisturbed(patient.answer({20: lambda _: leaver.interrupt()}, LONG))
    patient.assert_moved()
    assert leaver.wait(30) == 0
    coordinator.wait_for(rf"worker left worker=\S+\.{leaver.name} ", 10, seen)
    assert not [line for line in coordinator.lines[seen:] if "WARNING" in line or "replica ended" in line]


def test_a_leave_and_a_join_together_mid_answer(patient: Patient) -> None:
    leaver = patient.holding(0, 0)

    def swap(patient: Patient) -> None:
        with held(patient.holding(-1, -1)):
            leaver.interrupt()
            join(patient)

    patient.assert_undisturbed(patient.answer({20: swap}, LONG))
    patient.assert_moved()
    patient.swarm.wait_serving(60, num_workers=patient.swarm.num_workers)
    assert leaver.wait(30) == 0


def test_two_losses_in_a_row(rich_patient: Patient) -> None:
    rich_patient.assert_undisturbed(rich_patient.answer({20: kill_last, 50: kill_first}))


def test_a_loss_during_recovery(rich_patient: Patient) -> None:
    def twice(patient: Patient) -> None:
        first, second = patient.holding(0, 0), patient.holding(-1, -1)
        first.kill()
        assert patient.swarm.coordinator is not None
        patient.swarm.coordinator.wait_for("replica broken", 30)
        second.kill()

    rich_patient.assert_undisturbed(rich_patient.answer({20: twice}))


def test_a_restarted_coordinator_finds_its_workers_and_the_answer_goes_on(patient: Patient) -> None:
    def restart(patient: Patient) -> None:
        assert patient.swarm.coordinator is not None
        patient.swarm.coordinator.kill()
        patient.swarm.start_coordinator()

    before = {worker["id"]: worker["pid"] for worker in patient.swarm.status()["workers"]}
    patient.assert_undisturbed(patient.answer({30: restart}))
    assert {worker["id"]: worker["pid"] for worker in patient.swarm.status()["workers"]} == before
