"""The plain page: a list of sessions, one session, and the forms of whoever is on call. Rendered here, by no script.

It knows keys, cookies and templates; what is shown comes from `desk`, what a form asks for from `forms`. A route that
needs a key answers 401 with the form that asks for one, so that nothing is shown by a slip. Every form carries its
visit's token, and one that a browser says comes from another site is refused whatever it carries.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any, NamedTuple

import jinja2
import structlog
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute

from monitor.actions import ActionsFold, append_action, withdraw
from monitor.api import rim as _rim  # noqa: F401  # it gives routes `{conversation_id:id}`
from monitor.api import visit
from monitor.api.auth import ANYBODY, Key, Keys, Scope
from monitor.api.browser import HEADERS, Form, from_elsewhere, here, local, same_site
from monitor.api.desk import Desk, Links
from monitor.api.forms import SILENCES, asked
from monitor.api.problems import Problem
from monitor.api.views import KINDS, STATISTICS, STATUSES, Filters, address, ago, legible, utc
from monitor.errors import AnchorwatchError, ConfigurationError
from monitor.store import Backend
from monitor.stream.log import Log

__all__ = ["PUBLIC", "Links", "mount_page"]

# What needs no key: it shows nothing that is anybody's.
PUBLIC = {"/login", "/logout", "/static/{name}"}
STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
SINCE = {"1h": 3600.0, "24h": 86_400.0, "7d": 604_800.0, "any": None}

_log = structlog.get_logger("anchorwatch.page")


class Page(NamedTuple):
    """What the routes share; see `mount_page`."""

    log: Log
    store: Backend
    desk: Desk
    templates: jinja2.Environment
    secret: bytes
    links: Links
    clock: Callable[[], float]


def mount_page(
    app: FastAPI,
    log: Log,
    store: Backend,
    *,
    secret: bytes,
    links: Links = Links(),  # noqa: B008  # frozen
    idle_after: float = 1800.0,
    clock: Callable[[], float] = time.time,
) -> None:
    """Give the application its page. `app.state.keys` says who may look.

    Args:
        log: what people do is written there.
        store: what is shown; what is written is taken into it at once, where it answers.
        secret: what cookies are signed with; the same in every replica.
        idle_after: seconds of silence after which an open episode counts as over; the dispatcher has the same.
        clock: wall clock, seconds since 1970.
    """
    desk = Desk(store, links=links, idle_after=idle_after, clock=clock)
    app.state.page = Page(log, store, desk, _templates(), secret, links, clock)
    app.include_router(router)


# Who is looking


class Visit(NamedTuple):
    """Whoever is looking: the key, their cookie, and whether the browser does not have it yet."""

    key: Key
    cookie: str
    fresh: bool


class Refused(Exception):
    """Nobody who may is looking; `why` is told above the form that asks for a key."""

    def __init__(self, status: int, why: str = "") -> None:
        self.status = status
        self.why = why
        super().__init__(why)


def looking(scope: Scope) -> Callable[[Request], Awaitable[Visit]]:
    """What a route depends on to be for visits with this scope only."""

    async def check(request: Request) -> Visit:
        page: Page = request.app.state.page
        keys: Keys = request.app.state.keys
        cookie = request.cookies.get(visit.COOKIE, "")
        key = keys.known(visit.key_id(cookie))
        now = page.clock()
        fresh = key is None or not visit.continues(page.secret, cookie, key, now)
        if keys.open:
            key = ANYBODY
        elif key is None or fresh:
            raise Refused(401, "Your visit has ended." if cookie else "")
        if not key.may(scope):
            raise Refused(403, f"The key “{legible(key.name)}” may not do this: it lacks the scope {scope}.")
        return Visit(key, visit.begin(page.secret, key, now) if fresh else cookie, fresh)

    check.scope = scope  # type: ignore[attr-defined]  # for whoever walks the routes
    return check


Reading = Annotated[Visit, Depends(looking("read"))]
Acting = Annotated[Visit, Depends(looking("act"))]


class _Told(APIRoute):
    """A route whose failures are pages, too."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """See `APIRoute`."""
        handle: Any = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                response: Response = await handle(request)
            except Refused as refused:
                # A link from another site brings no SameSite=Strict cookie: come once more, from here.
                again = refused.status == 401 and from_elsewhere(request) and "again" not in request.query_params
                jump = here(request, "again=1") if again else ""
                response = _ask(request, refused.status, refused.why, here(request), jump)
            except Problem as problem:
                response = _sorry(request, problem.status, problem.detail, problem.cure)
            except ConfigurationError as error:
                response = _sorry(request, 422, error.problem, error.cure)
            except AnchorwatchError as error:
                _log.warning("a page could not be shown", problem=error.problem)
                response = _sorry(request, 503 if error.retry else 500, error.problem, error.cure)
            return response

        return told


router = APIRouter(route_class=_Told, include_in_schema=False)

# What is shown


@router.get("/")
def overview(
    request: Request,
    visitor: Reading,
    deployment: str = "",
    model: str = "",
    status: str = "",
    since: str = "24h",
    page: str = "1",
) -> Response:
    """The list. What it is asked for and does not know counts as not asked."""
    since = since if since in SINCE else "24h"
    wanted = Filters(deployment, model, status if status in STATUSES else "", SINCE[since])
    number = int(page) if page.isascii() and page.isdecimal() and len(page) < 9 else 1
    desk: Desk = request.app.state.page.desk
    return _see(request, visitor, "sessions.html.jinja", since=since, **desk.overview(wanted, number))


@router.get("/sessions")
def find(request: Request, visitor: Reading, id: str = "") -> Response:
    """The same as `session`, for an id that somebody types, or that no path can hold."""
    return session(request, visitor, id.strip() or id) if id else RedirectResponse("/", 303, HEADERS)


@router.get("/sessions/{conversation_id:id}")
def session(request: Request, visitor: Reading, conversation_id: str) -> Response:
    """One session."""
    found = request.app.state.page.desk.session(conversation_id)
    if found is None:
        return _see(request, visitor, "missing.html.jinja", 404, conversation_id=conversation_id)
    return _see(request, visitor, "session.html.jinja", hours=SILENCES, **found)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """The style sheet, the script and the icon."""
    if name not in STATIC:
        raise Problem(404, "there is nothing here", "go to the list of sessions")
    data = (files("monitor.api") / "static" / name).read_bytes()
    return Response(data, media_type=STATIC[name], headers=HEADERS | {"Cache-Control": "no-cache"})


# What is done


@router.post("/act")
def act(request: Request, form: Form, visitor: Acting) -> Response:
    """Do what a form asks for, and go back to where it was. When this answers, it is safe in the log."""
    page: Page = request.app.state.page
    if visitor.fresh or not visit.token_matches(page.secret, visitor.cookie, form.get("token", "")):
        raise Problem(403, "the form was made for another visit", "go back, load the page again, and repeat it")
    wanted = asked(form, page.clock())
    if wanted.body is None:
        withdraw(page.log, wanted.kind, [wanted.name])
    else:
        append_action(page.log, wanted.kind, wanted.name, wanted.body, by=visitor.key.name)
    said = wanted.said if _taken_in(page) else "written"
    conversation = form.get("conversation", "")
    return RedirectResponse(address(conversation, done=said) if conversation else f"/?done={said}", 303, HEADERS)


@router.get("/login")
async def login_form(request: Request) -> Response:
    """Ask for a key."""
    return _ask(request, 200, "", "/")


@router.post("/login")
async def login(request: Request, form: Form) -> Response:
    """Begin a visit, and go where somebody wanted to be."""
    page: Page = request.app.state.page
    back = local(form.get("next", ""))
    key = request.app.state.keys.find(form.get("key", "").strip())
    if key is None:
        return _ask(request, 401, "This key opens nothing.", back)
    if not key.may("read"):
        return _ask(request, 403, "This key may not look: it lacks the scope read.", back)
    response = RedirectResponse(back, 303, HEADERS)
    _give(response, request, visit.begin(page.secret, key, page.clock()))
    return response


@router.post("/logout")
async def logout(request: Request) -> Response:
    """Take the cookie back."""
    same_site(request)
    response = RedirectResponse("/login", 303, HEADERS)
    response.delete_cookie(visit.COOKIE, path="/")
    return response


def _taken_in(page: Page) -> bool:
    """Take what was written into the store, so that the next page shows it; else a worker does, when it runs."""
    fold = ActionsFold(page.log, page.store)
    try:
        while fold.run_once():
            pass
    except AnchorwatchError as error:
        _log.warning("an action is written, and not yet in the store", problem=error.problem)
        return False
    return True


# How it is written


def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("monitor.api"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        legible=legible,
        ago=ago,
        utc=utc,
        address=address,
        number=lambda value: "–" if value is None else f"{value:.2f}".replace("-", "−"),
    )
    made.globals.update(KINDS=KINDS, STATISTICS=STATISTICS, STATUSES=STATUSES)
    return made


def _html(request: Request, template: str, status: int, **context: Any) -> Response:
    page: Page = request.app.state.page
    text = page.templates.get_template(template).render(here=here(request), **context)
    # A query may bring halves of letters, which no UTF-8 has.
    return HTMLResponse(text.encode(errors="replace"), status, headers=HEADERS)


def _see(request: Request, visitor: Visit, template: str, status: int = 200, **context: Any) -> Response:
    """A page for whoever may look."""
    response = _html(
        request,
        template,
        status,
        who=visitor.key.name,
        asked_for_key=visitor.key is not ANYBODY,
        may_act=visitor.key.may("act"),
        token=visit.token(request.app.state.page.secret, visitor.cookie),
        done=request.query_params.get("done", ""),
        **context,
    )
    if visitor.fresh:
        _give(response, request, visitor.cookie)
    return response


def _ask(request: Request, status: int, why: str, back: str, jump: str = "") -> Response:
    """The form that asks for a key. With `jump` the browser goes there first."""
    response = _html(request, "login.html.jinja", status, why=why, back=back, jump=jump)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _sorry(request: Request, status: int, problem: str, cure: str) -> Response:
    return _html(request, "problem.html.jinja", status, problem=problem, cure=cure)


def _give(response: Response, request: Request, cookie: str) -> None:
    # Behind a proxy that has TLS we see plain HTTP; whoever forges the header deprives only himself.
    secure = (
        request.url.scheme == "https"
        or request.app.state.page.links.page_url.startswith("https:")
        or request.headers.get("x-forwarded-proto") == "https"
    )
    response.set_cookie(
        visit.COOKIE, cookie, max_age=visit.SECONDS, path="/", secure=secure, httponly=True, samesite="strict"
    )
