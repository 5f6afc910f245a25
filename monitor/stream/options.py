"""How to reach a Kafka cluster: who we are there, how that is proven, and how long to wait. Plain values.

It knows nothing of settings, nor of any client library, so that it can be made where none is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

__all__ = ["Compression", "KafkaOptions", "Mechanism", "SecurityProtocol"]

SecurityProtocol = Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]
Compression = Literal["none", "gzip", "lz4", "zstd"]


class KafkaOptions(Struct, frozen=True, kw_only=True):
    """Everything about a cluster but its address. The words are Kafka's own.

    Attributes:
        security_protocol: what the listener speaks: with TLS (ssl) or without, with SASL or without.
        mechanism: how SASL proves who we are.
        username, password: for PLAIN and SCRAM; for OAUTHBEARER with `token_url`, the client's id and secret.
        ca_file: PEM certificates of whom we trust; by default the system's. Host names are always checked.
        cert_file, key_file: our own certificate, where the cluster wants one.
        token_file: a file that somebody keeps filled with a valid OAuth token; read anew for every connection.
        token_url, token_scope: where a token is had for the client's id and secret (RFC 6749, section 4.4).
        compression: of what we write. Whoever reads needs the same library; gzip needs none.
        append_seconds: how long an append may take before it is given up as unavailable.
        answer_seconds: how long any other answer may take.
        session_seconds: after how long without a sign of life a worker loses its partitions to others.
    """

    security_protocol: SecurityProtocol = "plaintext"
    mechanism: Mechanism | None = None
    username: str = ""
    password: str = ""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token_file: Path | None = None
    token_url: str = ""
    token_scope: str = ""
    compression: Compression = "none"
    client_id: str = "anchorwatch"
    append_seconds: float = 15.0
    answer_seconds: float = 5.0
    session_seconds: float = 10.0

    def __repr__(self) -> str:
        """Without the password."""
        return f"KafkaOptions({self.security_protocol}, {self.mechanism}, {self.username!r})"

    __str__ = __repr__

    @property
    def tls(self) -> bool:
        """Whether what is sent can't be read on the way."""
        return self.security_protocol in ("ssl", "sasl_ssl")

    @property
    def sasl(self) -> bool:
        """Whether SASL proves who we are."""
        return self.security_protocol in ("sasl_plaintext", "sasl_ssl")
