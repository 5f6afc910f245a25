"""OAuth tokens for Kafka: from a file that somebody keeps fresh, or for a client's id and secret. No client library.

A source is called for every new connection, and keeps a token for as long as it is good.
"""

from __future__ import annotations

import base64
import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote_plus, urlencode, urlsplit

import msgspec

from monitor.errors import ConfigurationError, LogError, LogUnavailable

__all__ = ["ClientCredentials", "TokenFile", "token_source"]

LONGEST_ANSWER_BYTES = 64 * 1024
_EARLY_SECONDS = 30.0  # a token that ends while it travels is refused


class TokenFile:
    """The token in a file, read anew each time: a sidecar or a projected volume changes it under us."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> str:
        """The token.

        Raises:
            LogError: the file can't be read, or is empty.
        """
        try:
            token = self._path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LogError(
                f"the token file {self._path} can't be read: {type(error).__name__}",
                cure="let whatever issues the tokens write it, readable for this user (ANCHORWATCH_KAFKA_TOKEN_FILE)",
            ) from error
        if not token:
            raise LogError(
                f"the token file {self._path} is empty", cure="see whether what issues the tokens still runs"
            )
        return token


class _Answer(msgspec.Struct):
    access_token: str
    expires_in: float = 300.0


class ClientCredentials:
    """A token for the client's id and secret (RFC 6749, section 4.4), asked for again shortly before it ends."""

    def __init__(
        self,
        url: str,
        client_id: str,
        secret: str,
        scope: str = "",
        *,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seconds` is how long an answer may take; `clock` gives monotonic seconds.

        Raises:
            ConfigurationError: the address is not https (or http on this machine): it would show the secret.
        """
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")):
            raise ConfigurationError(
                "the token address is not https", cure="ANCHORWATCH_KAFKA_TOKEN_URL=https://..., or the secret is shown"
            )
        self._host = parts.hostname
        self._scope = scope
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._until = 0.0
        # Both are form-encoded before base64: RFC 6749, section 2.3.1.
        basic = base64.b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()
        self._request = urllib.request.Request(
            url,
            data=urlencode({"grant_type": "client_credentials"} | ({"scope": scope} if scope else {})).encode(),
            headers={
                "Authorization": f"Basic {basic}",
                "Content-Type": "application/x-www-form-urlencoded",
                "Accept": "application/json",
            },
        )

    def __call__(self) -> str:
        """The token. Blocks while a new one is asked for.

        Raises:
            LogUnavailable: the server does not answer now.
            LogError: it refuses the client, or its answer is no token.
        """
        with self._lock:
            if self._clock() >= self._until:
                asked = self._clock()
                answer = self._ask()
                self._token = answer.access_token
                self._until = asked + max(0.0, answer.expires_in - _EARLY_SECONDS)
            return self._token

    def _ask(self) -> _Answer:
        try:
            with _opener.open(self._request, timeout=self._seconds) as response:
                return msgspec.json.decode(response.read(LONGEST_ANSWER_BYTES), type=_Answer)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 429 or error.code >= 500:
                raise LogUnavailable(
                    f"the token server {self._host} answers with {error.code}", cure="wait, or see to that server"
                ) from error
            raise LogError(
                f"the token server {self._host} refuses this client: {error.code}",
                cure="check ANCHORWATCH_KAFKA_USERNAME (client id), ANCHORWATCH_KAFKA_PASSWORD (secret) and the scope",
            ) from error
        except msgspec.MsgspecError as error:
            raise LogError(
                f"the answer of the token server {self._host} is no token",
                cure="check ANCHORWATCH_KAFKA_TOKEN_URL: it must be the token endpoint itself",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise LogUnavailable(
                f"the token server {self._host} does not answer: {error}", cure="check ANCHORWATCH_KAFKA_TOKEN_URL"
            ) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the secret to another place."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:  # noqa: ARG002
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def token_source(
    *, file: Path | None, url: str, client_id: str, secret: str, scope: str, seconds: float
) -> Callable[[], str]:
    """What gives tokens: the file where there is one, else the server.

    Raises:
        ConfigurationError: neither is named.
    """
    if file is not None:
        return TokenFile(file)
    if url:
        return ClientCredentials(url, client_id, secret, scope, seconds=seconds)
    raise ConfigurationError(
        "OAUTHBEARER needs a token", cure="set ANCHORWATCH_KAFKA_TOKEN_FILE, or ANCHORWATCH_KAFKA_TOKEN_URL"
    )
