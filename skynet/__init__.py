"""SkyNet: a peer-to-peer volunteer inference swarm.

Names are resolved on first use, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

__version__ = "0.1.0"
