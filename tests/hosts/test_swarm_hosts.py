"""The whole swarm on several hosts: the real commands, found by mDNS or by hand, behind NAT, over links that break."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest

from skynet.testing import hosts
from skynet.testing.host_swarm import Ended, HostSwarm
from skynet.testing.hosts import Host, Network
from skynet.testing.processes import NodeProcess

pytestmark = pytest.mark.timeout(240)

Roles = dict[tuple[str, str], tuple[str, ...]]  # (command, host): arguments
PROMPT = "Once upon a time"
INFER = ("infer", PROMPT, "--max-tokens", "60")
FIND_S = 5.0  # how long `skynet` looks for a coordinator


@cache
def reason(*, nat: bool = False) -> str | None:
    return hosts.missing(nat=nat)


@dataclass
class World:
    """Hosts that tests share, and what runs on them. A test says what it needs; what runs already is kept."""

    network: Network
    swarm: HostSwarm
    known: dict[str, Host] = field(default_factory=dict)
    roles: Roles = field(default_factory=dict)  # what runs
    text: str = ""  # the answer to PROMPT in fp32, the same in every layout

    def host(self, name: str, make: Callable[[str], Host] | None = None) -> Host:
        """The host of this name, on the switch if not made otherwise."""
        if name not in self.known:
            self.known[name] = (make or self.network.host)(name)
        return self.known[name]

    def run_these(self, wanted: Roles) -> None:
        """Have exactly these commands running, coordinators first."""
        for command, nodes in (("worker", self.swarm.workers), ("coordinator", self.swarm.coordinators)):
            for name, node in list(nodes.items()):
                if wanted.get((command, name)) != self.roles.get((command, name)) or not node.is_running:
                    node.kill()
                    node.stop()
                    del nodes[name]
                    self.roles.pop((command, name), None)
        for (command, name), arguments in sorted(wanted.items()):
            if (command, name) not in self.roles:
                start = self.swarm.start_coordinator if command == "coordinator" else self.swarm.start_worker
                start(self.known[name], *arguments)
                self.roles[command, name] = arguments

    def serve(self, layout: str, workers: dict[str, tuple[str, ...]]) -> NodeProcess:
        """Have box coordinate exactly these workers, in fp32 and this layout; returns the coordinator."""
        wanted: Roles = {("coordinator", "box"): ("--dtype", "float32", "--layout", layout)}
        wanted |= {("worker", name): arguments for name, arguments in workers.items()}
        if wanted != self.roles or not all(node.is_running for node in self.swarm.nodes):
            self.run_these({role: arguments for role, arguments in wanted.items() if role[0] == "worker"})
            self.run_these(wanted)
            self.swarm.coordinators["box"].wait_for(f"replica serves .*layout={layout}", 90)
        return self.swarm.coordinators["box"]

    @property
    def by_hand(self) -> tuple[str, str]:
        return "--coordinator", self.host("box").address


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if reason():
        pytest.skip(f"{reason()}")
    with Network() as network, HostSwarm(tmp_path_factory.mktemp("homes")) as swarm:
        world = World(network, swarm)
        for name in ("box", "left", "right", "laptop"):
            world.host(name)
        yield world


def fingerprint_of(coordinator: NodeProcess) -> str:
    return coordinator.wait_for(r"coordinator ready .*fingerprint=(\S+)", 60)[1]


def assert_answers(ended: Ended) -> str:
    assert ended.code == 0, ended
    assert len(ended.output) > 20, ended
    return ended.output


# -- finding each other


def test_without_a_coordinator_everyone_says_what_was_tried_and_how_to_go_on(world: World) -> None:
    world.run_these({})
    start_up = world.swarm.run(world.host("laptop"), "status", "--coordinator", "127.0.0.1:9")
    assert start_up.code == 4
    assert "127.0.0.1" in start_up.errors
    commands = (INFER, ("status",), ("worker",))
    for command, asked in [(command, world.swarm.ask(world.host("laptop"), *command)) for command in commands]:
        ended = asked.end()
        assert ended.code == 4, ended
        assert "mDNS" in ended.errors
        assert "--coordinator HOST" in ended.errors
        assert "Traceback" not in ended.errors
        if command != ("worker",):  # which measures its device first
            assert ended.seconds < FIND_S + 1 + 4 * start_up.seconds  # they start side by side


def test_three_commands_without_options_find_each_other_across_hosts(world: World) -> None:
    world.run_these({("coordinator", "box"): (), ("worker", "left"): ()})
    assert_answers(world.swarm.run(world.host("laptop"), *INFER))  # waits for the worker if need be
    seen = world.swarm.workers["left"].wait_for(r"first visit swarm=skynet fingerprint=(\S+)", 60)[1]
    assert seen == fingerprint_of(world.swarm.coordinators["box"])
    facts = world.swarm.status(world.host("right"))
    assert world.swarm.serving(facts) == [{"left"}]


def test_a_host_of_another_subnet_needs_an_invite(world: World) -> None:
    world.run_these({("coordinator", "box"): (), ("worker", "left"): ()})
    beyond = world.host("beyond", lambda name: world.network.host_beyond(name, [world.host("box")]))
    assert world.swarm.run(beyond, *INFER).code == 4, "mDNS ends at the router"
    refused = world.swarm.run(beyond, *INFER, *world.by_hand)
    assert refused.code == 5, refused
    assert beyond.address in refused.errors
    assert "invite" in refused.errors
    made = world.swarm.run(world.host("box"), "invite", "create", "--role", "client", "--json")
    invite = re.search(r"skynet-invite-\w+", made.output)
    assert invite, made
    assert_answers(world.swarm.run(beyond, *INFER, "--invite", invite[0]))
    assert_answers(world.swarm.run(beyond, *INFER, *world.by_hand))  # known by now


def test_of_two_swarms_the_one_that_is_asked_for_is_joined(world: World) -> None:
    world.host("tower")
    one: Roles = {("coordinator", "box"): (), ("worker", "left"): ()}
    world.run_these(one | {("coordinator", "tower"): ("--name", "bees")})
    ended = world.swarm.run(world.host("right"), "worker")
    assert ended.code == 4, ended
    assert "2 swarms answer" in ended.errors
    for name in ("skynet", "bees"):
        assert (
            f"{name} (key {fingerprint_of(world.swarm.coordinators['box' if name == 'skynet' else 'tower'])})"
            in ended.errors
        )
    assert "--swarm" in ended.errors
    world.run_these(one | {("coordinator", "tower"): ("--name", "bees"), ("worker", "right"): ("--swarm", "bees")})
    bees = world.swarm.coordinators["tower"]
    bees.wait_for("worker joined", 60)
    assert world.swarm.workers["right"].wait_for(r"first visit swarm=bees fingerprint=(\S+)", 60)[1] == fingerprint_of(
        bees
    )
    assert_answers(world.swarm.run(world.host("laptop"), *INFER, "--swarm", "bees"))


def test_a_known_name_with_another_key_is_another_swarm(world: World) -> None:
    one: Roles = {("coordinator", "box"): (), ("worker", "left"): ()}
    world.host("impostor")
    world.run_these(one)
    laptop = world.host("laptop")
    assert_answers(world.swarm.run(laptop, *INFER))  # pins its key
    world.run_these(one | {("coordinator", "impostor"): ()})
    ours, theirs = (fingerprint_of(world.swarm.coordinators[name]) for name in ("box", "impostor"))
    assert world.swarm.status(laptop)["fingerprint"] == ours
    world.run_these({("coordinator", "impostor"): ()})
    ended = world.swarm.run(laptop, *INFER)
    assert ended.code == 4, ended
    assert "another key is pinned" in ended.errors
    assert theirs in ended.errors
    assert ours not in ended.errors
    assert world.swarm.status(laptop, "--swarm", theirs)["fingerprint"] == theirs, "asked for by its key it is entered"


def test_three_commands_without_options_find_each_other_on_a_machine_without_network(world: World) -> None:
    lone = world.host("lone", world.network.lone_host)
    world.run_these({("coordinator", "lone"): (), ("worker", "lone"): ()})
    assert_answers(world.swarm.run(lone, *INFER))


# -- reaching each other


def assert_relayed(world: World, *pair: str) -> None:
    """Status shows this pair of hosts, or none, as reached through the coordinator."""
    (replica,) = world.swarm.status(world.host("box"))["replicas"]
    found = {frozenset(map(world.swarm.host_of, ends)) for ends in replica["relayed"]}
    assert found == ({frozenset(pair)} if pair else set())


def assert_answers_alike(world: World, text: str | None = None) -> None:
    """The answer is that of every other layout and way."""
    text = assert_answers(world.swarm.run(world.host("laptop"), *INFER)) if text is None else text
    world.text = world.text or text
    assert text == world.text


LAYOUTS = pytest.mark.parametrize("layout", ["2x1", pytest.param("1x2", marks=pytest.mark.long)])


@LAYOUTS
def test_workers_of_one_lan_are_linked_directly(world: World, layout: str) -> None:
    world.serve(layout, {"left": (), "right": ()})
    assert_relayed(world)
    assert_answers_alike(world)


# -- links that break


def struck(world: World, strike: Callable[[], None]) -> Ended:
    """An answer in whose middle something happens: a worker stands still from before it until after it."""
    worker = world.swarm.workers["left"]
    asked = world.swarm.ask(world.host("laptop"), *INFER)
    before = asked.wait_for(10)
    worker.pause()
    try:
        strike()
    finally:
        worker.resume()
    ended = asked.end(120)
    assert len(ended.output) > len(before) + 10, "it was struck in the middle"
    return ended


@LAYOUTS
def test_an_answer_goes_on_through_the_coordinator_when_two_workers_lose_each_other(world: World, layout: str) -> None:
    coordinator = world.serve(layout, {"left": (), "right": ()})
    left, right = world.host("left"), world.host("right")
    assert_answers_alike(world)
    seen = len(coordinator.lines)
    try:
        asked_at = time.monotonic()
        ended = struck(world, lambda: left.part(right))
        assert time.monotonic() - asked_at < 12, "their connections died in 4 s, direct ways were tried for 2 s"
        coordinator.wait_for("replica broken", 1, seen)
        assert not [line for line in coordinator.lines[seen:] if "worker lost" in line], "both were there all the time"
        assert_answers_alike(world, ended.output)
        assert_relayed(world, "left", "right")
    finally:
        left.rejoin(right)


@pytest.mark.parametrize("loss", ["cut", pytest.param("unplug", marks=pytest.mark.long)])
def test_a_host_that_loses_its_network_is_replaced_and_comes_back_by_itself(world: World, loss: str) -> None:
    coordinator = world.serve("2x1", {"left": (), "right": ()})
    right = world.host("right")
    assert_answers_alike(world)
    seen = len(coordinator.lines)
    try:
        ended = struck(world, right.cut if loss == "cut" else right.unplug)
        coordinator.wait_for("worker lost", 1, seen)
        assert_answers_alike(world, ended.output)
        seen = len(coordinator.lines)
    finally:
        right.mend() if loss == "cut" else right.plug()
    coordinator.wait_for("replica serves .*layout=2x1", 60, seen)
    assert_answers_alike(world)


# -- slow links


@pytest.fixture
def slow_right(world: World) -> Iterator[World]:
    """20 Mbit/s to and from this host; the coordinator of before is gone, with what it knew of links."""
    world.run_these({role: arguments for role, arguments in world.roles.items() if role[0] == "worker"})
    world.host("right").limit(2_500_000)
    yield world
    world.host("right").unlimit()


def test_slow_links_are_measured_and_serve_where_there_are_no_others(slow_right: World) -> None:
    slow_right.serve("2x1", {"left": (), "right": ()})
    facts = slow_right.swarm.status(slow_right.host("box"))
    assert all(worker["link_ms"] > 0.1 for worker in facts["workers"])
    assert_answers_alike(slow_right)


@pytest.mark.long
def test_a_near_worker_that_joins_takes_the_place_of_a_far_one(slow_right: World) -> None:
    coordinator = slow_right.serve("2x1", {"left": (), "right": ()})
    seen = len(coordinator.lines)
    slow_right.swarm.start_worker(slow_right.host("tower"))
    slow_right.roles["worker", "tower"] = ()
    coordinator.wait_for("worker joined", 60, seen)
    coordinator.wait_for("replica serves .*layout=2x1", 15, seen)
    assert slow_right.swarm.serving(slow_right.swarm.status(slow_right.host("box"))) == [{"left", "tower"}]
    assert_answers_alike(slow_right)


# -- behind routers


def hide(world: World, *names: str) -> None:
    """Make hosts behind routers of their own."""
    if reason(nat=True):
        pytest.skip(f"{reason(nat=True)}")
    for name in names:
        world.host(name, world.network.host_behind_nat)


@LAYOUTS
def test_a_worker_behind_nat_is_linked_directly_with_one_that_it_can_reach(world: World, layout: str) -> None:
    hide(world, "cellar")
    world.serve(layout, {"left": (), "cellar": world.by_hand})
    assert_relayed(world)
    assert_answers_alike(world)


@LAYOUTS
def test_workers_behind_two_nats_are_relayed(world: World, layout: str) -> None:
    hide(world, "cellar", "attic")
    world.serve(layout, {"attic": world.by_hand, "cellar": world.by_hand})
    assert_relayed(world, "attic", "cellar")
    assert_answers_alike(world)


def test_without_mdns_the_coordinator_is_named_by_hand(world: World) -> None:
    make = world.network.host if reason(nat=True) else world.network.host_behind_nat
    world.host("cellar", make)
    world.run_these({("coordinator", "box"): ("--no-mdns",), ("worker", "cellar"): world.by_hand})
    assert world.swarm.run(world.host("laptop"), "status").code == 4
    assert_answers(world.swarm.run(world.host("laptop"), *INFER, *world.by_hand))
