"""TLS 1.3 whose only certificate is a swarm's own Ed25519 key: what is checked is the key, never a name or a date."""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
import tempfile
from collections.abc import Iterator
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from skynet.errors import ProtocolError
from skynet.protocol.identity import PublicKey, SwarmKey

_NAME: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "skynet")])
_FROM: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL: Final = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)  # RFC 5280: no well-defined end


def server_context(swarm_key: SwarmKey) -> ssl.SSLContext:
    """A context that proves possession of the swarm's key to whoever connects."""
    private_key = swarm_key.private_key
    builder = x509.CertificateBuilder(
        _NAME, _NAME, private_key.public_key(), x509.random_serial_number(), _FROM, _UNTIL
    )
    certificate = builder.sign(private_key, None)
    pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a connection that carries one request
    with _readable_path(pem) as path:
        context.load_cert_chain(path)
    return context


def client_context() -> ssl.SSLContext:
    """A context that checks no certificate authority; the caller compares `peer_key` with its pin before it speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # TLS 1.3 still proves that the peer holds its certificate's key
    return context


def peer_key(connection: ssl.SSLObject) -> PublicKey:
    """The Ed25519 key that the server has proven to hold. Raises ProtocolError if it is of another kind."""
    try:
        key = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"").public_key()
    except ValueError as exc:
        raise ProtocolError("the peer's TLS certificate is unreadable; this isn't a SkyNet coordinator") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ProtocolError("the peer's TLS certificate has no Ed25519 key; this isn't a SkyNet coordinator")
    return PublicKey(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


@contextlib.contextmanager
def _readable_path(data: bytes) -> Iterator[str]:
    """A path from which OpenSSL can read `data` (it takes no bytes); in memory where the system allows it."""
    if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd"):
        descriptor = os.memfd_create("skynet-certificate")
        try:
            os.write(descriptor, data)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory() as directory:  # mode 0700
        path = os.path.join(directory, "certificate.pem")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield path
