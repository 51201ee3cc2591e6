"""What tests need of W&B: a service that answers on this machine, and a reader of the files of offline runs."""

from __future__ import annotations

import gzip
import json
import re
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0" * 40
BLOCK, HEADER = 32768, 7


class Service(ThreadingHTTPServer):
    """As much of W&B's API as a run needs. Keeps each run's config, summary and history lines by their number."""

    daemon_threads = True

    def __init__(self, refuses: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses  # the operation that fails
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Clients hang up as they like."""

    def rows(self, run: str) -> list[dict[str, Any]]:
        """History of a run in order."""
        return [row for _, row in sorted(self.history[run].items())]

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL query."""
        self.asked.append((operation, asked))
        if operation == self.refuses:
            raise PermissionError(operation)
        project = {"id": "p", "name": asked.get("project") or "p", "entity": {"id": "e", "name": "me"}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            return {"model": project | {"bucket": self._resumed(asked["name"])}}
        if operation == "UpsertBucket":
            new = asked["name"] not in self.runs
            run = self.runs.setdefault(asked["name"], {})
            run |= {name: value for name, value in asked.items() if value is not None}
            bucket = {
                "id": "b", "name": asked["name"], "displayName": asked["name"], "description": "",
                "config": run.get("config") or "{}", "sweepName": None, "project": project,
                "historyLineCount": len(self.history.get(asked["name"], {})),
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in asked["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":  # as if it was there already
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "ArtifactType":
            return {"project": None}
        return {}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        run, rows = self.runs.get(name), self.history.get(name, {})
        if run is None:
            return None
        last = rows[max(rows)] if rows else {}
        return {
            "id": "b", "name": name, "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)]), "eventsTail": "[]", "config": run.get("config") or "{}",
            "summaryMetrics": run.get("summaryMetrics") or "{}", "tags": run.get("tags") or [],
            "wandbConfig": json.dumps({"t": 1}),  # it was started
        }  # fmt: skip

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Lines of a run's files, at the offsets that they come with."""
        sent = files.get("wandb-history.jsonl")
        if sent:
            rows = self.history.setdefault(run, {})
            rows |= {sent["offset"] + i: json.loads(line) for i, line in enumerate(sent["content"])}
        for line in (files.get("wandb-summary.json") or {}).get("content", []):
            self.runs.setdefault(run, {})["summaryMetrics"] = line


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.startswith("/files/"):
            self.server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self._reply({"limits": {}})
        elif self.path == "/graphql":
            asked = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            try:
                data = self.server.answer(named[1] if named else "", asked.get("variables") or {})
                self._reply({"data": data})
            except PermissionError as error:
                self._reply({"errors": [{"message": f"{error} is not allowed"}]}, 403)
        else:
            self._reply({})

    do_PUT = do_GET = do_POST  # noqa: N815

    def _reply(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def records(path: Path) -> Iterator[Any]:
    """W&B's records in a ``.wandb`` file: LevelDB's log format after seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_run(path: Path) -> dict[str, Any]:
    """Id, group, tags, config, history rows and summary that a ``.wandb`` file holds."""
    import wandb

    wandb.teardown()  # which waits for what its service has not yet written
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
    for record in records(path):
        if record.HasField("run"):
            found |= {"id": record.run.run_id, "group": record.run.run_group, "tags": list(record.run.tags)}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            found["history"].append({_name(item): json.loads(item.value_json) for item in record.history.item})
        elif record.HasField("summary"):
            found["summary"] |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
    return found


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
