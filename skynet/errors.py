"""Every error SkyNet raises on purpose; each class is something a caller can act on."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

MAX_FOREIGN_CHARS: Final = 1000


def foreign_text(text: str, limit: int = MAX_FOREIGN_CHARS) -> str:
    """Words of a peer, for an error, a log, a status or other peers: one bounded line that no terminal obeys."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class SkyNetError(Exception):
    """The root of the tree. `exit_code` is what the command line ends with (documented in README)."""

    exit_code: ClassVar[int] = 1


# -- what a peer sent: close the link, keep serving others ------------------------------------------------------------


class ProtocolError(SkyNetError):
    """A peer broke the protocol. The text may quote it and is made harmless here, wherever it goes."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(foreign_text(message))


class MalformedMessage(ProtocolError):
    """Bytes that don't decode, or a field of the wrong type or out of bounds."""


class Nonsense(MalformedMessage):
    """What this worker sent for a step can't be used; it isn't fit to take part in one."""

    def __init__(self, message: str, sender: str) -> None:
        super().__init__(message)
        self.sender = sender


class UnknownKind(ProtocolError):
    """A message kind this side doesn't know."""


class VersionMismatch(ProtocolError):
    """The peer speaks another protocol version; the text says which side to upgrade."""


class NotPermitted(ProtocolError):
    """The sender's role may not send this kind of message."""


# -- finding and entering a swarm -------------------------------------------------------------------------------------


class DiscoveryError(SkyNetError):
    """No coordinator, or several; the text says what was tried and which option decides."""

    exit_code = 4


class AdmissionRefused(SkyNetError):
    """The coordinator doesn't let this node in; the text says why and what to do."""

    exit_code = 5


class AwaitingApproval(AdmissionRefused):
    """The swarm is in `approve` mode and its owner hasn't approved this node yet: try again later."""


# -- workers: retry elsewhere -----------------------------------------------------------------------------------------


class WorkerError(SkyNetError):
    """A worker didn't do what was asked."""

    exit_code = 6


class WorkerTimeout(WorkerError):
    """No answer before the deadline."""


class WorkerLost(WorkerError):
    """The connection to the worker is gone, or its lease ran out."""


class StepRejected(WorkerError):
    """A worker refused a step: wrong epoch, unknown blocks, impossible shapes."""


class StepAborted(WorkerError):
    """A wait on the compute thread was ended on purpose: a newer epoch, a cancel, or shutdown."""


# -- bulk transfers: ask again, or elsewhere ---------------------------------------------------------------------------

TransferCode = Literal["not_found", "refused", "busy", "unreadable", "timeout", "cancelled", "broken"]


class TransferFailed(SkyNetError):
    """A bulk transfer ended early; `code` says whether asking again ("busy", "broken") or elsewhere may help."""

    exit_code = 6

    def __init__(self, message: str, code: TransferCode) -> None:
        super().__init__(foreign_text(message))  # it may quote the other side
        self.code: TransferCode = code


# -- capacity: tell the caller what is missing ------------------------------------------------------------------------


class CapacityError(SkyNetError):
    """What is there can't hold what is asked; `missing_bytes` says by how much (0: not a matter of memory)."""

    exit_code = 7

    def __init__(self, message: str, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class PromptTooLong(CapacityError):
    """A prompt, or a conversation, has more tokens than the model has positions: shorten it."""


class QueueFull(CapacityError):
    """So many requests are in progress that this one isn't taken: try again later."""


class NotServed(CapacityError):
    """A request waited as long as it may, and no replica could run it."""


class RequestFailed(SkyNetError):
    """A completion ended without its answer; the text says why."""

    exit_code = 8


# -- what a user gave us: tell the user what to change ----------------------------------------------------------------


class ConfigError(SkyNetError, ValueError):
    """An option, a file or an environment variable is wrong."""

    exit_code = 2


class ModelError(ConfigError):
    """A model that can't be read or run."""


class UnsupportedArchitecture(ModelError):
    """The model's architecture, or one of its settings, isn't one we run."""


class WeightError(ModelError):
    """A weight file is missing, truncated, altered or unreadable; the text names the file and the fix."""
