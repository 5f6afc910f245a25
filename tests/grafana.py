"""A Grafana that isn't one: a recording HTTP receiver with the answers that Grafana documents, and a memory.

Paths, fields and status codes are those of Grafana 11's documentation of its HTTP API: the pages on dashboards,
folders, data sources, annotations, and "Other" for health. No Grafana was asked.
"""

from __future__ import annotations

import copy
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from receiver import Answer, Received, Receiver

TOKEN = "glsa_" + "0123456789abcdef" * 2
PROMETHEUS = {
    "id": 1,
    "uid": "P1809F7CD0C75ACF3",
    "orgId": 1,
    "name": "prometheus",
    "type": "prometheus",
    "typeLogoUrl": "public/app/plugins/datasource/prometheus/img/prometheus_logo.svg",
    "access": "proxy",
    "url": "http://prometheus:9090",
    "isDefault": True,
    "jsonData": {},
    "readOnly": False,
}


class DocumentedGrafana:
    """Attributes:
    url, received: the receiver's.
    dashboards: uid → what Grafana keeps: `dashboard` and `meta`.
    folders, annotations, sources: the same of these.
    fails: method and path → the answer to give instead.
    """

    def __init__(self) -> None:
        self._receiver = Receiver()
        self._receiver.answer = self._answer
        self.url = self._receiver.url
        self.received = self._receiver.received
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.folders: dict[str, dict[str, Any]] = {}
        self.annotations: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = [copy.deepcopy(PROMETHEUS)]
        self.fails: dict[tuple[str, str], Answer] = {}

    def writes(self) -> list[Received]:
        return [one for one in self.received if one.method != "GET"]

    def close(self) -> None:
        self._receiver.close()

    def _answer(self, request: Received) -> Answer:
        path = urlsplit(request.path).path
        if (request.method, path) in self.fails:
            return self.fails[request.method, path]
        if path == "/api/health":  # asked without a token, too
            return _json(200, {"commit": "9d3c0bd", "database": "ok", "version": "11.6.0"})
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _json(401, {"message": "Invalid API key", "messageId": "api-key.invalid", "statusCode": 401})
        match request.method, path.removeprefix("/api").split("/")[1:]:
            case "GET", ["datasources"]:
                return _json(200, self.sources)
            case "GET", ["folders", uid] if uid in self.folders:
                return _json(200, self.folders[uid])
            case "GET", ["folders", _]:
                return _json(404, {"message": "folder not found", "status": "not-found"})
            case "POST", ["folders"]:
                return self._new_folder(request.json)
            case "GET", ["dashboards", "uid", uid] if uid in self.dashboards:
                return _json(200, self.dashboards[uid])
            case "GET", ["dashboards", "uid", _]:
                return _json(404, {"message": "Dashboard not found"})
            case "POST", ["dashboards", "db"]:
                return self._save(request.json)
            case "GET", ["annotations"]:
                return _json(200, self._found(parse_qs(urlsplit(request.path).query)))
            case "POST", ["annotations"]:
                made = {"id": len(self.annotations) + 1, "timeEnd": request.json["time"], **request.json}
                self.annotations.append({key: value for key, value in made.items() if value is not None})
                return _json(200, {"message": "Annotation added", "id": made["id"]})
        return _json(404, {"message": "Not found"})

    def _new_folder(self, asked: dict[str, Any]) -> Answer:
        if asked["uid"] in self.folders:
            return _json(409, {"message": "a folder with that name already exists"})
        made = {"id": len(self.folders) + 1, "url": f"/dashboards/f/{asked['uid']}/", "version": 1, **asked}
        self.folders[asked["uid"]] = made
        return _json(200, made)

    def _save(self, asked: dict[str, Any]) -> Answer:
        dashboard = asked["dashboard"]
        there = self.dashboards.get(dashboard["uid"])
        if there is not None and not asked["overwrite"] and dashboard.get("version") != there["dashboard"]["version"]:
            says = "The dashboard has been changed by someone else"
            return _json(412, {"message": says, "status": "version-mismatch"})
        if asked["folderUid"] not in self.folders:
            return _json(400, {"message": "folder not found"})
        version = 1 if there is None else there["dashboard"]["version"] + 1
        number = len(self.dashboards) + 1 if there is None else there["dashboard"]["id"]
        self.dashboards[dashboard["uid"]] = {
            "dashboard": {**dashboard, "id": number, "version": version},
            "meta": {"isStarred": False, "folderUid": asked["folderUid"], "url": f"/d/{dashboard['uid']}/"},
        }
        return _json(
            200,
            {"id": number, "uid": dashboard["uid"], "status": "success", "version": version, "slug": "x", "url": ""},
        )

    def _found(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        begin, end = int(query["from"][0]), int(query["to"][0])
        found = [
            one
            for one in self.annotations
            if begin <= one["time"] <= end and set(query.get("tags", [])) <= set(one["tags"])
        ]
        return found[: int(query.get("limit", ["100"])[0])]


def _json(status: int, body: Any) -> Answer:
    return Answer(status, json.dumps(body).encode(), {"content-type": "application/json; charset=UTF-8"})
