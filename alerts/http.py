"""One POST to one receiver, that ends in bounded time and memory whatever stands at the other end.

It knows no payload, no vendor, and no second try: what may pass, or somebody can cure, is raised as
`ChannelUnavailable`, with the seconds that the receiver asked for, and whoever delivers tries again. Nothing is
followed, unpacked, kept between requests, or taken from the environment but the trusted certificates (SSL_CERT_FILE,
SSL_CERT_DIR). Secrets may be in path, query, headers and body, so errors name none of them.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import re
import ssl
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import httpcore
import httpx

from alerts.connection import Deadline, Pinned, Resolve, addresses
from alerts.guard import Target, parse
from monitor.errors import ChannelError, ChannelUnavailable

__all__ = ["Client", "Reply", "retry_after"]

MOST_RETRY_AFTER = 3600.0

_PASSING = {408, 425, 429}
_MESSAGE = {400, 413, 422}  # what the message itself is at fault for: another one may be taken
_WORD = re.compile(rb"[a-z]+(_[a-z]+){0,5}")
_CURES = {
    401: "it does not accept the key: it may have been revoked; put a new one into its file",
    403: "it does not accept the key: it may have been revoked; put a new one into its file",
    404: "the address may have been withdrawn; make a new one at the receiver, and put it into the rules",
    410: "the address has been withdrawn; make a new one at the receiver, and put it into the rules",
    413: "the message is too large for it: lower `max_alerts`",
}


class Reply(NamedTuple):
    """What came back. The body is cut at the client's `most_bytes`, or where it stopped coming."""

    status: int
    body: bytes


class Client:
    """Posts. For one thread at a time; each integration has its own.

    Args:
        timeout: seconds for everything: name, connection, TLS, request and reply. `post` blocks no longer.
        allow_private: whether receivers may be in private networks and on loopback, and be spoken to by plain HTTP.
        most_bytes: of a reply's body.
        resolve: name and port → IP addresses, in the order in which they are tried; may block.
        now: wall clock, seconds since 1970; for a Retry-After that names a date.
    """

    def __init__(
        self,
        *,
        timeout: float,
        allow_private: bool,
        most_bytes: int = 65_536,
        resolve: Resolve | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._timeout = timeout
        self._allow_private = allow_private
        self._most_bytes = most_bytes
        self._now = now
        self._deadline = Deadline()
        self._backend = Pinned(self._deadline, resolve or addresses, allow_private)

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, secret_url: bool = False) -> Reply:
        """Hand over a body; returns where the receiver says that it has taken it (2xx).

        With `secret_url` errors name nothing but the host; otherwise also the path, though never the query.

        Raises:
            ChannelUnavailable: not now: no connection, no answer in time, 408, 425, 429, 5xx; nor until somebody has
                cured it: a key that is not accepted, an address that nothing is sent to, a redirect, any other status.
            ChannelError: never: 400, 413, 422, for which this message is at fault, and no other one.
        """
        try:
            target = parse(url, allow_private=self._allow_private)
        except ChannelError as error:
            raise _until_cured(error) from None
        shown = target.origin if secret_url else target.origin + target.path.decode("ascii").partition("?")[0]
        self._deadline.start(self._timeout)
        try:
            status, found, answer = self._exchange(target, body, headers)
        except httpcore.TimeoutException:
            raise ChannelUnavailable(
                f"{shown} did not answer within {self._timeout:g} s",
                cure="see whether it is up; a slow receiver may be given a longer `timeout`",
            ) from None
        except httpcore.LocalProtocolError:
            raise ChannelUnavailable(
                f"nothing can be sent to {shown}: a header holds what no header may",
                cure="see that the files of keys hold the key alone, in one line",
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise _no_answer(shown, error) from None
        except ChannelUnavailable:
            raise
        except ChannelError as error:
            raise _until_cured(error) from None
        if 200 <= status < 300:
            return Reply(status, answer)
        raise self._refusal(shown, status, found, answer)

    def close(self) -> None:
        """Nothing is open between requests."""

    @functools.cached_property
    def _trust(self) -> ssl.SSLContext:
        try:
            return httpx.create_ssl_context()
        except OSError:
            raise ChannelUnavailable(
                "the trusted certificates can't be read",
                cure="see that SSL_CERT_FILE or SSL_CERT_DIR names some, as PEM",
            ) from None

    def _exchange(
        self, target: Target, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        sent = {
            "Host": target.authority,
            "User-Agent": "anchorwatch",
            "Accept-Encoding": "identity",
            "Connection": "close",  # what is left over of one answer is never read as the next one
            **headers,
        }
        url = httpcore.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path
        )
        trust = self._trust if target.scheme == "https" else None
        with (
            httpcore.ConnectionPool(ssl_context=trust, network_backend=self._backend) as pool,
            pool.stream(
                "POST",
                url,
                headers=[(name.encode("ascii", "replace"), _latin(value)) for name, value in sent.items()],
                content=body,
                extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self._timeout)},
            ) as response,
        ):
            found = {name.lower(): value for name, value in response.headers}
            return response.status, found, self._read(response)

    def _read(self, response: httpcore.Response) -> bytes:
        """The status has decided already: a body that is too long, too slow or torn is cut, and no error."""
        body = b""
        with contextlib.suppress(httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
            for chunk in response.iter_stream():
                body += chunk
                if len(body) >= self._most_bytes:
                    break
        return body[: self._most_bytes]

    def _refusal(self, shown: str, status: int, headers: Mapping[bytes, bytes], body: bytes) -> ChannelError:
        said = f": {body.strip().decode()}" if len(body) <= 64 and _WORD.fullmatch(body.strip()) else ""
        problem = f"{shown} answers {status}{said}"
        if status in _PASSING or 500 <= status < 600:
            wait = retry_after(headers.get(b"retry-after", b"").decode("latin-1"), now=self._now())
            return ChannelUnavailable(problem, cure="it is tried again", retry_after=wait)
        if 300 <= status < 400:
            return ChannelUnavailable(
                f"{problem}: a redirect, and none is followed", cure="put the address that it leads to into the rules"
            )
        cure = "see that the address is right, and that of a receiver of this type; its own log says what it misses"
        kind = ChannelError if status in _MESSAGE else ChannelUnavailable
        return kind(problem, cure=_CURES.get(status, cure))


def retry_after(value: str, *, now: float) -> float | None:
    """Seconds that a header Retry-After asks for (RFC 9110, 10.2.3), at most an hour; None where it says nothing."""
    value = value.strip()
    if re.fullmatch("[0-9]+", value, re.ASCII):
        return min(float(value[:9]), MOST_RETRY_AFTER)
    try:
        until = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
    return min(max(until - now, 0.0), MOST_RETRY_AFTER)


def _until_cured(error: ChannelError) -> ChannelUnavailable:
    """No message is at fault for an address: a name may lead elsewhere by and by, a file be put right."""
    return ChannelUnavailable(error.problem, cure=error.cure)


def _no_answer(shown: str, error: Exception) -> ChannelUnavailable:
    """Told by the kind of failure: what the library says may quote what was sent."""
    cause = error.args[0] if error.args else None  # so the library passes on what the system says
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ChannelUnavailable(
            f"{shown} shows a certificate that can't be trusted: {cause.verify_message}",
            cure="renew it; for a certificate authority of your own, SSL_CERT_FILE names what is trusted",
        )
    if isinstance(cause, ssl.SSLError):
        return ChannelUnavailable(f"{shown} does not speak TLS", cure="see that scheme and port are right")
    if isinstance(cause, OSError) and cause.strerror:
        return ChannelUnavailable(f"{shown} can't be reached: {cause.strerror}", cure="see whether it is up")
    if isinstance(error, httpcore.ProtocolError):
        return ChannelUnavailable(f"{shown} gives no proper HTTP answer", cure="see whether it is up, and the port")
    return ChannelUnavailable(f"{shown} can't be reached", cure="see whether it is up")


def _latin(value: str) -> bytes:
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        raise httpcore.LocalProtocolError from None
