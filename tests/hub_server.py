"""A server that speaks as much of the Hugging Face Hub's protocol as downloads and uploads of models need."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
TOKEN = "hf_right"


class HubServer(ThreadingHTTPServer):
    """The server.

    Attributes:
      files: content by "owner/name/commit/path".
      made: repositories that were made, and whether they are private.
      blobs: large files on their way, by checksum.
      requests: the paths that were asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.made: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.download(body=False)

    def do_GET(self):
        path = self.path.split("?")[0].split("/")
        if path[1:3] == ["api", "models"] and "tree" in path:
            start = f"{path[3]}/{path[4]}/{COMMITS['main']}/"
            found = {name.removeprefix(start): x for name, x in self.server.files.items() if name.startswith(start)}
            self.reply([{"type": "file", "path": name, "size": len(x), "oid": "0"} for name, x in found.items()])
        else:
            self.download(body=True)

    def download(self, body):
        """Answers /owner/repository/resolve/revision/file."""
        self.server.requests.append(self.path)
        refusal, commit, content = self.find()
        self.send_response(refusal[0] if refusal else 200)
        self.send_header("Content-Length", str(len(content)))
        if refusal:
            self.send_header("X-Error-Code", refusal[1])
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def find(self):
        """The status and error code, or None; the commit, if any; the content of the file."""
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = COMMITS.get(revision, revision)
        content = self.server.files.get(f"{repository}/{commit}/{file}")
        if repository == "someone/gated":
            return (403, "GatedRepo"), None, b""
        if not any(name.startswith(f"{repository}/") for name in self.server.files):
            return (401, "RepoNotFound"), None, b""
        if commit not in COMMITS.values():
            return (404, "RevisionNotFound"), None, b""
        if content is None:
            return (404, "EntryNotFound"), commit, b""
        return None, commit, content

    def do_POST(self):
        """Answers the steps of an upload: the repository, how each file is sent, where large ones go, the commit."""
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid credentials"}, 401)
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path == "/api/validate-yaml":
            return self.reply({})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            return self.reply({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                x | {"actions": {"upload": {"href": f"{self.server.address}/blob/{x['oid']}"}}}
                for x in json.loads(content)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        owner, name = path.split("/")[3:5]
        return self.commit(f"{owner}/{name}/{COMMITS['main']}", [json.loads(line) for line in content.splitlines()])

    def create(self, asked):
        repository = f"{asked['organization']}/{asked['name']}"
        if repository == "someone/gated":
            return self.reply({"error": "Forbidden"}, 403)
        known = repository in self.server.made
        private = asked.get("private") or asked.get("visibility") == "private"  # by version of the client
        self.server.made.setdefault(repository, private)
        return self.reply({"url": f"{self.server.address}/{repository}"}, 409 if known else 200)

    def do_PUT(self):
        """Takes a large file, as one piece or in chunks that begin with their length."""
        content = b""
        if length := self.headers.get("Content-Length"):
            content = self.rfile.read(int(length))
        while not length and (size := int(self.rfile.readline(), 16)):
            content += self.rfile.read(size)
            self.rfile.readline()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.server.blobs[self.path.rpartition("/")[2]] = content
        self.reply({})

    def commit(self, folder, lines):
        for line in lines:
            value, path = line["value"], f"{folder}/{line['value'].get('path')}"
            if line["key"] == "file":
                self.server.files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[path] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.server.files[path]
        repository, _, commit = folder.rpartition("/")
        self.reply({"commitUrl": f"{self.server.address}/{repository}/commit/{commit}", "commitOid": commit})

    def reply(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def point_at(monkeypatch, address):
    """Redirects the Hub's client to an address."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again and again, longer each time
