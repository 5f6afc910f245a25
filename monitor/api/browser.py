"""What a browser sends and is given, whatever the page says: forms, places to go back to, and the rules it must keep.

It knows no session, key or template.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, Request

from monitor.api.limits import Allowance, read_body
from monitor.api.problems import Problem

__all__ = ["HEADERS", "Form", "from_elsewhere", "here", "local", "read_form", "same_site"]

FORM_BYTES = 16_384
FORM_SECONDS = 10.0

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # ids never leave in a Referer
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


async def read_form(request: Request) -> dict[str, str]:
    """The form that was sent; of a field that comes twice the last.

    Raises:
        Problem: it came from another site, is none, is too long, or too slow.
    """
    same_site(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Problem(415, "this is no form", "send it from the page")
    with Allowance(FORM_BYTES + 1).share() as share:
        body = await read_body(
            request.stream(),
            request.headers.get("content-length"),
            most=FORM_BYTES,
            seconds=FORM_SECONDS,
            share=share,
        )
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=20))
    except ValueError:
        raise Problem(400, "the form can't be read", "send it from the page") from None


Form = Annotated[dict[str, str], Depends(read_form)]


def same_site(request: Request) -> None:
    """Refuse what another site has made a browser send. A browser that says nothing must have the form's token.

    Raises:
        Problem: it came from another site.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Problem(403, "this came from another site", "use the form on this page")


def from_elsewhere(request: Request) -> bool:
    """Whether somebody has followed a link on another site, so that the browser held a SameSite=Strict cookie back."""
    return request.method == "GET" and request.headers.get("sec-fetch-site") in ("cross-site", "same-site")


def here(request: Request, added: str = "") -> str:
    """The path and query that were asked for, as they came, with something `added` to the query."""
    path = (request.scope.get("raw_path") or request.url.path.encode()).decode("ascii", "replace")
    query = "&".join(filter(None, (request.scope.get("query_string", b"").decode("ascii", "replace"), added)))
    return local(f"{path}?{query}" if query else path)


def local(path: str) -> str:
    """A place on this page; for anything else its beginning, so that no link leads people elsewhere."""
    plain = path.isprintable() and path.isascii() and "\\" not in path
    return path if plain and path.startswith("/") and not path.startswith("//") else "/"
