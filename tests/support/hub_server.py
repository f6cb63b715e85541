"""A Hub on loopback: what the real `huggingface_hub` client asks for, answered from memory.

Speaks the endpoints of `create_repo`, `create_branch`, `create_commit` and `upload_folder` (regular files, LFS in one
part and in several), `snapshot_download`, `hf_hub_download` and card validation, and keeps every commit, so that
`revision=` works. Writing needs a token, reading a private repository too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
USER = "tester"
PART_BYTES = 1 << 16  # LFS files above this go up in parts
LICENSES = {"apache-2.0", "mit", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "other", "unknown"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@dataclass(frozen=True)
class Blob:
    """One file of a commit: its bytes and whether it went up through LFS."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """sha256 of an LFS file, git's blob id of a regular one."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """Every commit of a repository; `branches` maps names to commits."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        content = repr((sorted((path, blob.oid) for path, blob in files.items()), len(self.commits)))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class Refused(Exception):
    """An HTTP error, with the `X-Error-Code` the client tells its exceptions apart by."""

    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.code, self.message = status, code, message


class HubServer(ThreadingHTTPServer):
    """Starts on an ephemeral port of 127.0.0.1 when created; `endpoint` goes into `HF_ENDPOINT`.

    Attributes:
        repos: repository by `"models/ORG/NAME"`.
        requests: `"METHOD path"` of every request so far.
        outage: requests whose path contains this text get that status, 0 cuts the line; `None`: all well.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.outage: tuple[str, int] | None = None
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content of a model repository at a branch or commit."""
        repo = self.repos[f"models/{repo_id}"]
        return {path: blob.data for path, blob in repo.commits[repo.branches.get(revision, revision)].items()}


class Handler(BaseHTTPRequestHandler):
    """Routes one request; the lock makes each an atomic step."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one packet

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        status, headers, body = 200, {"Content-Type": "application/json"}, b""
        try:
            if self.server.outage is not None and self.server.outage[0] in path:
                raise Refused(self.server.outage[1])
            with self.server.lock:
                for method, pattern, handle in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method.split("|"):
                        result = handle(self, **match.groupdict())
                        break
                else:
                    raise Refused(404)
            if isinstance(result, tuple):
                headers, body = result
            else:
                body = json.dumps(result).encode()
        except Refused as error:
            if not error.status:
                self.close_connection = True
                return
            status, body = error.status, error.message.encode()
            headers = {"X-Error-Code": error.code} if error.code else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def writer(self) -> None:
        if not self.authorized:
            raise Refused(401, message="Invalid username or password.")

    def repo(self, kind: str, repo: str) -> Repo:
        found = self.server.repos.get(f"{kind or 'models'}/{repo}")
        if found is None or (found.private and not self.authorized):
            raise Refused(404 if self.authorized else 401, "RepoNotFound")
        if found.gated:
            raise Refused(403 if self.authorized else 401, "GatedRepo")
        return found

    def commit(self, kind: str, repo: str, rev: str) -> tuple[str, dict[str, Blob]]:
        found = self.repo(kind, repo)
        sha = found.branches.get(rev, rev)
        if sha not in found.commits:
            raise Refused(404, "RevisionNotFound")
        return sha, found.commits[sha]


def whoami(request: Handler) -> dict[str, Any]:
    request.writer()
    return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}


def create_repo(request: Handler) -> dict[str, Any]:
    request.writer()
    owner, name = request.json.get("organization") or USER, request.json["name"]
    kind = f"{request.json.get('type') or 'model'}s"
    url = f"{request.server.endpoint}/{'' if kind == 'models' else kind + '/'}{owner}/{name}"
    if f"{kind}/{owner}/{name}" in request.server.repos:
        raise Refused(409, message=json.dumps({"url": url, "error": "You already created this repo"}))
    repo = request.server.repos[f"{kind}/{owner}/{name}"] = Repo(request.json.get("visibility") == "private")
    repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")
    return {"url": url, "name": f"{owner}/{name}"}


def create_branch(request: Handler, kind: str, repo: str, branch: str) -> dict[str, Any]:
    request.writer()
    found = request.repo(kind, repo)
    if branch in found.branches:
        raise Refused(409)
    found.branches[branch] = found.branches[request.json.get("startingPoint") or "main"]
    return {}


def metadata(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def validate_yaml(request: Handler) -> dict[str, Any]:
    """The Hub's checks that a model card here can fail."""
    data = metadata(request.json["content"])
    errors = []
    if data.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.get("base_model", "x")):
        errors.append(f'"base_model" with value "{data["base_model"]}" is not a model id')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for result in (result for model in data.get("model-index", []) for result in model["results"]):
        if not {"type", "name"} <= result["dataset"].keys() or "type" not in result["task"]:
            errors.append('"model-index" results need task.type, dataset.type and dataset.name')
        if not all(isinstance(metric["value"], float | int | str) for metric in result["metrics"]):
            errors.append('"model-index" metrics need a value')
    if errors:
        raise Refused(400, message=json.dumps({"errors": [{"message": text} for text in errors], "warnings": []}))
    return {"errors": [], "warnings": []}


def repo_info(request: Handler, kind: str, repo: str, rev: str | None = None) -> dict[str, Any]:
    sha, files = request.commit(kind, repo, rev or "main")
    siblings = [{"rfilename": path} for path in sorted(files)]
    card = metadata(files["README.md"].data.decode()) if "README.md" in files else None
    private = request.repo(kind, repo).private
    return {"id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": [], "cardData": card}


def refs(request: Handler, kind: str, repo: str) -> dict[str, Any]:
    branches = request.repo(kind, repo).branches
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
    return {"branches": listed, "converts": [], "tags": []}


def entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid[:40], **lfs}


def tree(request: Handler, kind: str, repo: str, rev: str, path: str | None = None) -> list[dict[str, Any]]:
    _, files = request.commit(kind, repo, rev)
    inside = {name: blob for name, blob in files.items() if path is None or name.startswith(f"{path}/")}
    if path is not None and not inside:
        raise Refused(404, "EntryNotFound")
    return [entry(name, inside[name]) for name in sorted(inside)]


def paths_info(request: Handler, kind: str, repo: str, rev: str) -> list[dict[str, Any]]:
    _, files = request.commit(kind, repo, rev)
    return [entry(path, files[path]) for path in request.json["paths"] if path in files]


def preupload(request: Handler, kind: str, repo: str, rev: str) -> dict[str, Any]:
    request.writer()
    _, files = request.commit(kind, repo, rev)
    answer = []
    for file in request.json["files"]:
        old = files.get(file["path"])
        mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
        answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old and old.oid})
    return {"files": answer}


def lfs_batch(request: Handler, kind: str, repo: str) -> dict[str, Any]:
    request.writer()
    request.repo(kind, repo)
    objects = []
    for item in request.json["objects"]:
        base = f"{request.server.endpoint}/lfs/{item['oid']}"
        header = {}
        if item["size"] > PART_BYTES:
            header = {str(i + 1): f"{base}/{i + 1}" for i in range(-(-item["size"] // PART_BYTES))}
            header["chunk_size"] = str(PART_BYTES)
        actions = {"upload": {"href": base, "header": header}, "verify": {"href": f"{base}/verify"}}
        known = item["oid"] in request.server.objects
        objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": actions})})
    return {"transfer": "multipart", "objects": objects}


def lfs_put(request: Handler, oid: str, part: str | None = None) -> tuple[dict[str, str], bytes]:
    if part is None:
        store_object(request, oid, request.body)
    else:
        request.server.parts.setdefault(oid, {})[int(part)] = request.body
    return {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}, b""


def lfs_complete(request: Handler, oid: str) -> dict[str, Any]:
    parts = request.server.parts.pop(oid)
    for sent in request.json["parts"]:
        if sent["etag"] != f'"{hashlib.md5(parts[sent["partNumber"]]).hexdigest()}"':
            raise Refused(400)
    store_object(request, oid, b"".join(parts[number] for number in sorted(parts)))
    return {}


def store_object(request: Handler, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, message="sha256 differs")
    request.server.objects[oid] = data


def lfs_verify(request: Handler, oid: str) -> dict[str, Any]:
    if len(request.server.objects.get(oid, b"")) != request.json["size"]:
        raise Refused(404)
    return {}


def commit(request: Handler, kind: str, repo: str, rev: str) -> dict[str, Any]:
    request.writer()
    found = request.repo(kind, repo)
    _, files = request.commit(kind, repo, rev)
    files, message = dict(files), ""
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in request.server.objects:
                raise Refused(400, message=f"{value['path']}: LFS object was not uploaded")
            files[value["path"]] = Blob(request.server.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "EntryNotFound")
        else:
            raise Refused(400, message=f"unknown operation {key}")
    sha = found.commit(rev, files, message)
    return {"success": True, "commitOid": sha, "commitUrl": f"{request.server.endpoint}/{repo}/commit/{sha}"}


def resolve(request: Handler, kind: str | None, repo: str, rev: str, path: str) -> tuple[dict[str, str], bytes]:
    sha, files = request.commit(f"{kind or 'model'}s", repo, rev)
    if path not in files:
        raise Refused(404, "EntryNotFound")
    blob = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
    return headers, blob.data


_NAME = r"[\w.-]+/[\w.-]+"
_REPO = rf"/api/(?P<kind>models|datasets|spaces)/(?P<repo>{_NAME})"
_OID = r"/lfs/(?P<oid>[0-9a-f]{64})"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"{_REPO}(/revision/(?P<rev>.+))?", repo_info),
    ("GET", rf"{_REPO}/refs", refs),
    ("GET", rf"{_REPO}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", tree),
    ("POST", rf"{_REPO}/paths-info/(?P<rev>.+)", paths_info),
    ("POST", rf"{_REPO}/branch/(?P<branch>.+)", create_branch),
    ("POST", rf"{_REPO}/preupload/(?P<rev>.+)", preupload),
    ("POST", rf"{_REPO}/commit/(?P<rev>.+)", commit),
    ("POST", rf"/((?P<kind>dataset|space)s/)?(?P<repo>{_NAME})\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", rf"{_OID}(/(?P<part>\d+))?", lfs_put),
    ("POST", rf"{_OID}", lfs_complete),
    ("POST", rf"{_OID}/verify", lfs_verify),
    ("GET|HEAD", rf"/((?P<kind>dataset|space)s/)?(?P<repo>{_NAME})/resolve/(?P<rev>[^/]+)/(?P<path>.+)", resolve),
]
