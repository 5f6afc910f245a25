"""Keys for the HTTP interface: `id.secret`, of which only a hash is kept, and what each key is allowed to do.

It knows nothing of HTTP. Keys live in one JSON file, mode 0600, which the command line edits and a running server reads
again when it changes: a key that is revoked stops working with the next request.

The hash is one SHA-256, and no slow one: the secret is 256 random bits, which nobody guesses at any speed. Slow hashes
are for passwords that people choose; here one would only let strangers burn our processor.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import msgspec
import structlog
from msgspec import Struct

from monitor.errors import ConfigurationError
from monitor.events import now_utc

__all__ = ["SCOPES", "Key", "Keys", "Scope", "create_key", "read_keys", "revoke_key"]

# ingest: post projections. read: what people and dashboards see. act: acknowledge, mute, judge. admin: all of it.
Scope = Literal["ingest", "read", "act", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

SECRET_BYTES = 32
_log = structlog.get_logger("anchorwatch.auth")


class Key(Struct, frozen=True, kw_only=True):
    """One key, without its secret.

    Attributes:
        id: public part, 16 hex digits; log lines may name it.
        name: what people call it.
        scopes: what it may do.
        sha256: hash of its secret, in hex.
        created, revoked: RFC 3339 in UTC. A revoked key stays listed and opens nothing.
    """

    id: str
    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created: str
    revoked: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether it is allowed to do this."""
        return scope in self.scopes or "admin" in self.scopes


class _File(Struct, frozen=True):
    keys: list[Key]
    version: Literal[1] = 1


# What an open server takes everybody for.
ANYBODY = Key(id="anybody", name="no key", scopes=("admin",), sha256="", created="")
_Stamp = tuple[int, int, int, int]


class Keys:
    """The keys of a running server. For one thread.

    Args:
        path: their file. One that is missing holds no keys.
        open_without: let everybody in as long as the file has never held a key. For loopback only.

    Raises:
        ConfigurationError: the file is damaged, or other users can read it.
    """

    def __init__(self, path: Path, *, open_without: bool = False) -> None:
        self._path = path
        self._open = open_without
        self._stamp: _Stamp | None = None
        self._keys: dict[str, Key] = {}
        self._load()

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return self._open

    def find(self, token: str | None) -> Key | None:
        """The key that `id.secret` opens; None where it opens none. Looks at the file first."""
        self._refresh()
        if self._open:
            return ANYBODY
        identifier, _, secret = (token or "").partition(".")
        key = self._keys.get(identifier)
        # As long for a stranger's key as for one of ours.
        matches = hmac.compare_digest(_hash(secret), key.sha256 if key else _hash(""))
        return key if key and matches and key.revoked is None else None

    def known(self, identifier: str) -> Key | None:
        """The key with this id while it opens anything: for whoever has shown it before. Looks at the file first."""
        self._refresh()
        if self._open:
            return ANYBODY
        key = self._keys.get(identifier)
        return key if key and key.revoked is None else None

    def _refresh(self) -> None:
        if _stamp(self._path) != self._stamp:
            try:
                self._load()
            except ConfigurationError as error:
                # Our own command never leaves half a file, so this is somebody's slip: it must not lock everybody out.
                _log.error("the keys file can't be used: the keys read before stay in force", problem=error.problem)

    def _load(self) -> None:
        self._stamp = _stamp(self._path)  # before reading: what changes meanwhile is read again
        self._keys = {key.id: key for key in read_keys(self._path)}
        if self._keys:
            self._open = False  # for good: a file that is lost later must not open the door


def read_keys(path: Path) -> list[Key]:
    """All keys in the file, revoked ones too; none where there is no file.

    Raises:
        ConfigurationError: it can't be read, is damaged, or other users can read it.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigurationError(
            f"the keys file {path} can't be read: {error.strerror}", cure="let this user read ANCHORWATCH_API_KEYS_FILE"
        ) from error
    if mode & 0o077:
        raise ConfigurationError(f"other users can read the keys file {path}", cure=f"chmod 600 {path}")
    try:
        return msgspec.json.decode(data, type=_File).keys
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the keys file {path} is damaged: {error}",
            cure="restore it from a copy, or move it aside and create the keys anew",
        ) from error


def create_key(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Add a key to the file and give it as `id.secret`. This is the only time that anybody sees the secret.

    Raises:
        ConfigurationError: no scope, an unknown one, no name, or the file can't be used.
    """
    if not scopes or not set(scopes) <= set(SCOPES) or not 0 < len(name) <= 64:
        raise ConfigurationError(
            f"a key needs a name of at most 64 characters, and at least one scope of {', '.join(SCOPES)}",
            cure="anchorwatch keys create --name collector-1 --scope ingest",
        )
    secret = secrets.token_urlsafe(SECRET_BYTES)
    key = Key(
        id=secrets.token_hex(8),
        name=name,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        sha256=_hash(secret),
        created=now_utc(),
    )
    with _editing(path) as edit:
        edit(lambda keys: [*keys, key])
    return f"{key.id}.{secret}"


def revoke_key(path: Path, identifier: str) -> Key:
    """Make a key useless from its next request on.

    Raises:
        ConfigurationError: there is no such key, or the file can't be used.
    """
    with _editing(path) as edit:
        found = [key for key in read_keys(path) if key.id == identifier]
        if not found:
            raise ConfigurationError(f"no key has the id {identifier!r}", cure="anchorwatch keys list")
        revoked = found[0] if found[0].revoked else msgspec.structs.replace(found[0], revoked=now_utc())
        edit(lambda keys: [revoked if key.id == identifier else key for key in keys])
    return revoked


_Edit = Callable[[Callable[[list[Key]], list[Key]]], None]


@contextmanager
def _editing(path: Path) -> Iterator[_Edit]:
    """One editor at a time; a reader sees the old file or the new one, never half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        guard = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"the keys file {path} can't be written: {error.strerror}",
            cure="let this user write to the folder of ANCHORWATCH_API_KEYS_FILE",
        ) from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield lambda change: _replace(path, change(read_keys(path)))
    finally:
        os.close(guard)


def _replace(path: Path, keys: list[Key]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(_File(keys=keys)), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _stamp(path: Path) -> _Stamp | None:
    """What tells one version of a file from the next; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
