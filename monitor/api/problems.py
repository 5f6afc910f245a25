"""What goes wrong, as RFC 9457 has it: `application/problem+json`, here with the cure. It knows no route.

Whatever a problem says may be logged by whoever receives it, so none ever quotes a request.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import Response

__all__ = ["Problem", "problem_response"]


class Problem(Exception):
    """An answer that is no success.

    Args:
        status: HTTP status.
        detail: what is wrong with this request; quotes nothing of it.
        cure: what its sender can do.
        retry_after: seconds after which it may come again.
        headers: more of them.
        members: more members of the body.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        cure: str,
        *,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        self.status = status
        self.detail = detail
        self.cure = cure
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        self.members = members
        super().__init__(detail)


def problem_response(problem: Problem) -> Response:
    """The problem as a response. Its type is `about:blank`: the status says what kind it is, `detail` the rest."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "cure": problem.cure,
        **problem.members,
    }
    return Response(
        msgspec.json.encode(body), problem.status, headers=problem.headers, media_type="application/problem+json"
    )
