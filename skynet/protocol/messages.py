"""Every message between coordinator, workers and clients, in the voice of its sender.

Steps are in `steps.py`, admission in `hello.py`, bulk transfers in `bulk.py`. Who sent a message is what its
authenticated key says, never a field. docs/protocol.md describes the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from skynet.protocol.ids import PeerId, RequestId
from skynet.protocol.plan import Epoch, StageAssignment
from skynet.protocol.profile import LinkProfile, WorkerProfile
from skynet.protocol.steps import MAX_ID, RunStep, SamplingParams, StepDone, StepFailed, TokenLogprobs

MAX_TEXT_CHARS: Final = 1 << 19  # of one prompt
MAX_NAME_CHARS: Final = 256


def check_size(what: str, value: str | bytes, limit: int) -> None:
    """Bound a text or byte field that a peer filled. Raises ValueError, which decoding turns into a ProtocolError."""
    if len(value) > limit:
        raise ValueError(f"{what} has {len(value)} characters, at most {limit} are allowed")


# -- worker -> coordinator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One way to reach a process."""

    host: str
    port: int

    def __post_init__(self) -> None:
        check_size("host", self.host, MAX_NAME_CHARS)
        if not 0 < self.port < 65536:
            raise ValueError(f"port must lie in [1, 65535], got {self.port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShard:
    """A shard that a worker served last and still has in memory, so that a new coordinator needn't move it."""

    epoch: Epoch  # of the coordinator that gave it: shards of one replica have the same
    digest: str  # of the model's manifest
    assignment: StageAssignment

    def __post_init__(self) -> None:
        check_size("digest", self.digest, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Worker -> coordinator, first on its control link: "this is what I am, and where peers reach me"."""

    kind: ClassVar[str] = "join"
    profile: WorkerProfile
    hosts: tuple[str, ...]  # this machine's addresses, most useful first
    data_port: int
    bulk_port: int
    pid: int
    held: HeldShard | None = None  # by a worker that comes back

    def __post_init__(self) -> None:
        if not 0 < len(self.hosts) <= 16:
            raise ValueError(f"{len(self.hosts)} addresses, 1 to 16 are allowed")
        for host in self.hosts:
            check_size("host", host, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Worker -> coordinator, every lease_s / 4: "I am alive"."""

    kind: ClassVar[str] = "heartbeat"
    memory_used_bytes: int  # resident memory of the process
    steps_done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """Worker -> coordinator while it loads a shard: how far it is and where the bytes come from."""

    kind: ClassVar[str] = "load_progress"
    epoch: Epoch
    bytes_done: int
    bytes_total: int
    bytes_by_source: dict[str, int]  # cache, local, hub, swarm


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Worker -> coordinator: the shard of this epoch is in memory."""

    kind: ClassVar[str] = "prepared"
    epoch: Epoch
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareFailed:
    """Worker -> coordinator: it can't hold this epoch's shard, and stays in the swarm without it."""

    kind: ClassVar[str] = "prepare_failed"
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """Worker -> coordinator: links to every peer of this epoch are open (`relayed`: through the coordinator)."""

    kind: ClassVar[str] = "linked"
    epoch: Epoch
    relayed: tuple[PeerId, ...] = ()
    unreachable: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """Worker -> coordinator: "move my work elsewhere, then let me go"."""

    kind: ClassVar[str] = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Worker -> coordinator: what it measured on links to peers it was asked to probe."""

    kind: ClassVar[str] = "probe_report"
    links: tuple[LinkProfile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadChunk:
    """Worker -> coordinator: this peer sent bytes that don't match their hash."""

    kind: ClassVar[str] = "bad_chunk"
    peer: PeerId
    chunk: str


# -- coordinator -> worker --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A process of the swarm that this one may talk to directly."""

    peer_id: PeerId
    curve_key: bytes  # 40 bytes, Z85
    hosts: tuple[str, ...]
    data_port: int  # 0: none
    bulk_port: int

    def __post_init__(self) -> None:
        if len(self.curve_key) != 40:
            raise ValueError(f"a CURVE key has 40 characters, got {len(self.curve_key)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Coordinator -> worker: "you are a member; tell me you live every lease_s / 4"."""

    kind: ClassVar[str] = "joined"
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model: its manifest (fetched in bulk from the coordinator by digest) and where a copy may lie."""

    name: str  # what the owner called it: a directory or a hub id
    revision: str  # commit of a hub id; "" for a directory
    digest: str  # of the manifest, SHA-256 in hex
    manifest_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Coordinator -> worker: "load this shard beside what you serve, and let these peers in"."""

    kind: ClassVar[str] = "prepare"
    epoch: Epoch
    model: ModelRef
    assignment: StageAssignment
    peers: tuple[PeerInfo, ...]  # of its stages: to link with
    sources: tuple[PeerInfo, ...]  # who may hold chunks: to fetch from


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Coordinator -> worker: everyone is prepared, open your links."""

    kind: ClassVar[str] = "link"
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Coordinator -> worker: leave every step of this epoch at once."""

    kind: ClassVar[str] = "abort"
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Coordinator -> worker: free what this epoch holds."""

    kind: ClassVar[str] = "discard"
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Coordinator -> worker: link with these peers; the side that `measures` reports round trip and bandwidth."""

    kind: ClassVar[str] = "probe"
    peers: tuple[PeerInfo, ...]
    measures: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareChunks:
    """Coordinator -> worker: these load what you may hold chunks of; let them fetch from you."""

    kind: ClassVar[str] = "share_chunks"
    peers: tuple[PeerInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutOut:
    """Coordinator -> worker: these processes were revoked; cut their connections and let them in no more."""

    kind: ClassVar[str] = "shut_out"
    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Coordinator -> worker, answer to Leaving: nothing depends on you any more."""

    kind: ClassVar[str] = "released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted:
    """Coordinator -> node: you are no longer a member (`reason`); `is_final`: don't come back."""

    kind: ClassVar[str] = "evicted"
    reason: str
    is_final: bool = False


# -- client -> coordinator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str

    def __post_init__(self) -> None:
        check_size("message", self.content, MAX_TEXT_CHARS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Client -> coordinator: "complete this". The same id again, with what was received, resumes it."""

    kind: ClassVar[str] = "submit"
    request_id: RequestId
    prompt: str | None = None  # either a prompt
    messages: tuple[ChatMessage, ...] = ()  # or a conversation, rendered with the model's chat template
    max_tokens: int = 256
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    timeout_s: float = 300.0  # how long it may wait for workers
    received: tuple[int, ...] = ()  # token ids the client already has
    model: str | None = None  # refuse to run on another one
    stop_token_ids: tuple[int, ...] = ()  # the answer ends with the first of them, whose text isn't shown

    def __post_init__(self) -> None:
        check_size("request id", self.request_id, 64)
        if len(self.stop_token_ids) > 64 or any(not 0 <= i < MAX_ID for i in self.stop_token_ids):
            raise ValueError(f"at most 64 stop token ids in [0, {MAX_ID}) are allowed")
        check_size("model", self.model or "", 1024)
        if (self.prompt is None) == (not self.messages):
            raise ValueError("a request has either a prompt or messages")
        check_size("prompt", self.prompt or "", MAX_TEXT_CHARS)
        if sum(len(m.content) for m in self.messages) > MAX_TEXT_CHARS:
            raise ValueError(f"a conversation has at most {MAX_TEXT_CHARS} characters")
        if not 1 <= self.max_tokens <= 1_000_000:
            raise ValueError(f"max_tokens must lie in [1, 1000000], got {self.max_tokens}")
        if len(self.stop) > 16 or any(not 0 < len(s) <= 256 for s in self.stop):
            raise ValueError("at most 16 stop strings of 1 to 256 characters are allowed")
        if not 0 < self.timeout_s <= 86400:
            raise ValueError(f"timeout_s must lie in (0, 86400], got {self.timeout_s}")
        if len(self.received) > 1_000_000:
            raise ValueError("more received tokens than a request may have")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Client -> coordinator: "stop that request, free everything"."""

    kind: ClassVar[str] = "cancel"
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Any node -> coordinator: "are you there?"; also coordinator -> worker."""

    kind: ClassVar[str] = "ping"
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatus:
    """Client -> coordinator: what is there and what it does; answered by one Answer.

    The status carries a revision; the answer waits up to 5 s for a newer one than `newer_than`.
    """

    kind: ClassVar[str] = "get_status"
    request_id: RequestId
    newer_than: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class GetProfiles:
    """Client -> coordinator: the present workers and links as measured, for planning without loading anything."""

    kind: ClassVar[str] = "get_profiles"
    request_id: RequestId


# -- admin -> coordinator; each is answered by one Answer --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateInvite:
    """Admin -> coordinator: "let nodes in with this role"."""

    kind: ClassVar[str] = "create_invite"
    request_id: RequestId
    role: Literal["worker", "client", "admin"] = "worker"
    uses: int = 1
    lifetime_s: float = 86400.0
    grants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.uses <= 100_000 or not 0 < self.lifetime_s <= 10 * 365 * 86400:
            raise ValueError(
                f"an invite has 1 to 100000 uses and lives up to 10 years, got {self.uses}, {self.lifetime_s} s"
            )
        if len(self.grants) > 8:
            raise ValueError("at most 8 grants")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListInvites:
    """Admin -> coordinator: every invite, its uses and its end."""

    kind: ClassVar[str] = "list_invites"
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeInvite:
    """Admin -> coordinator: this invite admits nobody any more."""

    kind: ClassVar[str] = "revoke_invite"
    request_id: RequestId
    invite_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListNodes:
    """Admin -> coordinator: known nodes, and those that wait for approval."""

    kind: ClassVar[str] = "list_nodes"
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Approve:
    """Admin -> coordinator: let this waiting node in."""

    kind: ClassVar[str] = "approve"
    request_id: RequestId
    node: str  # node id, or a unique beginning of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Admin -> coordinator: cut this node off, now and for good."""

    kind: ClassVar[str] = "revoke"
    request_id: RequestId
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Admin -> coordinator: move this worker's work elsewhere and let it exit."""

    kind: ClassVar[str] = "drain"
    request_id: RequestId
    worker: str


# -- coordinator -> client --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Coordinator -> client: the next token ids of an answer and the text they add."""

    kind: ClassVar[str] = "tokens"
    request_id: RequestId
    position: int  # of the first of `token_ids` in the answer
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of `token_ids` if the request wants them


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Coordinator -> client: the answer is complete."""

    kind: ClassVar[str] = "finished"
    request_id: RequestId
    reason: Literal["eos", "stop", "length", "cancelled"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Coordinator -> client: why the answer pauses, in words."""

    kind: ClassVar[str] = "notice"
    request_id: RequestId
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Coordinator -> client: this request or question ends without an answer; `error` names the error class."""

    kind: ClassVar[str] = "failed"
    request_id: RequestId
    error: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Coordinator -> client: what was asked, as JSON text."""

    kind: ClassVar[str] = "answer"
    request_id: RequestId
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """The step that a worker's compute thread is in. Nobody to wait for and long since: it hangs."""

    epoch: Epoch
    step: int
    since_s: float  # without progress: since it last began, or ended, a wait for peers
    waits_for: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Answer to Ping. A worker tells what its compute thread is at."""

    kind: ClassVar[str] = "pong"
    nonce: int
    busy: Busy | None = None


WorkerMessage = (
    Join | Heartbeat | LoadProgress | Prepared | PrepareFailed | Linked | Leaving | ProbeReport | BadChunk | Pong
)
WorkMessage = StepDone | StepFailed | Ping  # a Ping opens the link: only then can work be sent there
ClientMessage = Submit | Cancel | GetStatus | GetProfiles
AdminMessage = CreateInvite | ListInvites | RevokeInvite | ListNodes | Approve | Revoke | Drain
ToCoordinator = WorkerMessage | ClientMessage | AdminMessage | Ping
ToWorker = Joined | Prepare | Link | Abort | Discard | Probe | ShareChunks | ShutOut | Released | Evicted | Ping | Pong
ToClient = Tokens | Finished | Notice | Failed | Answer | Pong | Evicted

TO_COORDINATOR: Final[tuple[type[ToCoordinator], ...]] = (
    Join, Heartbeat, LoadProgress, Prepared, PrepareFailed, Linked, Leaving, ProbeReport, BadChunk,
    Submit, Cancel, GetStatus, GetProfiles, Ping, Pong,
    CreateInvite, ListInvites, RevokeInvite, ListNodes, Approve, Revoke, Drain,
)  # fmt: skip
TO_WORKER: Final[tuple[type[ToWorker], ...]] = (
    Joined, Prepare, Link, Abort, Discard, Probe, ShareChunks, ShutOut, Released, Evicted, Ping, Pong,
)  # fmt: skip
TO_CLIENT: Final[tuple[type[ToClient], ...]] = (Tokens, Finished, Notice, Failed, Answer, Pong, Evicted)
WORK_TO_COORDINATOR: Final[tuple[type[WorkMessage], ...]] = (StepDone, StepFailed, Ping)
WORK_TO_WORKER: Final[tuple[type[RunStep], ...]] = (RunStep,)
