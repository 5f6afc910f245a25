"""Keys, each the only content of a file. They are read when they are used, so that a file may be replaced any time.

It knows no protocol. No error and no repr shows what a file holds.
"""

from __future__ import annotations

from pathlib import Path

from monitor.errors import ChannelUnavailable

__all__ = ["MOST_BYTES", "read_secret"]

MOST_BYTES = 16 * 1024


def read_secret(path: Path) -> str:
    """The one line that the file holds, without the blanks around it.

    Raises:
        ChannelUnavailable: it can't be read now, or holds something else; it may be put right while one waits.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ChannelUnavailable(
            f"the file of a key, {path}, can't be read: {error.strerror}",
            cure="put the key there, readable for this user",
        ) from None
    try:
        secret = data.decode().strip()
    except UnicodeDecodeError:
        secret = ""
    if not secret or len(data) > MOST_BYTES or not secret.isprintable():
        raise ChannelUnavailable(
            f"{path} holds no key", cure="the key alone belongs there, as text, in one line"
        ) from None
    return secret
