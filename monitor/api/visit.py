"""A browser's visit: a signed cookie that stands for a key which was shown once, and the token of its forms. Pure.

It knows no request. The cookie holds the key's id, never its secret, and ends after one shift, when the key is revoked,
or when the installation's key changes. Nothing is kept here, so any replica knows a visit that another one began.

The token is a second hash of the cookie, in every form: another site can make a browser send the cookie (it is
SameSite=Strict, but old browsers are about), and can't read the token.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from monitor.api.auth import Key

__all__ = ["COOKIE", "SECONDS", "begin", "continues", "key_id", "token", "token_matches"]

COOKIE = "anchorwatch"
SECONDS = 12 * 3600


def begin(secret: bytes, key: Key, now: float) -> str:
    """A new visit's cookie; `now` in seconds since 1970."""
    claim = f"{key.id}.{int(now) + SECONDS}.{secrets.token_hex(8)}"
    return f"{claim}.{_mac(secret, 'visit', claim, key.sha256)}"


def key_id(cookie: str) -> str:
    """Whose visit the cookie says it is; nothing is checked."""
    return cookie.partition(".")[0]


def continues(secret: bytes, cookie: str, key: Key, now: float) -> bool:
    """Whether the cookie is of a visit with this key that has not ended."""
    claim, _, mac = cookie.rpartition(".")
    parts = claim.split(".")
    return (
        len(parts) == 3
        and parts[0] == key.id
        and _same(mac, _mac(secret, "visit", claim, key.sha256))
        and int(parts[1]) > now
    )


def token(secret: bytes, cookie: str) -> str:
    """What every form of this visit carries."""
    return _mac(secret, "form", cookie)


def token_matches(secret: bytes, cookie: str, given: str) -> bool:
    """Whether a form was made for this visit."""
    return _same(given, token(secret, cookie))


def _mac(secret: bytes, *parts: str) -> str:
    text = "\x1f".join(("anchorwatch page", *parts))
    return hmac.new(secret, text.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode())
