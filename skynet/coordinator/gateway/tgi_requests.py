"""What clients of Text Generation Inference ask, as Submits. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import Field

from skynet.coordinator.gateway.bodies import Body, submit_of, supported_part, validated
from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.errors import ApiError
from skynet.protocol.ids import RequestId
from skynet.protocol.messages import Submit
from skynet.protocol.steps import Penalties, SamplingParams

DEFAULT_TOKENS: Final = 100
HARMLESS: Final[frozenset[str]] = frozenset()
UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {  # with the values at which they ask for nothing
    "best_of": (1,),
    "typical_p": (1, 1.0),
    "truncate": (),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
    "grammar": (),
    "adapter_id": (),
}


class _Parameters(Body):
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    top_k: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    do_sample: bool = False
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = DEFAULT_TOKENS
    return_full_text: bool = False
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default=[], max_length=16)
    details: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None

    def sampling(self, default_seed: int) -> SamplingParams:
        """Greedy, unless something asks for sampling."""
        is_sampled = self.do_sample or not (
            self.temperature in (None, 1) and not self.top_k and self.top_p in (None, 1)
        )
        penalties = Penalties(repetition=self.repetition_penalty, frequency=self.frequency_penalty)
        return SamplingParams(
            temperature=(self.temperature or 1.0) if is_sampled else 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            seed=default_seed if self.seed is None else self.seed,
            logprobs=0,
            penalties=None if penalties == Penalties() else penalties,
        )


class _Generate(Body):
    inputs: str
    parameters: dict[str, Any] = Field(default={})
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    submit: Submit
    is_stream: bool
    has_details: bool
    seed: int | None  # if it was given
    opening: str  # what the whole text begins with


def read_generate(
    body: Mapping[str, Any], config: GatewayConfig, name: str, seed: int, is_stream: bool | None
) -> Asked:
    """`is_stream`: as the route says; None: as the body does. Raises ApiError."""
    asked = validated(_Generate, {key: value for key, value in body.items() if value is not None})
    try:
        parameters = validated(_Parameters, supported_part(asked.parameters, HARMLESS, UNSUPPORTED))
    except ApiError as exc:
        exc.param = f"parameters.{exc.param}"
        raise
    submit = submit_of(
        request_id=RequestId(f"{name}-0"),
        prompt=asked.inputs,
        sampling=parameters.sampling(seed),
        max_tokens=parameters.max_new_tokens,
        stop=tuple(parameters.stop),
        timeout_s=config.wait_s,
    )
    streams = asked.stream if is_stream is None else is_stream
    opening = asked.inputs if parameters.return_full_text else ""
    return Asked(submit, streams, parameters.details, parameters.seed, opening)
