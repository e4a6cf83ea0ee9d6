"""One step of a replica: what the coordinator asks of every rank, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from skynet.protocol.ids import SequenceId
from skynet.protocol.plan import Epoch

MAX_LOGPROBS: Final = 20  # likeliest tokens told beside a sampled one
MAX_BIASES: Final = 1024  # tokens that one request's logit_bias names
MAX_BIAS: Final = 100.0  # of a logit, either way
MAX_SEEN: Final = 1 << 16  # distinct tokens that penalties are about; of more, those that came first
MAX_ID: Final = 1 << 24  # token ids lie below: float32 holds them
LEAST_LOGPROB: Final = -9999.0  # stands for minus infinity, which JSON doesn't know


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """What tokens that were seen already lose. Repetition is about prompt and answer, the others about the answer."""

    repetition: float = 1.0  # positive logits are divided by it, others multiplied
    presence: float = 0.0  # taken from the logit of each token of the answer
    frequency: float = 0.0  # the same for each time it is there

    def __post_init__(self) -> None:
        if not 0.01 <= self.repetition <= 100:
            raise ValueError(f"repetition_penalty must lie in [0.01, 100], got {self.repetition}")
        if not -2 <= self.presence <= 2:
            raise ValueError(f"presence_penalty must lie in [-2, 2], got {self.presence}")
        if not -2 <= self.frequency <= 2:
            raise ValueError(f"frequency_penalty must lie in [-2, 2], got {self.frequency}")

    @property
    def counts_answer(self) -> bool:
        """Whether it matters what of the seen tokens is the answer's."""
        return self.presence != 0 or self.frequency != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Random numbers depend on (seed, index, position), never on batch or layout.

    In this order: logit_bias, penalties, temperature, top_k, top_p, min_p. Logprobs are of the logits before all that.
    """

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    seed: int = 0
    index: int = 0  # which of several answers to one prompt
    min_p: float = 0.0  # keeps tokens at least so likely, the likeliest being 1
    logprobs: int | None = None  # tell how likely each sampled token was, and so many of the likeliest; None: don't
    penalties: Penalties | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)

    def __post_init__(self) -> None:
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must lie in [0, {MAX_LOGPROBS}], got {self.logprobs}")
        if self.logit_bias:
            self._check_bias()
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must lie in [0, 100], got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 <= self.seed < 2**64 or not 0 <= self.index < 2**32:
            raise ValueError(f"seed and index must fit 64 and 32 bits, got {self.seed} and {self.index}")

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias names {len(self.logit_bias)} tokens, at most {MAX_BIASES} are allowed")
        if not all(0 <= token_id < MAX_ID and abs(bias) <= MAX_BIAS for token_id, bias in self.logit_bias):
            raise ValueError(
                f"logit_bias adds between {-MAX_BIAS:.0f} and {MAX_BIAS:.0f} to logits of token ids in [0, {MAX_ID})"
            )
        if len({token_id for token_id, _ in self.logit_bias}) != len(self.logit_bias):
            raise ValueError("logit_bias names a token twice")

    @property
    def changes_logits(self) -> bool:
        """Whether the likeliest token may be another than the largest logit's."""
        return self.penalties is not None or bool(self.logit_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenTokens:
    """The distinct tokens of a sequence, for its penalties: whoever samples needs no memory of earlier steps."""

    ids: bytes  # ascending, uint32 little-endian
    counts: bytes = b""  # how often each is in the answer, the same; empty where only repetition counts

    def __post_init__(self) -> None:
        if len(self.ids) > 4 * MAX_SEEN or len(self.ids) % 4:
            raise ValueError(f"seen tokens are up to {MAX_SEEN} numbers of 4 bytes, got {len(self.ids)} bytes")
        if len(self.counts) not in (0, len(self.ids)):
            raise ValueError(f"{len(self.counts)} bytes of counts, expected {len(self.ids)} as of the seen tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePart:
    """One sequence's share of a step: tokens to run at positions [start, start + len(token_ids))."""

    sequence_id: SequenceId
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]  # KV block of positions [i * block_size, (i + 1) * block_size)
    sample: SamplingParams | None = None  # None: a prompt chunk before the last, nothing is sampled
    adapter: int = 0  # LoRA adapter; 0: none
    seen: SeenTokens | None = None  # where `sample` asks for penalties and this stage samples
    # A grammar's constraint belongs here too: `allowed`, a bit for each token id, applied before the logit bias.

    @property
    def extra_bytes(self) -> int:
        """About how much longer its sampling makes the message."""
        biases = 0 if self.sample is None else 16 * len(self.sample.logit_bias)
        return biases + (0 if self.seen is None else len(self.seen.ids) + len(self.seen.counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """Coordinator -> every rank: "run this batch". Steps of one epoch are numbered without gaps and run in order."""

    kind: ClassVar[str] = "run_step"
    epoch: Epoch
    step: int
    parts: tuple[SequencePart, ...]
    timeout_s: float  # ranks give up waiting for each other after this long


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely a sampled token was, and the likeliest ones there: natural logarithms, at least -9999."""

    logprob: float
    top_ids: tuple[int, ...] = ()  # likeliest first
    top_logprobs: tuple[float, ...] = ()  # theirs

    def __post_init__(self) -> None:
        if len(self.top_ids) > MAX_LOGPROBS or len(self.top_logprobs) != len(self.top_ids):
            raise ValueError(
                f"{len(self.top_ids)} likeliest tokens with {len(self.top_logprobs)} logprobs, expected as many, "
                f"and at most {MAX_LOGPROBS}"
            )
        if not all(LEAST_LOGPROB <= value <= 0 for value in (self.logprob, *self.top_logprobs)):
            raise ValueError(f"logprobs must lie in [{LEAST_LOGPROB:.0f}, 0]")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """Sampling rank -> coordinator: the sampled token of each part that asked for one, in order of parts."""

    kind: ClassVar[str] = "step_done"
    epoch: Epoch
    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # of each token, nil where none are wanted; empty if nowhere


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """Rank -> coordinator: this step can't be finished.

    `suspect` is the peer that is to blame, if one is known; `is_nonsense` says that it sent what can't be used.
    """

    kind: ClassVar[str] = "step_failed"
    epoch: Epoch
    step: int
    reason: str
    suspect: str | None = None
    is_nonsense: bool = False
