"""Who may use a route: `needs(scope)`, on which every route depends that is not public. It knows keys, and no route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from monitor.api.auth import Key, Keys, Scope
from monitor.api.limits import Buckets, too_fast
from monitor.api.problems import Problem

__all__ = ["needs"]

_bearer = HTTPBearer(auto_error=False, description="A key as `anchorwatch keys create` prints it: `id.secret`.")


def needs(scope: Scope) -> Callable[..., Awaitable[Key]]:
    """What a route depends on to be for keys with this scope only; gives the key. Each request takes one from the
    key's bucket."""

    async def check(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Key:
        keys: Keys = request.app.state.keys
        buckets: Buckets = request.app.state.buckets
        key = keys.find(given.credentials if given else None)
        if key is None:
            raise Problem(
                401,
                "this needs a key" if given is None else "the key opens nothing",
                "send Authorization: Bearer id.secret, with a key of `anchorwatch keys create`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not key.may(scope):
            raise Problem(
                403,
                f"the key lacks the scope {scope}",
                f"anchorwatch keys create --scope {scope}",
                headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'},
            )
        if wait := buckets.take(key.id, 1):
            raise too_fast(wait)
        return key

    check.scope = scope  # type: ignore[attr-defined]  # for whoever walks the routes
    return check
