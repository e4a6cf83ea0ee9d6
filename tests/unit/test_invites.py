"""The printable invite: whole, or refused in words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skynet.errors import ConfigError
from skynet.protocol.identity import PublicKey
from skynet.protocol.invites import (
    PREFIX,
    SECRET_BYTES,
    Invite,
    decode_invite,
    encode_invite,
    new_invite_id,
    new_secret,
)
from skynet.protocol.roles import Grant, Role

GOLDEN = Invite(
    invite_id="k3v7q2ab",
    secret=bytes(range(20)),
    swarm_name="home",
    swarm_key=PublicKey(bytes(range(32))),
    addresses=(("192.168.1.4", 47100), ("fd00::4", 47100)),
    role=Role.WORKER,
    grants=(Grant.RUN_CODE,),
    expires_at=1_800_000_000,
    uses=1,
)
GOLDEN_TEXT = (
    "skynet-invite-agm2q2ztoy3xcmtbmlcbiaabaibqibiga4eascqlbqgq4dyqcejbhjdin5wwlrbaaaaqeayeaudaocajbifqyd"
    "iob4ibceqtcqkrmfyydenbwha5dypzfevlge4telrrgy4c4mjogtg3p7esu5tgimbqhi5djtnx7stho33snnsxfenioj2w4x3dn5"
    "sglttljhjaaap44yxag"
)

invites = st.builds(
    Invite,
    invite_id=st.builds(new_invite_id),
    secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
    swarm_name=st.text(st.characters(categories=("L", "N"), include_characters=" -_."), max_size=64),
    swarm_key=st.binary(min_size=32, max_size=32).map(PublicKey),
    addresses=st.lists(
        st.tuples(st.sampled_from(["10.0.0.1", "::1", "a.example"]), st.integers(1, 65535)), min_size=1, max_size=8
    ).map(tuple),
    role=st.sampled_from(Role),
    grants=st.sets(st.sampled_from(Grant)).map(tuple),
    expires_at=st.integers(1, 2**40),
    uses=st.integers(1, 100_000),
)


@given(invite=invites)
def test_invite_survives_being_printed(invite: Invite) -> None:
    assert decode_invite(encode_invite(invite)) == invite


def test_invite_of_layout_one_is_read_for_ever() -> None:
    assert encode_invite(GOLDEN) == GOLDEN_TEXT
    assert Invite.parse(GOLDEN_TEXT) == GOLDEN


def test_invite_survives_a_mail_program() -> None:
    text = GOLDEN_TEXT.upper()
    wrapped = "  " + "\r\n ".join(text[i : i + 40] for i in range(0, len(text), 40)) + "\n"
    assert decode_invite(wrapped) == GOLDEN


@pytest.mark.parametrize("cut", [1, 2, 5, 50, 150])
def test_truncated_invite_is_refused(cut: int) -> None:
    with pytest.raises(ConfigError, match="damaged or incomplete"):
        decode_invite(GOLDEN_TEXT[:-cut])


@given(position=st.integers(len(PREFIX), len(GOLDEN_TEXT) - 2), letter=st.sampled_from("abcdefghijklmnop234567"))
def test_invite_with_a_changed_letter_is_refused(position: int, letter: str) -> None:
    changed = GOLDEN_TEXT[:position] + letter + GOLDEN_TEXT[position + 1 :]
    if changed == GOLDEN_TEXT:
        return
    with pytest.raises(ConfigError, match="invite: damaged"):
        decode_invite(changed)


@given(text=st.one_of(st.text(), st.text("abcdefgh234567").map(lambda t: PREFIX + t)))
@settings(max_examples=200)
def test_any_text_is_an_invite_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        decode_invite(text)


def test_endless_text_is_refused_unread() -> None:
    with pytest.raises(ConfigError, match="copy the invite alone"):
        decode_invite(PREFIX + "a" * 1_000_000)


def test_secret_stays_out_of_logs() -> None:
    invite = Invite(
        invite_id="x",
        secret=new_secret(),
        swarm_name="",
        swarm_key=PublicKey(bytes(32)),
        addresses=(("::1", 1),),
        role=Role.CLIENT,
        grants=(),
        expires_at=1,
        uses=1,
    )
    assert repr(invite) == "Invite(x, client)"
