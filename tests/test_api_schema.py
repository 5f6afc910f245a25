"""Schemathesis over the whole OpenAPI document, on a real SQLite and a real Redis.

Without a key, with a wrong one and with every key that lacks the scope, whatever is sent gets 401 or 403. With the key,
whatever is sent, well or badly formed, gets an answer that the document has, in the form that it has, and no fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from interface import STORES, Interface, interface, open_store
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service import message, projection, traffic
from test_api_operators import one

from monitor.api.app import PUBLIC
from monitor.api.auth import SCOPES, create_key, revoke_key

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ENDLESS = "/v1/findings/stream"


@pytest.fixture(scope="module", params=STORES)
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_redis: str
) -> Iterator[Interface]:
    folder = tmp_path_factory.mktemp(request.param)
    with interface(folder, open_store(request.param, folder, shared_redis), rate=1e9, items=10) as running:
        running.fold(traffic(10, 10))
        running.fold([message(projection("0", turn, -2.0 * turn)) for turn in range(4)])
        running.alert(one("0"), one("1", firing=False))
        yield running


def operations(api: Interface) -> list[Any]:
    document = httpx.get(f"{api.url}/openapi.json").json()
    found = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(found) == 21
    return found


def try_all(operation: Any, examples: int, modes: list[GenerationMode], check: Callable[[Any], None]) -> None:
    """Show the check so many cases, the same in every run. What is found is shown as it was: shrinking takes long."""
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @seed(0)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
        database=None,
    )
    @given(case=cases)
    def run(case: Any) -> None:
        check(case)

    run()


def send(client: httpx.Client, case: Any, headers: dict[str, str]) -> httpx.Response:
    """Send a case as it is. Schemathesis' own way looks into urllib3, whose place another library may have taken."""
    prepared = requests.Request(**case.as_transport_kwargs(base_url=str(client.base_url))).prepare()
    assert prepared.method and prepared.url
    return client.request(prepared.method, prepared.url, headers={**prepared.headers, **headers}, content=prepared.body)


def can_be_wrong(operation: Any) -> list[GenerationMode]:
    """Where there is nothing to say, nothing can be said badly."""
    anything = [*operation.query, *operation.body, *operation.headers]
    return [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if anything else [GenerationMode.POSITIVE]


def test_without_the_right_key_there_is_nothing_but_401_and_403(api: Interface) -> None:
    revoked = create_key(api.keys, "revoked", ["admin"])
    revoke_key(api.keys, revoked.partition(".")[0])
    asked = 0
    with httpx.Client(base_url=api.url, timeout=60) as client:
        for operation in operations(api):
            if operation.path in PUBLIC:
                continue
            needed = operation.definition.raw["x-scope"]
            wrong: dict[str, int] = {"": 401, "Basic YTpi": 401, "Bearer x.y": 401, f"Bearer {revoked}": 401}
            wrong |= {f"Bearer {api.tokens[scope]}": 403 for scope in SCOPES if scope not in (needed, "admin")}

            def refused(case: Any, wrong: dict[str, int] = wrong) -> None:
                nonlocal asked
                for authorization, status in wrong.items():
                    answer = send(client, case, {"Authorization": authorization})
                    assert answer.status_code == status, (case.method, case.path, authorization[:9], answer.text)
                    asked += 1

            try_all(operation, 5, can_be_wrong(operation), refused)
    assert asked > 300


def test_with_the_key_every_answer_is_one_that_the_document_has(api: Interface) -> None:
    seen: dict[str, set[int]] = {}
    with httpx.Client(base_url=api.url, timeout=60) as client:
        for operation in operations(api):
            if operation.path == ENDLESS:
                continue

            def fine(case: Any, name: str = operation.label) -> None:
                answer = send(client, case, {"Authorization": f"Bearer {api.tokens['admin']}"})
                case.validate_response(answer, checks=CHECKS)
                seen.setdefault(name, set()).add(answer.status_code)

            try_all(operation, 15, can_be_wrong(operation), fine)
    # It has come through to the routes, and not only to what refuses.
    assert all(statuses & {200, 201, 202, 204, 404} for statuses in seen.values()), seen
    assert (
        {200, 422} <= seen["GET /v1/sessions"]
        and 201 in seen["POST /v1/silences"]
        and 202 in seen["POST /v1/projections"]
    )


def test_the_documents_examples_are_what_it_says_and_work(api: Interface) -> None:
    from jsonschema import Draft202012Validator

    document = httpx.get(f"{api.url}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    checked = 0
    with api.client("admin") as client:
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                assert operation["summary"] and operation["description"] and operation["operationId"]
                contents = [operation.get("requestBody", {}), *operation["responses"].values()]
                for content in contents:
                    for media in content.get("content", {}).values():
                        if "example" in media:
                            schema = media["schema"] | {"components": document["components"]}
                            Draft202012Validator(schema).validate(media["example"])
                            checked += 1
                sent = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
                if sent is not None:
                    where = path.replace("{conversation_id}", "0").replace("{alert_id}", "0")
                    answer = client.request(method, where, json=sent)
                    assert answer.status_code in (200, 201, 202), (path, answer.text)
    assert checked > 20
    assert "monitor." not in json.dumps([list(document["paths"])])
