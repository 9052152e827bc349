"""A stand-in for the W&B service, on this machine's loopback interface, for the real `wandb` client.

It proves the client's side only: what the client sends, that it is content with plausible answers, and what it says
when the server is gone. It validates no schema, renders nothing and has one user; a field that it does not know is
null. Which requests matter was found by running wandb 0.31 and wandb-workspaces 0.4 against it.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import math
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
import yaml

from support.graphql import execute

ENTITY = "me"
KEY = "0123456789abcdef" * 2 + "01234567"
TIME = "2024-01-01T00:00:00Z"
Node = dict[str, Any]


@dataclass
class Run:
    """What the server holds of one run."""

    id: str
    entity: str
    project: str
    name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    sweep: str | None = None
    program: str | None = None
    notes: str | None = None
    logged_config: Node = field(default_factory=dict)
    #: as `wandb.Api` gives them back: rows with `_step`
    history: list[Node] = field(default_factory=list)
    events: list[Node] = field(default_factory=list)
    summary: Node = field(default_factory=dict)
    output: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    #: running, finished, failed or preempted
    state: str = "running"
    exit_code: int | None = None
    preempting: bool = False
    #: how often a process said that it writes to this run
    begun: int = 0

    @property
    def config(self) -> Node:
        """The config as it was given to ``wandb.init``."""
        return {key: item["value"] for key, item in self.logged_config.items() if key != "_wandb"}

    def column(self, key: str) -> list[Any]:
        """The values of a key of the history, where there is one."""
        return [row[key] for row in self.history if key in row]


@dataclass
class Artifact:
    id: str
    name: str
    type: str
    run: str
    digest: str
    aliases: list[str]
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Sweep:
    id: str
    entity: str
    project: str
    config: Node
    text: str
    #: the parameters of each run that an agent was given, in order
    given: list[Node] = field(default_factory=list)
    state: str = "RUNNING"

    def __post_init__(self) -> None:
        self.points = _points(self.config)

    def next(self) -> Node | None:
        """The next run's parameters, or None at the end of a grid or at ``run_cap``."""
        cap = self.config.get("run_cap", math.inf)
        point = next(self.points, None) if len(self.given) < cap else None
        if point is None:
            self.state = "FINISHED"
        else:
            self.given.append(point)
        return point


def _points(config: Node) -> Iterator[Node]:
    """A grid in the order of the file. Any other method is random here: bayes, too, learns nothing."""
    parameters: dict[str, Node] = config["parameters"]
    if config["method"] == "grid":
        axes = [[spec["value"]] if "value" in spec else spec["values"] for spec in parameters.values()]
        for values in itertools.product(*axes):
            yield dict(zip(parameters, values, strict=True))
        return
    generator = random.Random(0)
    while True:
        yield {name: _draw(spec, generator) for name, spec in parameters.items()}


def _draw(spec: Node, generator: random.Random) -> Any:
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return generator.choice(spec["values"])
    low, high = spec["min"], spec["max"]
    distribution = spec.get("distribution", "int_uniform" if isinstance(low, int) else "uniform")
    if distribution == "int_uniform":
        return generator.randint(low, high)
    if distribution == "uniform":
        return generator.uniform(low, high)
    if distribution == "log_uniform_values":
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    raise ValueError(f"the stand-in draws from no {distribution}")


class WandbServer:
    """The service while the context is open; what it was sent is in its attributes."""

    def __init__(self) -> None:
        #: by id
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        #: reports and workspaces by id, as GraphQL gives them; ``spec`` is JSON text
        self.views: dict[str, Node] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.projects: dict[tuple[str, str], Node] = {}
        self.agents: dict[str, str] = {}
        #: how often each field of Query or Mutation was asked for
        self.calls: Counter[str] = Counter()
        #: what went wrong inside of the server: tests assert that there is nothing
        self.errors: list[str] = []
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        #: instead of answers, while it is set: an HTTP status and the message of a GraphQL error
        self.refusal: tuple[int, str] | None = None
        self._handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _Http(("127.0.0.1", 0), self._handler)
        self._thread = self._serving()

    def _serving(self) -> threading.Thread:
        return threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if the machine had gone away: connections are cut, and refused from now on."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()
        self._http.cut()

    def come_back(self) -> None:
        """After ``stop``: at the same address, with all that it knew."""
        self._http = _Http(self._http.server_address, self._handler)
        self._thread = self._serving()
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def environment(self, directory: Path) -> dict[str, str]:
        """Variables with which the client talks to this server and keeps its files in ``directory``."""
        names = ("", "DATA_", "CACHE_", "CONFIG_", "ARTIFACT_")
        directories = {f"WANDB_{name}DIR": str(directory / f"wandb_{name}".lower().rstrip("_")) for name in names}
        for path in directories.values():
            Path(path).mkdir(parents=True, exist_ok=True)
        return {
            **directories,
            # an agent starts "python"
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "WANDB_BASE_URL": self.url,
            "WANDB_APP_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_MODE": "online",
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",
        }

    def run(self) -> Run:
        """The only run."""
        (run,) = self.runs.values()
        return run

    # --- GraphQL -----------------------------------------------------------------------------------------------------

    def graphql(self, document: str, variables: Mapping[str, Any]) -> Node:
        with self._lock:
            return execute(document, _without_nulls(variables), _Counted(self._root(), self.calls))

    def _root(self) -> dict[str, Callable[[Node], Any]]:
        def on_input(answer: Callable[[Node], Any]) -> Callable[[Node], Any]:
            return lambda arguments: answer(arguments["input"])

        return {
            # queries
            "viewer": lambda _: self._user(),
            "entity": lambda a: {"id": "entity", "name": a.get("name"), "__typename": "Entity"},
            "serverInfo": lambda _: {"features": []},
            "project": lambda a: self._project(a.get("entityName"), a.get("name")),
            "model": lambda a: self._project(a.get("entityName"), a.get("name")),
            "models": lambda a: _connection([p for (e, _), p in self.projects.items() if e == a["entityName"]]),
            "view": lambda a: self.views.get(a["id"]),
            # mutations
            "upsertBucket": on_input(self._upsert_run),
            "createRunFiles": on_input(self._create_run_files),
            "createArtifact": on_input(self._create_artifact),
            "createArtifactManifest": on_input(self._create_manifest),
            "createArtifactFiles": on_input(self._create_artifact_files),
            "commitArtifact": on_input(self._commit_artifact),
            "upsertModel": on_input(self._upsert_project),
            "upsertView": on_input(self._upsert_view),
            "deleteView": on_input(self._delete_view),
            "upsertSweep": on_input(self._upsert_sweep),
            "createAgent": on_input(self._create_agent),
            "agentHeartbeat": on_input(self._heartbeat),
        }

    def _new_id(self, kind: str) -> str:
        number = next(self._ids)
        return base64.b64encode(f"{kind}:{number:07}".encode()).decode().rstrip("=")

    def _user(self) -> Node:
        return {
            "__typename": "User",
            "id": "user",
            "name": ENTITY,
            "username": ENTITY,
            "email": f"{ENTITY}@localhost",
            "entity": ENTITY,
            "admin": False,
            "flags": "{}",
            "teams": _connection([{"id": "entity", "name": ENTITY, "__typename": "Entity"}]),
            "apiKeys": _connection([]),
            "defaultEntity": {"id": "entity", "name": ENTITY},
        }

    def _project(self, entity: str | None, name: str | None, *, create: bool = False) -> Node | None:
        key = (entity or ENTITY, name or "uncategorized")
        if key not in self.projects and not create:
            return None
        if key not in self.projects:
            number = next(self._ids)
            self.projects[key] = {
                "__typename": "Project",
                "id": base64.b64encode(f"Project:v1:{key[1]}:{key[0]}".encode()).decode(),
                "internalId": base64.b64encode(f"ProjectInternalId:{number}".encode()).decode(),
                "name": key[1],
                "entityName": key[0],
                "entity": {"id": "entity", "name": key[0], "__typename": "Entity"},
                "createdAt": TIME,
                "isBenchmark": False,
                "readOnly": False,
                "tags": [],
                "run": lambda a: self._run_node(a["name"], key),
                "bucket": lambda a: self._run_node(a["name"], key),
                "runs": lambda a: _connection(self._found(key, a), a),
                "runCount": lambda a: len(self._found(key, a)),
                "sweep": lambda a: self._sweep_node(a["sweepName"]),
                "sweeps": lambda a: _connection([self._sweep_node(s.id) for s in self._sweeps(key)], a),
                "totalSweeps": lambda _: len(self._sweeps(key)),
                "allViews": lambda a: _connection(self._views(key, a), a),
            }
        return self.projects[key]

    def _upsert_project(self, given: Node) -> Node:
        inserted = (given.get("entityName", ENTITY), given["name"]) not in self.projects
        project = self._project(given.get("entityName"), given["name"], create=True)
        return {"project": project, "model": project, "inserted": inserted}

    # --- runs

    def _upsert_run(self, given: Node) -> Node:
        name = given.get("name") or next(r.id for r in self.runs.values() if _run_gid(r) == given["id"])
        run = self.runs.get(name)
        inserted = run is None
        if run is None:
            project = self._project(given.get("entityName"), given.get("modelName"), create=True)
            assert project is not None
            run = self.runs[name] = Run(name, project["entityName"], project["name"])
            run.name = given.get("displayName") or f"run-{len(self.runs)}"
        for key, attribute in (
            ("displayName", "name"),
            ("groupName", "group"),
            ("jobType", "job_type"),
            ("tags", "tags"),
            ("sweep", "sweep"),
            ("jobProgram", "program"),
            ("notes", "notes"),
        ):
            if key in given:
                setattr(run, attribute, given[key])
        if "config" in given:
            run.logged_config = json.loads(given["config"])
        if "summaryMetrics" in given:
            run.summary = json.loads(given["summaryMetrics"])
        if "host" in given:  # the first word of a process, not a change of the config
            run.begun += 1
            run.state, run.preempting = "running", False
        return {"bucket": self._run_node(name, (run.entity, run.project)), "inserted": inserted}

    def _run_node(self, name: str, project: tuple[str, str]) -> Node | None:
        run = self.runs.get(name)
        if run is None or (run.entity, run.project) != project:
            return None

        def text(rows: Sequence[Node]) -> list[str]:
            return [json.dumps(row) for row in rows]

        def last(rows: Sequence[Any]) -> str:
            return json.dumps([row if isinstance(row, str) else json.dumps(row) for row in rows[-1:]])

        def history(arguments: Node) -> list[str]:
            steps = range(arguments.get("minStep", 0), arguments.get("maxStep", 1 << 62))
            return text([row for row in run.history if row["_step"] in steps])

        def sampled(arguments: Node) -> list[list[Node]]:
            specs = [json.loads(spec) for spec in arguments["specs"]]
            return [[row for row in run.history if all(key in row for key in spec.get("keys", []))] for spec in specs]

        return {
            "__typename": "Run",
            "id": _run_gid(run),
            "projectId": 1,
            "name": run.id,
            "displayName": run.name,
            "group": run.group,
            "jobType": run.job_type,
            "tags": run.tags,
            "notes": run.notes,
            "sweepName": run.sweep,
            "state": run.state,
            "commit": None,
            "readOnly": False,
            "stopped": False,
            "shouldStop": False,
            "failed": run.state == "failed",
            "running": run.state == "running",
            "exitcode": run.exit_code,
            "createdAt": TIME,
            "heartbeatAt": TIME,
            "user": self._user(),
            "project": self._project(run.entity, run.project),
            "config": json.dumps(run.logged_config),
            "wandbConfig": lambda a: json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(run.summary),
            "systemMetrics": "{}",
            "history": history,
            "sampledHistory": sampled,
            "historyKeys": {
                "sets": [],
                "keys": {key: {} for row in run.history for key in row},
                "lastStep": len(run.history) - 1,
            },
            # what resuming asks for
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "logLineCount": len(run.output),
            "historyTail": last(run.history),
            "eventsTail": last(run.events),
            "files": lambda a: _connection([self._file_node(run, f) for f in _chosen(run.files, a)], a),
            "parquetHistory": lambda _: {"liveData": [], "parquetUrls": []},
        }

    def _file_node(self, run: Run, name: str) -> Node:
        url = f"{self.url}/files/{run.entity}/{run.project}/{run.id}/{quote(name)}"
        size = len(run.files.get(name, b""))
        return {
            "id": name,
            "name": name,
            "url": url,
            "uploadUrl": url,
            "directUrl": url,
            "sizeBytes": size,
            "mimetype": "application/octet-stream",
            "updatedAt": TIME,
        }

    def _create_run_files(self, given: Node) -> Node:
        run = self.runs[given["runName"]]
        return {"runID": run.id, "uploadHeaders": [], "files": [self._file_node(run, f) for f in given["files"]]}

    def _found(self, project: tuple[str, str], arguments: Node) -> list[Node]:
        wanted = json.loads(arguments.get("filters", "{}"))
        found = [self._run_node(run.id, project) for run in self.runs.values() if _matches(run, wanted)]
        return [node for node in found if node is not None]

    # --- artifacts

    def _create_artifact(self, given: Node) -> Node:
        artifact = Artifact(
            self._new_id("Artifact"),
            given["artifactCollectionName"],
            given["artifactTypeName"],
            given.get("runName", ""),
            given["digest"],
            [alias["alias"] for alias in given.get("aliases", [])],
        )
        self.artifacts[artifact.id] = artifact
        return {"artifact": self._artifact_node(artifact)}

    def _artifact_node(self, artifact: Artifact) -> Node:
        return {
            "id": artifact.id,
            "state": "COMMITTED" if artifact.committed else "PENDING",
            "digest": artifact.digest,
            "artifactSequence": {"id": self._new_id("Sequence"), "name": artifact.name, "latestArtifact": None},
        }

    def _create_manifest(self, given: Node) -> Node:
        identifier = given["artifactID"]
        url = f"{self.url}/artifacts/{identifier}/{given['name']}"
        file = {"id": identifier, "uploadUrl": url, "uploadHeaders": [], "name": "wandb_manifest.json"}
        return {"artifactManifest": {"id": identifier, "file": file}}

    def _create_artifact_files(self, given: Node) -> Node:
        nodes = []
        for spec in given["artifactFiles"]:
            artifact = spec["artifactID"]
            nodes.append(
                {
                    "id": spec["name"],
                    "name": spec["name"],
                    "displayName": spec["name"],
                    "storagePath": f"{artifact}/{spec['name']}",
                    "uploadUrl": f"{self.url}/artifacts/{artifact}/{quote(spec['name'])}",
                    "uploadHeaders": [],
                    "artifact": {"id": artifact},
                }
            )
        return {"files": _connection(nodes)}

    def _commit_artifact(self, given: Node) -> Node:
        artifact = self.artifacts[given["artifactID"]]
        artifact.committed = True
        return {"artifact": {"id": artifact.id, "digest": artifact.digest}}

    # --- reports and workspaces

    def _upsert_view(self, given: Node) -> Node:
        identifier = given.get("id")
        inserted = identifier is None
        if identifier is None:
            identifier = self._new_id("View")
            project = self._project(given.get("entityName"), given["projectName"])
            if project is None:
                raise ValueError(f"there is no project {given['projectName']}")
            self.views[identifier] = {
                "__typename": "View",
                "id": identifier,
                "project": project,
                "entityName": given.get("entityName"),
                "user": self._user(),
                "createdAt": TIME,
            }
        named = {key: given[key] for key in ("type", "name", "displayName", "description", "spec") if key in given}
        self.views[identifier] |= {**named, "updatedAt": TIME}
        return {"view": self.views[identifier], "inserted": inserted}

    def _delete_view(self, given: Node) -> Node:
        return {"success": self.views.pop(given["id"], None) is not None, "pendingDrafts": []}

    def _views(self, project: tuple[str, str], arguments: Node) -> list[Node]:
        return [
            view
            for view in self.views.values()
            if (view["project"]["entityName"], view["project"]["name"]) == project
            and view["type"] == arguments.get("viewType", view["type"])
            and view["name"] == arguments.get("viewName", view["name"])
        ]

    # --- sweeps

    def _sweeps(self, project: tuple[str, str]) -> list[Sweep]:
        return [sweep for sweep in self.sweeps.values() if (sweep.entity, sweep.project) == project]

    def _upsert_sweep(self, given: Node) -> Node:
        known = next((s for s in self.sweeps.values() if f"sweep-{s.id}" == given.get("id")), None)
        if known is None:
            text = given["config"]
            config = yaml.safe_load(text)
            project = self._project(given.get("entityName"), given.get("projectName"), create=True)
            assert project is not None
            known = Sweep(f"sw{next(self._ids):06}", project["entityName"], project["name"], config, text)
            self.sweeps[known.id] = known
        known.state = given.get("state", known.state)
        return {"sweep": self._sweep_node(known.id), "configValidationWarnings": []}

    def _sweep_node(self, identifier: str) -> Node | None:
        sweep = self.sweeps.get(identifier)
        if sweep is None:
            return None
        runs = [run for run in self.runs.values() if run.sweep == identifier]
        return {
            "__typename": "Sweep",
            "id": f"sweep-{identifier}",
            "name": identifier,
            "displayName": sweep.config.get("name"),
            "method": sweep.config["method"],
            "state": sweep.state,
            "config": sweep.text,
            "project": self._project(sweep.entity, sweep.project),
            "createdAt": TIME,
            "updatedAt": TIME,
            "runCount": len(runs),
            "runs": lambda a: _connection([self._run_node(r.id, (r.entity, r.project)) for r in runs], a),
        }

    def _create_agent(self, given: Node) -> Node:
        identifier = self._new_id("Agent")
        self.agents[identifier] = given["sweep"]
        return {"agent": {"id": identifier, "name": identifier}}

    def _heartbeat(self, given: Node) -> Node:
        """A run when the agent has none, and the end of the agent when there is none left."""
        sweep = self.sweeps[self.agents[given["id"]]]
        commands: list[Node] = []
        if not json.loads(given.get("runState", "{}")):
            point = sweep.next()
            if point is None:
                commands = [{"type": "exit"}]
            else:
                run_id = f"{sweep.id}r{len(sweep.given)}"
                arguments = {name: {"value": value} for name, value in point.items()}
                program = sweep.config.get("program")
                commands = [{"type": "run", "run_id": run_id, "program": program, "args": arguments}]
        return {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}

    # --- streams and files

    def stream(self, run: Run, given: Node) -> None:
        """Lines of the history, the summary and the terminal, each with the offset where they belong."""
        with self._lock:
            for name, chunk in given.get("files", {}).items():
                lines = chunk["content"]
                if name == "wandb-history.jsonl":
                    run.history[chunk["offset"] :] = [json.loads(line) for line in lines]
                elif name == "wandb-events.jsonl":
                    run.events[chunk["offset"] :] = [json.loads(line) for line in lines]
                elif name == "wandb-summary.json":
                    run.summary = json.loads(lines[-1])
                elif name == "output.log":
                    run.output[chunk["offset"] :] = lines
            run.preempting = run.preempting or given.get("preempting", False)
            if given.get("complete"):
                run.exit_code = given.get("exitcode", 0)
                bad = "preempted" if run.preempting else "failed"
                run.state = "finished" if run.exit_code == 0 else bad


class _Counted(dict[str, Any]):
    """The root, counting what is asked of it."""

    def __init__(self, values: Mapping[str, Any], calls: Counter[str]) -> None:
        super().__init__(values)
        self.calls = calls

    def get(self, key: str, default: Any = None) -> Any:
        self.calls[key] += 1
        return super().get(key, default)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _run_gid(run: Run) -> str:
    return base64.b64encode(f"Run:v1:{run.id}:{run.project}:{run.entity}".encode()).decode()


def _connection(nodes: Sequence[Node | None], arguments: Node | None = None) -> Node:
    """One page of nodes, beginning after the cursor."""
    arguments = arguments or {}
    start = int(arguments.get("after") or 0)
    stop = start + int(arguments.get("first") or len(nodes))
    edges = [{"node": node, "cursor": str(start + i + 1)} for i, node in enumerate(nodes[start:stop])]
    page = {"__typename": "PageInfo", "hasNextPage": stop < len(nodes), "endCursor": str(min(stop, len(nodes)))}
    return {"edges": edges, "pageInfo": page, "totalCount": len(nodes)}


def _chosen(files: Mapping[str, bytes], arguments: Node) -> list[str]:
    names = arguments.get("names")
    return [name for name in files if not names or name in names]


def _matches(run: Run, wanted: Node) -> bool:
    """MongoDB's query language as far as equality, $in, $and and $or."""
    attributes = {"name": run.id, "displayName": run.name, "group": run.group, "jobType": run.job_type}
    attributes |= {"state": run.state, "sweep": run.sweep}
    for key, value in wanted.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(_matches(run, part) for part in value):
                return False
            continue
        found: Any = attributes.get(key)
        if key.startswith("config."):
            found = run.config
            for part in key.removeprefix("config.").replace(".value", "").split("."):
                found = found.get(part) if isinstance(found, dict) else None
        elif key not in attributes:
            raise ValueError(f"the stand-in filters by no {key}")
        choices = value["$in"] if isinstance(value, dict) and "$in" in value else [value]
        if found not in choices:
            return False
    return True


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: Any, handler: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        """End the connections that clients keep open for their next request."""
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has its answer leaves its connection open and resets it when it ends."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.RequestHandlerClass.server_state.errors.append(repr(error))  # type: ignore[attr-defined]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._parts()
        try:
            if self.server_state.refusal is not None:
                status, message = self.server_state.refusal
                self._answer({"data": None, "errors": [{"message": message}]}, status)
            elif parts == ["graphql"]:
                given = json.loads(body)
                self._answer({"data": self.server_state.graphql(given["query"], given.get("variables") or {})})
            elif parts[0] == "files" and parts[-1] == "file_stream":
                self.server_state.stream(self.server_state.runs[parts[3]], json.loads(body))
                self._answer({"exitcode": None, "limits": {}})
            else:
                self._answer({}, 404)
        except Exception as error:
            self.server_state.errors.append(f"{'/'.join(parts)}: {error!r}: {body[:500]!r}")
            self._answer({"errors": [{"message": repr(error)}]})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        files, name = self._stored(self._parts())
        files[name] = body
        self._answer({})

    def do_GET(self) -> None:
        files, name = self._stored(self._parts())
        self._answer(files.get(name, b""), 200 if name in files else 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _stored(self, parts: list[str]) -> tuple[dict[str, bytes], str]:
        if parts[0] == "files" and parts[3:4] and parts[3] in self.server_state.runs:
            return self.server_state.runs[parts[3]].files, "/".join(parts[4:])
        if parts[0] == "artifacts":
            return self.server_state.artifacts[parts[1]].files, "/".join(parts[2:])
        return {}, ""

    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _answer(self, content: Node | bytes, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def client(*arguments: str) -> list[str]:
    """The command `wandb …`; its agent asks for work five times a second, not every five seconds."""
    code = (
        "from wandb import wandb_agent\nfrom wandb.cli.cli import cli\nwandb_agent.Agent.POLL_INTERVAL = 0.2\ncli()\n"
    )
    return [sys.executable, "-c", code, *arguments]


@pytest.fixture
def wandb_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that this process and those that it starts log to. A request that it could not answer fails the test."""
    import wandb

    with WandbServer() as server:
        for name, value in server.environment(tmp_path / "wandb").items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # the client keeps its settings for the whole process
        yield server
        wandb.teardown()
    assert not server.errors
