"""What the model is called over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from skynet.coordinator.gateway.errors import ApiError
from skynet.coordinator.served import ServedModel

MAX_TEXTS: Final = 1 << 15  # tokens whose text we remember


@dataclass(frozen=True, slots=True)
class ServedName:
    """One model, as clients name it. A directory's path is nobody's business: its last part is the name."""

    model_id: str
    aliases: frozenset[str]
    max_positions: int
    token_text: Callable[[int], str]
    hidden_ids: frozenset[int]  # tokens that no answer shows
    since: int  # seconds since 1970: when we began to serve it

    @classmethod
    def of(cls, model: ServedModel, since: int) -> ServedName:
        """As clients see this model."""
        name = model.ref.name
        last = name.rstrip("/").rpartition("/")[2] or name
        model_id = last if Path(name).is_absolute() else name
        token_text = lru_cache(MAX_TEXTS)(model.text.token_text)
        aliases = frozenset({name, last})
        return cls(model_id, aliases, model.spec.max_positions, token_text, model.text.hidden_ids, since)

    def check(self, wanted: str | None) -> None:
        """Raises ApiError if this isn't the model that a request wants. None: whichever there is."""
        if wanted is not None and wanted.rstrip("/") not in self.aliases:
            raise ApiError(
                404,
                f"the model {wanted[:200]!r} isn't served here; this swarm runs {self.model_id!r}",
                param="model",
                code="model_not_found",
            )
