"""The whole swarm on several hosts: the real commands, found by mDNS or by hand, behind NAT, over links that break."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest

from skynet.testing import hosts
from skynet.testing.host_swarm import Ended, HostSwarm
from skynet.testing.hosts import Host, Network
from skynet.testing.processes import NodeProcess

pytestmark = pytest.mark.timeout(240)

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
    roles: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)  # (command, host) -> arguments

    def host(self, name: str, make: Callable[[str], Host] | None = None) -> Host:
        """The host of this name, on the switch if not made otherwise."""
        if name not in self.known:
            self.known[name] = (make or self.network.host)(name)
        return self.known[name]

    def run_these(self, wanted: dict[tuple[str, str], tuple[str, ...]]) -> None:
        """Have exactly these commands running, coordinators first: {(command, host): arguments}."""
        running = {("coordinator", h): n for h, n in self.swarm.coordinators.items()}
        running |= {("worker", h): n for h, n in self.swarm.workers.items()}
        for (command, name), node in running.items():
            if wanted.get((command, name)) != self.roles.get((command, name)) or not node.is_running:
                node.kill()
                node.stop()
                nodes = self.swarm.coordinators if command == "coordinator" else self.swarm.workers
                del nodes[name]
                del self.roles[command, name]
        for (command, name), arguments in sorted(wanted.items()):
            if (command, name) not in self.roles:
                start = self.swarm.start_coordinator if command == "coordinator" else self.swarm.start_worker
                start(self.known[name], *arguments)
                self.roles[command, name] = arguments

    def serve(self, layout: str | None, workers: dict[str, tuple[str, ...]], num_serving: int) -> NodeProcess:
        """Have box coordinate these workers, and so many of them serve; returns the coordinator."""
        box = self.host("box")
        arguments = ("--dtype", "float32", *(("--layout", layout) if layout else ()))
        self.run_these({("coordinator", "box"): arguments} | {("worker", n): a for n, a in workers.items()})
        self.swarm.wait_status(
            box,
            (),
            lambda facts: (
                len(facts["workers"]) == len(workers) and sum(map(len, self.swarm.serving(facts))) == num_serving
            ),
        )
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
    for command in (INFER, ("status",), ("worker",)):
        ended = world.swarm.run(world.host("laptop"), *command)
        assert ended.code == 4, ended
        assert "mDNS" in ended.errors
        assert "--coordinator HOST" in ended.errors
        assert "Traceback" not in ended.errors
        if command != ("worker",):  # which measures its device first
            assert ended.seconds < FIND_S + 1 + 2 * start_up.seconds


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
    one = {("coordinator", "box"): (), ("worker", "left"): ()}
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
    one = {("coordinator", "box"): (), ("worker", "left"): ()}
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


def test_without_mdns_the_coordinator_is_named_by_hand(world: World) -> None:
    world.run_these({("coordinator", "box"): ("--no-mdns",), ("worker", "left"): world.by_hand})
    assert world.swarm.run(world.host("laptop"), "status").code == 4
    assert_answers(world.swarm.run(world.host("laptop"), *INFER, *world.by_hand))


def test_three_commands_without_options_find_each_other_on_a_machine_without_network(world: World) -> None:
    lone = world.host("lone", world.network.lone_host)
    world.run_these({("coordinator", "lone"): (), ("worker", "lone"): ()})
    assert_answers(world.swarm.run(lone, *INFER))


# -- reaching each other


def relayed_pairs(world: World) -> set[frozenset[str]]:
    facts = world.swarm.status(world.host("box"))
    return {frozenset(map(world.swarm.host_of, pair)) for replica in facts["replicas"] for pair in replica["relayed"]}


def hide(world: World, *names: str) -> None:
    """Make hosts behind routers of their own."""
    if reason(nat=True):
        pytest.skip(f"{reason(nat=True)}")
    for name in names:
        world.host(name, world.network.host_behind_nat)


@pytest.mark.parametrize("layout", ["2x1", "1x2"])
def test_workers_of_one_lan_are_linked_directly(world: World, layout: str) -> None:
    world.serve(layout, {"left": (), "right": ()}, 2)
    assert relayed_pairs(world) == set()
    assert_answers(world.swarm.run(world.host("laptop"), *INFER))


@pytest.mark.parametrize("layout", ["2x1", "1x2"])
def test_a_worker_behind_nat_is_linked_directly_with_one_that_it_can_reach(world: World, layout: str) -> None:
    hide(world, "cellar")
    world.serve(layout, {"left": (), "cellar": world.by_hand}, 2)
    assert relayed_pairs(world) == set()
    assert_answers(world.swarm.run(world.host("laptop"), *INFER))


@pytest.mark.parametrize("layout", ["2x1", "1x2"])
def test_workers_behind_two_nats_are_relayed(world: World, layout: str) -> None:
    hide(world, "cellar", "attic")
    world.serve(layout, {"attic": world.by_hand, "cellar": world.by_hand}, 2)
    assert relayed_pairs(world) == {frozenset({"attic", "cellar"})}
    assert_answers(world.swarm.run(world.host("laptop"), *INFER))


# -- links that break


def struck(world: World, strike: Callable[[], None]) -> Ended:
    """An answer in whose middle something happens: a worker stands still from before it until after it."""
    replica = next(r for r in world.swarm.status(world.host("box"))["replicas"] if r["phase"] == "serving")
    worker = world.swarm.workers[world.swarm.host_of(replica["stages"][0]["workers"][0])]
    asked = world.swarm.ask(world.host("laptop"), *INFER)
    before = asked.wait_for(10)
    worker.pause()
    try:
        strike()
    finally:
        worker.resume()
    ended = asked.end(120)
    assert len(ended.output) > len(before), "it was struck in the middle"
    return ended


@pytest.mark.parametrize("layout", ["2x1", "1x2"])
def test_an_answer_goes_on_when_the_link_between_two_workers_is_cut(world: World, layout: str) -> None:
    world.serve(layout, {"left": (), "right": ()}, 2)
    left, right = world.host("left"), world.host("right")
    undisturbed = assert_answers(world.swarm.run(world.host("laptop"), *INFER))
    try:
        ended = struck(world, lambda: left.part(right))
        assert ended.output == undisturbed
        assert relayed_pairs(world) in ({frozenset({"left", "right"})}, set())
    finally:
        left.rejoin(right)


@pytest.mark.parametrize("loss", ["cut", "unplug"])
def test_a_host_that_loses_its_network_is_replaced_and_comes_back_by_itself(world: World, loss: str) -> None:
    coordinator = world.serve("2x1", {"left": (), "right": ()}, 2)
    right = world.host("right")
    undisturbed = assert_answers(world.swarm.run(world.host("laptop"), *INFER))
    seen = len(coordinator.lines)
    try:
        ended = struck(world, right.cut if loss == "cut" else right.unplug)
        assert ended.output == undisturbed
        coordinator.wait_for("worker lost", 1, seen)
        seen = len(coordinator.lines)
    finally:
        right.mend() if loss == "cut" else right.plug()
    coordinator.wait_for("replica serves .*layout=2x1", 60, seen)
    assert assert_answers(world.swarm.run(world.host("laptop"), *INFER)) == undisturbed


# -- slow links


def test_measured_links_decide_who_shares_a_layer(world: World) -> None:
    world.run_these({})
    world.host("tower")
    world.host("right").limit(2_500_000)
    try:
        world.serve("2x1", {"left": (), "right": ()}, 2)
        facts = world.swarm.status(world.host("box"))
        assert all(worker["link_ms"] is not None for worker in facts["workers"])
        assert_answers(world.swarm.run(world.host("laptop"), *INFER))
        coordinator = world.swarm.coordinators["box"]
        seen = len(coordinator.lines)
        world.swarm.start_worker(world.host("tower"))
        world.roles["worker", "tower"] = ()
        coordinator.wait_for("replica serves", 60, seen)
        assert world.swarm.serving(world.swarm.status(world.host("box"))) == [{"left", "tower"}]
    finally:
        world.host("right").unlimit()
