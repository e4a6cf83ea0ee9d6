"""The one bulk transfer: chunked, within a credit window, resumable by offset. Weights, uploads, snapshots, logs.

A transfer is a named row of bytes that flows one way. Whoever receives grants credit; whoever sends never has more than
that under way. Both sides say a word each `keepalive_s`, so a vanished side frees the other's state.

    get:  BulkGet ->                put:  BulkPut ->
          <- BulkData ...                 <- BulkReady (where to go on, credit)
          BulkCredit ->                   BulkData -> ...
          <- BulkEnd                      <- BulkCredit
                                          BulkEnd ->
                                          <- BulkEnd (stored)
BulkError ends a transfer, in either direction.
"""

from skynet.protocol.bulk.client import BulkClient
from skynet.protocol.bulk.flow import BulkConfig
from skynet.protocol.bulk.server import BulkServer
from skynet.protocol.bulk.sources import BulkSink, BulkSource, BytesSource, FileSource

__all__ = ["BulkClient", "BulkConfig", "BulkServer", "BulkSink", "BulkSource", "BytesSource", "FileSource"]
