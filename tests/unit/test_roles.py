"""docs/security.md says who may send what; this makes it true."""

from __future__ import annotations

from pathlib import Path

import pytest

from skynet.errors import NotPermitted
from skynet.protocol.messages import TO_COORDINATOR, WORK_TO_COORDINATOR
from skynet.protocol.roles import MAY_SEND, Role, check_may_send, covers

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
HEADER = "| Message | worker | client | admin |"


def documented() -> dict[str, frozenset[Role]]:
    """The table of the document: kind -> roles."""
    lines = iter(DOCUMENT.read_text().split(HEADER, 1)[1].splitlines()[2:])
    table: dict[str, frozenset[Role]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        kind, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert set(cells) <= {"yes", ""}, line
        table[kind] = frozenset(role for role, cell in zip(Role, cells, strict=True) if cell)
    return table


TABLE = documented()


def test_document_has_the_same_kinds_as_the_code() -> None:
    assert TABLE.keys() == MAY_SEND.keys()


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", TABLE)
def test_role_may_send_what_the_document_says(kind: str, role: Role) -> None:
    if role in TABLE[kind]:
        check_may_send(role, kind)
    else:
        with pytest.raises(NotPermitted, match=f"{kind}: a {role} may not send it"):
            check_may_send(role, kind)


@pytest.mark.parametrize("message", [*TO_COORDINATOR, *WORK_TO_COORDINATOR])
def test_every_message_to_the_coordinator_is_in_the_document(message: type) -> None:
    assert message.kind in TABLE  # type: ignore[attr-defined]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", ["", "run_step", "welcome", "JOIN", "join "])
def test_kind_that_is_missing_is_refused(kind: str, role: Role) -> None:
    with pytest.raises(NotPermitted, match="only nobody may"):
        check_may_send(role, kind)


def test_worker_may_ask_and_client_may_not_work() -> None:
    assert covers(frozenset({Role.WORKER}), Role.CLIENT)
    assert not covers(frozenset({Role.CLIENT}), Role.WORKER)
    assert not covers(frozenset({Role.WORKER, Role.CLIENT}), Role.ADMIN)
    assert all(covers(frozenset({Role.ADMIN}), role) for role in Role)
    assert not covers(frozenset(), Role.CLIENT)
