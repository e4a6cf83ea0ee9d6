"""The swarm client: finds the coordinator, asks, streams answers, and goes on when the coordinator comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from skynet import errors
from skynet.client.answered import as_error, body_of
from skynet.errors import RequestFailed, SkyNetError
from skynet.protocol.control import ControlLink, LinkLost
from skynet.protocol.entrance import EntranceConfig, enter
from skynet.protocol.identity import PublicKey
from skynet.protocol.ids import RequestId
from skynet.protocol.messages import (
    TO_CLIENT,
    AdminMessage,
    Answer,
    Cancel,
    ChatMessage,
    Evicted,
    Failed,
    Finished,
    GetProfiles,
    GetStatus,
    Notice,
    Pong,
    Submit,
    ToClient,
    Tokens,
)
from skynet.protocol.roles import Role
from skynet.protocol.steps import Penalties, SamplingParams, TokenLogprobs

logger = logging.getLogger(__name__)

ANSWER_S: Final = 10.0  # a question is answered within this
MAX_BACKLOG: Final = 100_000  # messages of one answer that its reader hasn't taken yet


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the swarm is and who we are."""

    coordinator: str | None = None  # HOST or HOST:PORT; None: found on the local network
    swarm: str | None = None
    invite: str | None = None
    config_dir: Path
    find_s: float = 5.0  # how long to look for a coordinator the first time
    return_s: float = 60.0  # how long to wait for one that went away


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What to complete and how. Either a prompt, or messages of a conversation."""

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    timeout_s: float = 300.0
    model: str | None = None  # refuse to run on another one
    index: int = 0  # which of several answers to one prompt and seed
    min_p: float = 0.0  # keep tokens at least so likely, the likeliest being 1
    repetition_penalty: float = 1.0  # of tokens in prompt and answer
    presence_penalty: float = 0.0  # of tokens in the answer
    frequency_penalty: float = 0.0  # of the same, for each time
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token id -> what is added to its logit
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # tell each token's, and those of so many of the likeliest; None: don't

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt or "", *(message.content for message in self.messages))
        _check_text("stop", *self.stop)
        _check_text("model", self.model or "")
        self.submit(RequestId("unsent"), ())

    def submit(self, request_id: RequestId, received: tuple[int, ...]) -> Submit:
        """The message. Raises ConfigError naming the value that is out of range."""
        try:
            return Submit(
                request_id=request_id,
                prompt=self.prompt,
                messages=self.messages,
                max_tokens=self.max_tokens,
                sampling=self._sampling(),
                stop=self.stop,
                ignore_eos=self.ignore_eos,
                timeout_s=self.timeout_s,
                received=received,
                model=self.model,
                stop_token_ids=self.stop_token_ids,
            )
        except ValueError as exc:
            raise errors.ConfigError(str(exc)) from exc

    def _sampling(self) -> SamplingParams:
        penalties = Penalties(
            repetition=self.repetition_penalty, presence=self.presence_penalty, frequency=self.frequency_penalty
        )
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            index=self.index,
            min_p=self.min_p,
            logprobs=self.logprobs,
            penalties=None if penalties == Penalties() else penalties,
            logit_bias=tuple(self.logit_bias.items()),
        )


def _check_text(what: str, *texts: str) -> None:
    """Raises ConfigError for bytes of another encoding, which a terminal's arguments may bring as lone surrogates."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise errors.ConfigError(f"{what}: character {exc.start} isn't UTF-8 text; give it as text") from exc


@dataclass(frozen=True, slots=True)
class Event:
    """Something new in an answer: text (perhaps empty) of new tokens, or a notice why it pauses."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    notice: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of the new tokens, if asked for


@dataclass(slots=True)
class CompletionStream:
    """An answer as it comes: iterate over its events. Leaving the iteration early cancels the request."""

    swarm: Swarm
    completion: Completion
    request_id: RequestId
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each token, if asked for
    token_times: list[float] = field(default_factory=list)  # when each token came, in seconds from the start
    _tail_sent: bool = False
    _asked_again_at: int | None = None  # how many tokens there were when a gap made us ask for the rest

    async def __aiter__(self) -> AsyncIterator[Event]:
        started = time.perf_counter()
        is_over = False  # for the coordinator too: there is nothing to cancel
        try:
            # Closed before anything is cancelled: both listen under the same request id.
            async with contextlib.aclosing(self.swarm.stream(self.request_id, self._submit)) as messages:
                async for message in messages:
                    match message:
                        case Tokens():
                            fresh = self._fresh(message)
                            if fresh is not None:
                                self.token_times += [time.perf_counter() - started] * len(fresh.token_ids)
                                yield fresh
                            elif message.position > len(self.token_ids):
                                await self._mend_gap()
                        case Notice():
                            yield Event(notice=message.text)
                        case Finished(completion_tokens=count) if count > len(self.token_ids):
                            await self._mend_gap()
                        case Finished():
                            self.finished, is_over = message, True
                            return
        except SkyNetError:
            is_over = True
            raise
        finally:
            if not is_over:
                await self.swarm.cancel(self.request_id)

    async def _mend_gap(self) -> None:
        """Tokens are missing: ask for what follows those that are there, once for each gap."""
        if self._asked_again_at != len(self.token_ids):
            self._asked_again_at = len(self.token_ids)
            logger.info("tokens missing, asking again request=%s received=%d", self.request_id, len(self.token_ids))
            await self.swarm.submit(self._submit())

    def _submit(self) -> Submit:
        return self.completion.submit(self.request_id, tuple(self.token_ids))

    def _fresh(self, message: Tokens) -> Event | None:
        """What of a message is new: after a reconnect some may come twice, and some be missing before it."""
        if message.position != len(self.token_ids):
            return None
        if not message.token_ids:
            if self._tail_sent:
                return None
            self._tail_sent = True
        self.token_ids += message.token_ids
        self.text += message.text
        self.logprobs += message.logprobs
        return Event(message.text, message.token_ids, logprobs=message.logprobs)

    def figures(self) -> dict[str, Any]:
        """Text, ids and speed, for people and scripts."""
        times = self.token_times
        decoding_s = times[-1] - times[0] if len(times) > 1 else 0.0
        told = [
            {"logprob": one.logprob, "top": list(zip(one.top_ids, one.top_logprobs, strict=True))}
            for one in self.logprobs
        ]
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finished.reason if self.finished else None,
            "prompt_tokens": self.finished.prompt_tokens if self.finished else None,
            "completion_tokens": len(self.token_ids),
            "first_token_s": times[0] if times else 0.0,
            "tokens_per_s": (len(times) - 1) / decoding_s if decoding_s > 0 else 0.0,
            "longest_gap_s": max((b - a for a, b in itertools.pairwise(times)), default=0.0),
            **({"logprobs": told} if self.completion.logprobs is not None else {}),
        }


class Swarm:
    """A client of one swarm. Use it as an asynchronous context manager."""

    def __init__(self, config: ClientConfig, role: Role = Role.CLIENT) -> None:
        self._config = config
        self._role = role
        self._suffix = f"c-{uuid.uuid4().hex[:12]}"
        self._link: ControlLink[ToClient] | None = None
        self._connected = asyncio.Event()
        self._inboxes: dict[RequestId, asyncio.Queue[ToClient | LinkLost]] = {}
        self._task: asyncio.Task[None] | None = None
        self._failure: SkyNetError | None = None
        self._swarm_key: PublicKey | None = None  # of the swarm we were in: we come back to no other

    async def __aenter__(self) -> Self:
        await self._connect(self._config.find_s)
        self._task = asyncio.create_task(self._run(), name="swarm-client")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._link is not None:
            await self._link.close()

    # -- asking

    def complete(self, completion: Completion) -> CompletionStream:
        """Start a completion; iterate over what is returned."""
        return CompletionStream(self, completion, RequestId(uuid.uuid4().hex))

    async def status(self, newer_than: int = -1) -> dict[str, Any]:
        """Workers, what they hold, speed, requests; waits a few seconds for a revision newer than the one given."""
        return await self._ask(GetStatus(request_id=RequestId(uuid.uuid4().hex), newer_than=newer_than))

    async def profiles(self) -> dict[str, Any]:
        """Workers and links as measured."""
        return await self._ask(GetProfiles(request_id=RequestId(uuid.uuid4().hex)))

    async def command(self, message: AdminMessage) -> dict[str, Any]:
        """Change the swarm; needs the admin role."""
        return await self._ask(message)

    async def cancel(self, request_id: RequestId) -> None:
        """Have the coordinator stop a request; returns when it has, or after a second."""
        if self._link is None or not self._connected.is_set():
            return
        inbox = self._open(request_id)
        self._link.send(Cancel(request_id=request_id))
        try:
            async with asyncio.timeout(1.0):
                while not isinstance(await inbox.get(), Finished | Failed | LinkLost):
                    pass
        except TimeoutError:
            logger.debug("cancel not confirmed request=%s", request_id)
        finally:
            self._close(request_id, inbox)

    async def _ask(self, message: GetStatus | GetProfiles | AdminMessage) -> dict[str, Any]:
        inbox = self._open(message.request_id)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._connected.wait()
                self._check()
                assert self._link is not None
                self._link.send(message)
                while True:
                    answer = await inbox.get()
                    match answer:
                        case Answer():
                            return body_of(answer)
                        case Failed():
                            raise as_error(answer)
                        case LinkLost():
                            self._check()
                            raise errors.WorkerLost("the coordinator went away before it answered; try again")
        except TimeoutError as exc:
            raise errors.WorkerTimeout(f"the coordinator didn't answer within {ANSWER_S:.0f} s") from exc
        finally:
            self._close(message.request_id, inbox)

    async def stream(
        self, request_id: RequestId, submit: Callable[[], Submit]
    ) -> AsyncGenerator[Tokens | Notice | Finished, None]:
        """Messages of one request; after a loss of the coordinator it is submitted again with what was received.

        `submit` makes the request of what was received by then. The caller closes this when it has what it wants.
        """
        inbox = self._open(request_id)
        try:
            await self.submit(submit())
            while True:
                message = await inbox.get()
                match message:
                    case Failed():
                        raise as_error(message)
                    case Tokens() | Notice():
                        yield message
                    case Finished():
                        yield message
                    case _Behind():
                        await self.submit(submit())
                    case LinkLost():
                        yield Notice(request_id=request_id, text="the coordinator went away; waiting for it")
                        await self.submit(submit())
        finally:
            self._close(request_id, inbox)

    async def submit(self, message: Submit) -> None:
        """Send a request, or one again to get what follows the ids in it; waits for the coordinator to be there."""
        try:
            async with asyncio.timeout(self._config.return_s):
                await self._connected.wait()
        except TimeoutError as exc:
            raise errors.DiscoveryError(
                f"the coordinator didn't come back within {self._config.return_s:.0f} s"
            ) from exc
        self._check()
        assert self._link is not None
        self._link.send(message)

    def _check(self) -> None:
        """Raises what ended our membership for good, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _open(self, request_id: RequestId) -> asyncio.Queue[ToClient | LinkLost]:
        inbox: asyncio.Queue[ToClient | LinkLost] = asyncio.Queue(MAX_BACKLOG)
        self._inboxes[request_id] = inbox
        return inbox

    def _close(self, request_id: RequestId, inbox: asyncio.Queue[ToClient | LinkLost]) -> None:
        if self._inboxes.get(request_id) is inbox:
            del self._inboxes[request_id]

    # -- the connection

    async def _connect(self, find_s: float) -> None:
        entrance = EntranceConfig(
            coordinator=self._config.coordinator,
            swarm=self._config.swarm,
            swarm_key=self._swarm_key,
            invite=self._config.invite,
            config_dir=self._config.config_dir,
            find_s=find_s,
        )
        ticket = await enter(entrance, self._role, self._suffix)
        self._swarm_key = ticket.swarm_key
        if ticket.is_first_visit and self._config.invite is None:  # a warning, so that commands without a log show it
            logger.warning(
                "first visit, compare with what the coordinator prints: swarm=%s fingerprint=%s",
                ticket.welcome.swarm_name, ticket.fingerprint,
            )  # fmt: skip
        self._link = await ControlLink.open(ticket, TO_CLIENT)
        self._connected.set()

    async def _run(self) -> None:
        """Deliver messages; when the link is lost, connect again for a while. Whoever waits finds how it ended."""
        try:
            await self._stay_connected()
        except Exception as exc:
            logger.exception("the client failed")
            self._failure = RequestFailed(f"the client failed: {exc!r}")
        finally:
            self._failure = self._failure or RequestFailed("the client was closed")
            self._connected.set()
            for inbox in self._inboxes.values():
                _put(inbox, LinkLost("the client ended"))

    async def _stay_connected(self) -> None:
        while self._failure is None:
            assert self._link is not None
            try:
                while True:
                    self._deliver(await self._link.receive())
            except LinkLost as lost:
                self._connected.clear()
                await self._link.close()
                for inbox in self._inboxes.values():
                    _put(inbox, lost)
            if self._failure is None:
                await self._reconnect()

    async def _reconnect(self) -> None:
        """Enter again; what can't be mended by waiting becomes `_failure`."""
        give_up, last = time.monotonic() + self._config.return_s, ""
        while time.monotonic() < give_up:
            try:
                await self._connect(find_s=2.0)
            except errors.AdmissionRefused as exc:
                self._failure = exc
                return
            except (SkyNetError, OSError) as exc:
                last = f": {exc}"
                logger.debug("coordinator not back yet reason=%s", exc)
                await asyncio.sleep(0.2)
            else:
                return
        self._failure = errors.DiscoveryError(
            f"the coordinator didn't come back within {self._config.return_s:.0f} s{last}"
        )

    def _deliver(self, message: ToClient) -> None:
        match message:
            case Pong():
                pass
            case Evicted():
                if message.is_final:
                    self._failure = errors.AdmissionRefused(f"the coordinator cut us off: {message.reason}")
                raise LinkLost(message.reason)
            case _:
                inbox = self._inboxes.get(message.request_id)
                if inbox is not None:
                    _put(inbox, _Behind() if inbox.full() else message)


class _Behind(LinkLost):
    """So much came that wasn't read that it was thrown away: ask again for what follows the last that was read."""


def _put(inbox: asyncio.Queue[ToClient | LinkLost], item: ToClient | LinkLost) -> None:
    """What must be read now; a full backlog gives way to it."""
    if inbox.full():
        while not inbox.empty():
            inbox.get_nowait()
    inbox.put_nowait(item)
