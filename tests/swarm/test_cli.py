"""What a user types, what is printed where, and what the command ends with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from skynet.client.swarm import Completion, Swarm
from skynet.testing.local_swarm import LocalSwarm

from .conftest import Oracle, User, end, skynet_environment

PROMPT = "Once upon a time"
EXAMPLE_FILE = Path(__file__).parents[2] / "docs" / "examples" / "workers.yaml"
COMMANDS = (
    "coordinator", "worker", "demo", "infer", "chat", "status", "plan", "nodes", "approve", "revoke", "drain",
    "invite", "invite create", "invite list", "invite revoke", "",
)  # fmt: skip
HEAVY = {"torch", "transformers", "zmq", "sqlalchemy", "numpy", "cryptography", "zeroconf", "uvloop"}
FIGURES = r"\d+ tokens, \d+\.\d tokens/s, first token after \d+\.\d\d s \(\w+\)"


def complaints(errors: str) -> str:
    """What a command said on stderr, beside the fingerprint of a swarm that it sees for the first time."""
    return "".join(line for line in errors.splitlines(keepends=True) if not line.startswith("first visit")).strip()


@pytest.fixture
def nobody(tmp_path: Path) -> User:
    """A user who has no coordinator, and no other setting."""
    return User(skynet_environment(tmp_path))


# -- infer


def test_infer_prints_the_answer_on_stdout_and_figures_on_stderr(swarm: LocalSwarm, user: User) -> None:
    expected = swarm.complete(Completion(prompt=PROMPT, max_tokens=12)).text
    done = user.run("infer", PROMPT, "--max-tokens", "12")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert re.fullmatch(FIGURES, complaints(done.stderr))


def test_infer_as_json_reads_the_prompt_from_stdin(swarm: LocalSwarm, user: User, embedded_oracle: Oracle) -> None:
    done = user.run("infer", "-", "--max-tokens", "8", "--json", stdin=PROMPT)
    answer = json.loads(done.stdout)
    assert answer["token_ids"] == embedded_oracle.answer_ids(embedded_oracle.encode(PROMPT), 8)
    assert answer["text"] == embedded_oracle.decode(answer["token_ids"])
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", 8)
    assert answer["prompt_tokens"] == len(embedded_oracle.encode(PROMPT))
    assert answer["tokens_per_s"] > 0
    assert answer["first_token_s"] > 0


def test_infer_streams_while_the_answer_grows(user: User) -> None:
    process = user.start("infer", PROMPT, "--max-tokens", "300", "--temperature", "1")
    assert process.stdout is not None
    try:
        assert process.stdout.read(5)
        assert process.poll() is None, "the first text came only with the last"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def test_a_terminated_command_cancels_its_answer(swarm: LocalSwarm, user: User) -> None:
    process = user.start("infer", PROMPT, "--max-tokens", "1500", "--temperature", "1")
    assert process.stdout is not None
    try:
        assert process.stdout.read(5)
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, complaints(errors)) == (143, "")
        swarm.run(nothing_is_in_progress, timeout_s=4)  # who merely vanishes is waited for, 15 s
    finally:
        end(process)


async def nothing_is_in_progress(client: Swarm) -> None:
    facts = await client.status()
    while facts["num_requests"]:
        facts = await client.status(newer_than=facts["revision"])


def test_sampled_answers_follow_their_seed(user: User) -> None:
    def answer(seed: str) -> str:
        options = ("--temperature", "0.9", "--top-p", "0.95", "--top-k", "40", "--max-tokens", "16", "--seed", seed)
        return user.run("infer", PROMPT, *options).stdout

    assert answer("7") == answer("7") != answer("8")


def test_a_stop_string_ends_the_answer_and_never_shows(swarm: LocalSwarm, user: User) -> None:
    whole = swarm.complete(Completion(prompt=PROMPT, max_tokens=40, ignore_eos=True)).text
    stop = whole.split()[6][-2:] + " " + whole.split()[7][:2]  # across two words, so across tokens
    done = user.run("infer", PROMPT, "--max-tokens", "40", "--stop", stop, "--stop", "never said")
    assert done.stdout == whole[: whole.index(stop)] + "\n"
    assert "(stop)" in done.stderr


def test_no_part_of_a_stop_string_is_streamed(swarm: LocalSwarm) -> None:
    whole = swarm.complete(Completion(prompt=PROMPT, max_tokens=40, ignore_eos=True)).text
    for stop in (whole[20:33], whole[5:6], whole[31:34]):
        pieces: list[str] = []
        stream = swarm.complete(
            Completion(prompt=PROMPT, max_tokens=40, ignore_eos=True, stop=(stop,)),
            lambda _, event, pieces=pieces: pieces.append(event.text),  # type: ignore[misc]
        )
        assert "".join(pieces) == stream.text == whole[: whole.index(stop)]


def test_an_answer_ends_at_the_end_token(swarm: LocalSwarm, embedded_oracle: Oracle) -> None:
    for prompt in (PROMPT, "The old lamp", "The end.", "Who are you?"):
        expected = embedded_oracle.answer_ids(embedded_oracle.encode(prompt), 200, ends_at_eos=True)
        if len(expected) < 200:
            break
    else:
        pytest.fail("the embedded model ends none of these within 200 tokens: take other prompts")
    stream = swarm.complete(Completion(prompt=prompt, max_tokens=200))
    assert stream.token_ids == expected
    assert stream.text == embedded_oracle.decode(expected)
    assert stream.finished is not None
    assert stream.finished.reason == "eos"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--temperature", "-1"), "--temperature"),
        (("--top-p", "1.5"), "--top-p"),
        (("--top-p", "0"), "top_p"),
        (("--top-k", "-1"), "--top-k"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--seed", "-1"), "--seed"),
        (("--timeout", "-1"), "--timeout"),
        (("--stop", ""), "stop"),
        (("--temperature", "nan"), "temperature"),
        (("--stop", "\udcff"), "stop: character 0 isn't UTF-8"),  # a byte that isn't
        (("--model", "\udcff"), "model: character 0 isn't UTF-8"),
        (("--coordinator", "somewhere:port"), "somewhere:port"),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_nothing_is_looked_for(
    nobody: User, options: tuple[str, ...], named: str
) -> None:
    done = nobody.run("infer", PROMPT, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_swarm_cannot_answer_is_refused_with_the_reason(user: User) -> None:
    too_long = user.run("infer", "-", stdin="word " * 4000)
    assert too_long.returncode == 7
    assert re.search(r"the prompt has \d+ tokens, the model takes at most \d+", too_long.stderr)
    other = user.run("infer", PROMPT, "--model", "other")
    assert other.returncode == 2
    assert "this swarm runs embedded, not other" in other.stderr
    empty = user.run("infer", "-", stdin="")
    assert empty.returncode == 2
    assert "the prompt is empty" in empty.stderr


def test_no_coordinator_is_an_error_that_says_what_was_tried(nobody: User) -> None:
    started = time.monotonic()
    away = nobody.run("infer", PROMPT, "--coordinator", "127.0.0.1:9")
    assert away.returncode == 4
    assert "127.0.0.1 port 9: can't be reached" in away.stderr
    nowhere = nobody.run("infer", PROMPT, "--swarm", "a swarm that nobody runs")
    assert nowhere.returncode == 4
    assert "mDNS" in nowhere.stderr
    assert "--coordinator HOST:PORT" in nowhere.stderr
    assert time.monotonic() - started < 30  # it looks for 5 s; the rest is what a busy machine needs to start Python


# -- chat


def test_chat_answers_turn_by_turn_and_remembers(swarm: LocalSwarm, user: User) -> None:
    done = user.run("chat", "--temperature", "0", "--max-tokens", "12", stdin="Who are you?\nAnd who am I?\n")
    assert done.returncode == 0
    assert len(re.findall(FIGURES, done.stderr)) == 2
    from skynet.protocol.messages import ChatMessage

    turns = [ChatMessage(role="user", content="Who are you?")]
    first = swarm.complete(Completion(messages=tuple(turns), max_tokens=12)).text
    turns += [ChatMessage(role="assistant", content=first), ChatMessage(role="user", content="And who am I?")]
    second = swarm.complete(Completion(messages=tuple(turns), max_tokens=12)).text
    assert done.stdout == f"{first}\n{second}\n"


def test_chat_outlives_the_models_context(user: User) -> None:
    lines = ["the " * 1200, "the " * 1200, "the " * 3000, "Who are you?"]
    done = user.run("chat", "--system", "You tell.", "--temperature", "0", "--max-tokens", "3", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("first token after") == 3
    assert "its oldest turn is left out" in done.stderr
    assert "[not sent: the prompt has" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_chat_that_waits_for_the_user_ends_at_once_when_told_to(user: User, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "skynet.cli", "chat"],
        env=user.environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        while "Type a message" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == code
        assert complaints(process.stderr.read()) == ""
    finally:
        end(process)


def test_a_reader_that_stops_reading_ends_the_command_quietly(user: User) -> None:
    process = user.start("infer", PROMPT, "--max-tokens", "300", "--temperature", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdout.read(1)
        process.stdout.close()  # what `head` does
        assert process.wait(20) == 141
        assert complaints(process.stderr.read()) == ""
    finally:
        process.kill()
        process.stderr.close()


def test_a_prompt_that_is_empty_or_no_text_is_refused(user: User, nobody: User) -> None:
    empty = user.run("infer", "-")
    assert empty.returncode == 2
    assert "the prompt is empty" in empty.stderr
    command = [sys.executable, "-m", "skynet.cli", "infer", "-"]
    binary = subprocess.run(command, env=nobody.environment, input=b"\xff\xfe\x00", capture_output=True, timeout=40)
    assert binary.returncode == 2
    assert binary.stderr.startswith(b"error: stdin: byte 0 isn't UTF-8")


# -- what can't be used


@pytest.mark.parametrize("command", [("infer", PROMPT), ("worker",), ("nodes",)])
def test_a_directory_that_cannot_be_used_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = User(skynet_environment(tmp_path / "file")).run(*command, "--coordinator", "127.0.0.1:9")
    assert done.returncode == 2
    assert f"error: {tmp_path}/file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named_with_the_option(swarm: LocalSwarm, nobody: User) -> None:
    done = nobody.run("coordinator", "--no-mdns", "--bind", "127.0.0.1", "--port", str(swarm.port))
    assert done.returncode == 2
    assert f"port {swarm.port}" in done.stderr
    assert "--port" in done.stderr


# -- demo


def test_a_demo_that_does_not_come_up_says_why(nobody: User) -> None:
    done = nobody.run("demo", "--model", "/nowhere")
    assert done.returncode == 6
    assert re.search(r"^error: .* coordinator: ended with 2 .* error: /nowhere: neither a directory", done.stderr, re.M)
    assert "Traceback" not in done.stderr


def test_a_demo_refuses_wrong_values_before_it_starts_anything(nobody: User) -> None:
    done = nobody.run("demo", "--max-tokens", "0")
    assert done.returncode == 2
    assert "--max-tokens" in done.stderr
    assert "starting" not in done.stderr


# -- status


def test_status_shows_every_column(swarm: LocalSwarm, user: User) -> None:
    facts = json.loads(user.run("status", "--json").stdout)
    assert len(facts["workers"]) == swarm.num_workers
    serving = [worker for worker in facts["workers"] if worker["state"] == "serving"]
    assert len(serving) == 2
    for worker in serving:
        assert worker["device"] == "cpu"
        assert 0 < worker["weight_bytes"] + worker["kv_bytes"] <= worker["memory_bytes"]
        assert worker["memory_used_bytes"] > 0
        assert worker["layers"] == "0-5"
        assert re.fullmatch(r"rank [12]/2, \d heads", worker["share"])
        assert worker["tokens_per_s"] >= 0
        assert worker["loading"] is None
    assert any(worker["link_ms"] for worker in facts["workers"])  # those that a plan was interested in
    table = user.run("status").stdout
    for column in ("worker", "device", "memory", "layers", "share", "link", "tokens/s", "state"):
        assert column in table
    assert "2x1 (serving)" in table
    assert "requests: 0 in progress, 0 waiting" in table


def test_workers_of_one_machine_together_lend_no_more_than_it_has(swarm: LocalSwarm, user: User) -> None:
    workers = json.loads(user.run("status", "--json").stdout)["workers"]
    assert swarm.config.memory is None, "none was started with --memory"
    assert 0 < sum(worker["memory_bytes"] for worker in workers) < psutil.virtual_memory().total
    assert len({worker["memory_bytes"] for worker in workers}) == 1


def test_watching_ends_at_an_interrupt(user: User) -> None:
    process = user.start("status", "--watch")
    assert process.stdout is not None
    try:
        for _ in range(2):
            while "requests:" not in process.stdout.readline():
                assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        end(process)
    assert (process.returncode, complaints(errors)) == (130, "")


# -- plan


def test_plan_describes_a_layout_without_a_swarm(nobody: User) -> None:
    arguments = ("plan", "--model", "embedded", "--workers", str(EXAMPLE_FILE), "--layout", "2x2")
    text = nobody.run(*arguments)
    assert text.returncode == 0
    assert "layout 2x2" in text.stdout
    made = json.loads(nobody.run(*arguments, "--json").stdout)
    ranks = [rank for stage in made["replicas"][0]["stages"] for rank in stage["ranks"]]
    assert len(ranks) == 4
    assert all(rank["weight_bytes"] > 0 for rank in ranks)
    assert made["replicas"][0]["prefill_tokens_per_s"] > 0
    assert made["replicas"][0]["decode_tokens_per_s"] > 0


def test_plan_takes_the_running_swarms_workers(swarm: LocalSwarm, user: User) -> None:
    made = json.loads(user.run("plan", "--layout", "3x2", "--json").stdout)
    named = {rank["worker"] for stage in made["replicas"][0]["stages"] for rank in stage["ranks"]}
    assert named == {worker["id"] for worker in swarm.status()["workers"]}


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (("--objective", "fame"), 2, "--objective fame"),
        (("--layout", "2y3"), 2, "layout '2y3'"),
        (("--model", "/nowhere"), 2, "/nowhere"),
        (("--dtype", "int3"), 2, "--dtype int3"),
    ],
)
def test_plan_refuses_what_it_cannot_read(nobody: User, options: tuple[str, ...], code: int, named: str) -> None:
    done = nobody.run("plan", "--workers", str(EXAMPLE_FILE), *options)
    assert done.returncode == code
    assert named in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--memory", "8GiX"), "'8GiX' isn't a size"), (("--gpu", "0", "--device", "cpu"), "--gpu and --device")],
)
def test_a_worker_s_wrong_option_is_named(nobody: User, options: tuple[str, ...], named: str) -> None:
    done = nobody.run("worker", *options)
    assert done.returncode == 2
    assert options[0] in done.stderr
    assert named in done.stderr


# -- administration, through the coordinator's Unix socket


def test_invites_are_made_shown_and_revoked(owner: User) -> None:
    made = json.loads(owner.run("invite", "create", "--uses", "3", "--hours", "48", "--json").stdout)
    assert made["invite"].startswith("skynet-invite-")
    assert re.search(rf"{made['invite_id']}  worker  used 0/3  open", owner.run("invite", "list").stdout)
    assert owner.run("invite", "revoke", made["invite_id"]).returncode == 0
    assert re.search(rf"{made['invite_id']}  worker  used 0/3  closed", owner.run("invite", "list").stdout)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("invite", "create", "--role", "boss"), "--role"),
        (("invite", "create", "--uses", "0"), "--uses"),
        (("invite", "create", "--grant", "everything"), "--grant"),
        (("invite", "revoke", "nosuch"), "invite 'nosuch'"),
        (("approve", "nosuch"), "node 'nosuch'"),
        (("revoke", "nosuch"), "node 'nosuch'"),
        (("drain", "nosuch"), "drain nosuch"),
    ],
)
def test_an_admin_command_names_what_it_does_not_know(owner: User, arguments: tuple[str, ...], named: str) -> None:
    done = owner.run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr


def test_nodes_are_listed_for_the_owner_alone(user: User, owner: User) -> None:
    assert re.search(r"^\w{26}  .*worker", owner.run("nodes").stdout, re.MULTILINE)
    refused = user.run("nodes")
    assert refused.returncode == 5
    assert "an admin needs an invite with that role" in refused.stderr


def test_a_drained_worker_leaves_and_its_work_goes_on(swarm: LocalSwarm, owner: User) -> None:
    worker_id = swarm.status()["replicas"][0]["stages"][0]["workers"][1]
    name = worker_id.partition(".")[2]
    before = swarm.complete(Completion(prompt=PROMPT, max_tokens=24)).token_ids
    done = owner.run("drain", name)
    assert done.returncode == 0
    assert worker_id in done.stdout
    leaver = swarm.workers.pop(name)
    assert leaver.wait(30) == 0
    assert swarm.complete(Completion(prompt=PROMPT, max_tokens=24)).token_ids == before
    swarm.start_worker(name).wait_for("worker ready", 60)  # the others count on six


# -- the command itself


def test_help_of_every_command_has_an_example_and_imports_nothing_heavy(nobody: User) -> None:
    running = {
        command: subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "skynet.cli", *command.split(), "--help"],
            env=nobody.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in COMMANDS
    }
    for command, process in running.items():
        text, imports = process.communicate(timeout=60)
        assert process.returncode == 0
        example = re.search(f"Example: skynet {command}.*", text)
        assert example
        assert all((EXAMPLE_FILE.parents[2] / name).exists() for name in re.findall(r"\S+\.yaml", example[0]))
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in imports.splitlines()}
        assert not imported & HEAVY, command


def test_version_and_completion_are_there(nobody: User) -> None:
    assert re.fullmatch(r"skynet \d+\.\d+\.\d+\n", nobody.run("--version").stdout)
    completion = User(nobody.environment | {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert "complete" in completion.run("--show-completion", "bash").stdout
