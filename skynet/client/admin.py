"""Commands that change a swarm: over its Unix socket on the coordinator's machine, else as an admitted admin."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from skynet import errors
from skynet.client.answered import as_error, body_of
from skynet.client.swarm import ClientConfig, Swarm
from skynet.protocol.admin_socket import read_frame, send_frame, socket_path
from skynet.protocol.codec import Decoder, encode
from skynet.protocol.messages import AdminMessage, Answer, Failed
from skynet.protocol.roles import Role

ANSWER_S: Final = 10.0


def has_own_coordinator(config_dir: Path) -> bool:
    """Whether a coordinator that keeps its keys here listens for admins."""
    return socket_path(config_dir).exists()


async def command(message: AdminMessage, config: ClientConfig) -> dict[str, Any]:
    """Carry out one command. Raises what the coordinator answers, or DiscoveryError if there is none."""
    path = socket_path(config.config_dir)
    if config.coordinator is None and config.swarm is None and path.exists():
        return await _by_unix_socket(message, path)
    async with Swarm(config, role=Role.ADMIN) as swarm:
        return await swarm.command(message)


async def _by_unix_socket(message: AdminMessage, path: Path) -> dict[str, Any]:
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                await send_frame(writer, bytes(encode(message)[0]))
                answer, _ = Decoder[Answer | Failed](Answer, Failed).decode([await read_frame(reader)])
            finally:
                writer.close()
    except (ConnectionRefusedError, FileNotFoundError) as exc:
        raise errors.DiscoveryError(f"{path}: no coordinator listens there; start `skynet coordinator`") from exc
    except (EOFError, ConnectionError) as exc:
        raise errors.RequestFailed(f"{path}: the coordinator ended the connection; its log says why") from exc
    except PermissionError as exc:
        raise errors.AdmissionRefused(f"{path}: only the coordinator's owner may send commands") from exc
    except TimeoutError as exc:
        raise errors.WorkerTimeout(f"{path}: no answer within {ANSWER_S:.0f} s") from exc
    if isinstance(answer, Failed):
        raise as_error(answer)
    return body_of(answer)
