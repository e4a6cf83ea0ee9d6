"""How much of an event loop's time each peer may take: pure, so that one peer's flood isn't everybody's pause."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from skynet.protocol.ids import PeerId

MESSAGE_S: Final = 30e-6  # what receiving a message costs beside handling it


@dataclass(slots=True)
class _Account:
    left_s: float
    at: float


@dataclass(slots=True)
class Allowance:
    """Processor time that each peer's messages may cost: `burst_s` at once, and `share` of one core for ever."""

    share: float = 0.5
    burst_s: float = 1.0
    _accounts: dict[PeerId, _Account] = field(default_factory=dict)

    def is_overdrawn(self, peer_id: PeerId, now: float) -> bool:
        """Whether this peer has had more than its part; for a while then nothing of it should be looked at."""
        account = self._accounts.get(peer_id)
        if account is None:
            return False
        account.left_s = min(self.burst_s, account.left_s + self.share * (now - account.at))
        account.at = now
        return account.left_s < 0

    def charge(self, peer_id: PeerId, took_s: float, now: float) -> bool:
        """One message was handled and cost so much. True if that has used up what this peer had."""
        account = self._accounts.get(peer_id)
        if account is None:
            account = self._accounts[peer_id] = _Account(self.burst_s, now)
        account.left_s += self.share * (now - account.at) - took_s - MESSAGE_S
        account.left_s = min(self.burst_s, account.left_s)
        account.at = now
        return account.left_s < 0

    def forget(self, now: float) -> None:
        """Drop the accounts of those who have all of their allowance again."""
        for peer_id, account in list(self._accounts.items()):
            if account.left_s + self.share * (now - account.at) >= self.burst_s:
                del self._accounts[peer_id]
