"""Child processes under a lease's limits: real ones, waited for by their pidfds."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from skynet.errors import CapacityError, ConfigError
from skynet.protocol.ids import LeaseId
from skynet.worker import children as module
from skynet.worker.children import ChildEnded, ChildLimits, Children
from skynet.worker.warden import LIMIT_PASSED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children need Linux")
LEASE, OTHER = LeaseId("task-1"), LeaseId("task-2")
MIB = 1 << 20
LIMITS = ChildLimits(memory_bytes=256 * MIB, time_s=30)
WAIT_S = 10


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


# Tells its pid and that of a process which left its session and whose own parent is gone. Both would stay.
FAMILY = python("""
    import os, subprocess, sys, time
    leave = "import subprocess; print(subprocess.Popen(['sleep', '99'], start_new_session=True, stdout=2).pid)"
    orphan = subprocess.run([sys.executable, "-c", leave], check=True, stdout=-1, text=True).stdout.strip()
    with open("pids", "w") as file:
        file.write(f"{os.getpid()} {orphan}")
    time.sleep(99)
""")


class Family(NamedTuple):
    """Where FAMILY runs, and where it tells its pids."""

    directory: Path
    fifo: int

    async def pids(self) -> list[int]:
        """Of its two members, once both are there."""
        nothing: list[int] = []
        ready = await asyncio.to_thread(select.select, [self.fifo], nothing, nothing, WAIT_S)
        assert ready[0], "the family didn't start"
        return [int(pid) for pid in os.read(self.fifo, 100).split()]


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    os.mkfifo(tmp_path / "pids")
    fifo = os.open(tmp_path / "pids", os.O_RDWR)
    yield Family(tmp_path, fifo)
    os.close(fifo)


def all_gone(pids: list[int]) -> bool:
    """Waits for their end."""
    for pid in pids:
        with suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                if not select.select([fd], [], [], WAIT_S)[0]:
                    return False
            finally:
                os.close(fd)
    return True


def run(directory: Path, command: list[str], limits: ChildLimits = LIMITS, **variables: str) -> ChildEnded:
    return asyncio.run(Children().run(LEASE, command, limits, directory, variables))


def test_a_command_runs_at_home_with_no_more_of_the_environment_than_its_lease_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    limits = ChildLimits(memory_bytes=64 * MIB, time_s=30, devices=("0", "GPU-7"))
    code = "import os; print(dict(os.environ), os.getcwd()); print(repr(os.read(0, 1))); raise SystemExit(3)"
    ended = run(tmp_path, python(code), limits, GREETING="hello")
    assert (ended.exit_code, ended.reason) == (3, "")
    said = ended.output.decode()
    assert "secret" not in said
    assert "'GREETING': 'hello'" in said
    assert "'CUDA_VISIBLE_DEVICES': '0,GPU-7'" in said
    assert said.count(str(tmp_path)) == 2, "HOME and the working directory"
    assert said.endswith("b''\n"), "nothing comes from standard input"


def test_without_devices_none_is_seen(tmp_path: Path) -> None:
    ended = run(tmp_path, python("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"))
    assert ended.output == b"''\n"


def test_only_the_end_of_a_long_output_is_kept(tmp_path: Path) -> None:
    limits = ChildLimits(memory_bytes=64 * MIB, time_s=30, output_bytes=1000)
    ended = run(tmp_path, python("import sys; sys.stdout.write('a' * 10**7); sys.stdout.write('the end')"), limits)
    assert len(ended.output) == 1000
    assert ended.output.endswith(b"athe end")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("x = bytearray(80 << 20)", ""),  # refused: the process sees a MemoryError
        (
            "import os, time\nfor _ in range(4): os.fork()\nx = bytearray(b'x') * (12 << 20); time.sleep(30)",
            "of memory, 67108864 are lent",
        ),
        (
            "import mmap, time\nm = mmap.mmap(-1, 80<<20)\nfor _ in range(80): m.write(bytes(1 << 20))\ntime.sleep(9)",
            "of memory, 67108864 are lent",
        ),
    ],
    ids=["one process", "many that are small", "shared memory"],
)
def test_a_lease_is_not_exceeded_in_memory(tmp_path: Path, code: str, told: str) -> None:
    ended = run(tmp_path, python(code), ChildLimits(memory_bytes=64 * MIB, time_s=20))
    assert told in ended.reason
    if told:
        assert ended.exit_code == LIMIT_PASSED
    else:
        assert (ended.exit_code, ended.reason) == (1, "")
        assert b"MemoryError" in ended.output


def test_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    code = """
        import os, time
        x = bytearray(b"x") * (30 << 20)
        for _ in range(3): os.fork()
        time.sleep(0.4)
    """
    ended = run(tmp_path, python(code), ChildLimits(memory_bytes=64 * MIB, time_s=20))
    assert (ended.exit_code, ended.reason) == (0, "")


def test_time_that_is_over_ends_all_that_the_command_started(family: Family) -> None:
    async def work() -> None:
        children = Children()
        limits = ChildLimits(memory_bytes=256 * MIB, time_s=1.5)
        running = asyncio.create_task(children.run(LEASE, FAMILY, limits, family.directory))
        pids = await family.pids()
        ended = await running
        assert ended.exit_code == LIMIT_PASSED
        assert ended.reason == "ran for 1.5 s, longer isn't lent"
        assert all_gone(pids)

    asyncio.run(work())


async def end_its_lease(children: Children, running: asyncio.Task[ChildEnded]) -> None:
    await children.end_lease(LEASE)
    assert (await running).reason == "its lease ended"


async def close(children: Children, running: asyncio.Task[ChildEnded]) -> None:
    await children.close()
    assert (await running).reason == "its worker ends"


async def cancel(children: Children, running: asyncio.Task[ChildEnded]) -> None:
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("end", [end_its_lease, close, cancel])
def test_all_that_runs_under_a_lease_ends_with_it(
    family: Family, end: Callable[[Children, asyncio.Task[ChildEnded]], Awaitable[None]]
) -> None:
    async def work() -> None:
        children = Children()
        running = asyncio.create_task(children.run(LEASE, FAMILY, LIMITS, family.directory))
        pids = await family.pids()
        assert children.leases == {LEASE}
        await children.end_lease(OTHER)
        assert not running.done()
        async with asyncio.timeout(WAIT_S):
            await end(children, running)
        assert all_gone(pids)
        assert children.leases == set()

    asyncio.run(work())


def test_a_lease_that_ends_while_its_child_is_being_started_ends_the_child(family: Family) -> None:
    async def work() -> None:
        children = Children()
        running = asyncio.create_task(children.run(LEASE, FAMILY, LIMITS, family.directory))
        await asyncio.sleep(0)
        assert children.leases == {LEASE}
        async with asyncio.timeout(WAIT_S):
            await children.end_lease(LEASE)
            assert (await running).reason == "its lease ended"

    asyncio.run(work())


def test_a_worker_that_is_killed_takes_its_children_with_it(family: Family) -> None:
    worker = f"""
        import asyncio, pathlib
        from skynet.worker.children import ChildLimits, Children
        limits = ChildLimits(memory_bytes={256 * MIB}, time_s=60)
        asyncio.run(Children().run("task-1", {FAMILY!r}, limits, pathlib.Path({str(family.directory)!r})))
    """
    with subprocess.Popen(python(worker)) as process:
        pids = asyncio.run(family.pids())
        process.send_signal(signal.SIGKILL)
        assert all_gone(pids)


def test_a_killed_warden_takes_its_command_with_it(tmp_path: Path) -> None:
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(99)"
    ended = run(tmp_path, python(code))
    assert ended.exit_code == -signal.SIGKILL


def test_the_loop_goes_on_while_a_child_computes_and_talks_without_pause(tmp_path: Path) -> None:
    async def work() -> int:
        limits = ChildLimits(memory_bytes=64 * MIB, time_s=1)
        code = "while True: print('x' * 100000)"
        running = asyncio.create_task(Children().run(LEASE, python(code), limits, tmp_path))
        ticks = 0
        while not running.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert "longer isn't lent" in running.result().reason
        return ticks

    assert asyncio.run(work()) >= 20


def test_a_command_that_can_not_be_started_says_so(tmp_path: Path) -> None:
    ended = run(tmp_path, ["/nowhere/to/be/found"])
    assert ended.exit_code == LIMIT_PASSED
    assert "can't be started" in ended.reason
    assert "/nowhere/to/be/found" in ended.reason


def test_children_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CHILDREN", 0)
    with pytest.raises(CapacityError, match="0 children run already"):
        run(tmp_path, ["true"])


def test_limits_that_give_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        ChildLimits(memory_bytes=0, time_s=1)
