"""Identities that appear in messages, kept apart by type."""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", str)  # a user on a machine: 26 base32 characters of its Ed25519 key's SHA-256
PeerId = NewType("PeerId", str)  # one process of a node: "<node id>.<suffix>"; what an authenticated key maps to
WorkerId = NewType("WorkerId", str)  # the PeerId of a worker; its suffix is stable: its device or --name
RequestId = NewType("RequestId", str)  # chosen by the client, so that a re-submission is recognised
LeaseId = NewType("LeaseId", str)
SequenceId = NewType("SequenceId", int)  # within one coordinator's life
