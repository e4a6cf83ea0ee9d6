"""What the relay could do to sealed messages, and that the receiver notices."""

from __future__ import annotations

import pytest

from skynet.errors import MalformedMessage
from skynet.protocol.sealed import SealedSession

SECRET, INITIATOR, RESPONDER = b"s" * 32, b"i" * 40, b"r" * 40


def sessions(responder_secret: bytes = SECRET) -> tuple[SealedSession, SealedSession]:
    return (
        SealedSession(SECRET, INITIATOR, RESPONDER, is_initiator=True),
        SealedSession(responder_secret, RESPONDER, INITIATOR, is_initiator=False),
    )


def agreed(responder_secret: bytes = SECRET) -> tuple[SealedSession, SealedSession]:
    a, b = sessions(responder_secret)
    answers: list[bytes] = []
    b.handle(a.offer(), answers.append)
    a.handle(answers[0], answers.append)
    return a, b


def refuse_reply(message: bytes) -> None:
    pytest.fail(f"answered {message!r}")


def test_both_directions_carry_what_was_sealed() -> None:
    a, b = agreed()
    for index in range(5):
        text = b"%d" % index * index
        assert b.handle(a.seal(text), refuse_reply) == text
        assert a.handle(b.seal(text), refuse_reply) == text


def test_altered_message_is_noticed() -> None:
    a, b = agreed()
    message = a.seal(b"first")
    with pytest.raises(MalformedMessage, match="didn't seal"):
        b.handle(message[:-1] + bytes([message[-1] ^ 1]), refuse_reply)


def test_repeated_message_is_noticed() -> None:
    a, b = agreed()
    message = a.seal(b"first")
    assert b.handle(message, refuse_reply) == b"first"
    with pytest.raises(MalformedMessage, match="repeated"):
        b.handle(message, refuse_reply)


def test_missing_message_is_noticed() -> None:
    a, b = agreed()
    a.seal(b"lost on the way")
    with pytest.raises(MalformedMessage, match="lost"):
        b.handle(a.seal(b"second"), refuse_reply)


def test_message_sent_back_to_its_sender_is_noticed() -> None:
    a, _ = agreed()
    with pytest.raises(MalformedMessage, match="didn't seal"):
        a.handle(a.seal(b"first"), refuse_reply)


def test_peer_without_the_right_key_agrees_on_nothing() -> None:
    a, b = agreed(responder_secret=b"x" * 32)
    with pytest.raises(MalformedMessage, match="didn't seal"):
        b.handle(a.seal(b"hello"), refuse_reply)


def test_old_session_played_back_opens_nothing_and_does_not_disturb_the_new() -> None:
    a, b = sessions()
    answers: list[bytes] = []
    offer = a.offer()
    b.handle(offer, answers.append)
    a.handle(answers[0], answers.append)
    recorded = a.seal(b"pay 100")
    assert b.handle(recorded, refuse_reply) == b"pay 100"
    b.handle(offer, answers.append)  # the relay plays the old offer again
    assert answers[-1] != answers[0]
    assert b.handle(a.seal(b"still the same session"), refuse_reply) == b"still the same session"
    with pytest.raises(MalformedMessage):
        b.handle(recorded, refuse_reply)


@pytest.mark.parametrize("one_time_key", [bytes(32), b"\x01" + bytes(31)])
def test_worthless_one_time_keys_are_refused(one_time_key: bytes) -> None:
    _, b = sessions()
    with pytest.raises(MalformedMessage, match="worthless"):
        b.handle(b"\x01" + one_time_key, refuse_reply)
