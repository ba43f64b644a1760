"""A server that speaks the Hub's API as far as downloads and uploads of models need it: listings,
files with ranges, creating repositories, LFS uploads, commits, and the errors of each."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_BYTES = 2000  # larger files are uploaded as LFS objects


class Hub:
    """Repositories in memory: {name: [(commit, {path: content}), ...]}, newest last."""

    def __init__(self):
        self.repositories, self.objects = {}, {}
        self.gated, self.read_only, self.private = set(), set(), set()
        self.requests = []  # (method, path) of each
        self.uploads = 0  # LFS objects received
        self.broken_after = None  # bytes of a file after which the connection is closed, once

    def commit(self, name, files):
        content = {path: bytes(data) for path, data in files.items()}
        history = self.repositories.setdefault(name, [])
        commit = hashlib.sha1(f"{name} {len(history)}".encode()).hexdigest()
        history.append((commit, content))
        return commit

    def files(self, name, revision="main"):
        for commit, files in reversed(self.repositories[name]):
            if revision in ("main", commit):
                return commit, files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message=""):
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repository(self, name, revision="main", write=False):
        """(commit, files), or None once the request is refused."""
        hub = self.hub
        if name not in hub.repositories or name in hub.private:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if name in hub.gated:
            return self.refuse(403, "GatedRepo", "Access is restricted")
        if write and name in hub.read_only:
            return self.refuse(403, "Forbidden", "You are not allowed to write")
        if not hub.repositories[name]:
            return "0" * 40, {}
        found = hub.files(name, unquote(revision))
        return found or self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if found := self.repository(m[1], m[2] or "main"):
                commit, files = found
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, {"id": m[1], "sha": commit, "siblings": siblings})
        elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            if found := self.repository(m[1], m[2]):
                self.answer(200, [entry(n, data) for n, data in found[1].items()])
        elif m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.repository(m[1], m[2]):
                self.serve_file(found[0], found[1].get(unquote(m[3])))
        else:
            self.refuse(404, "NotFound")

    do_HEAD = do_GET

    def serve_file(self, commit, data):
        if data is None:
            return self.refuse(404, "EntryNotFound")
        start, status = 0, 200
        if m := re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", "")):
            start, status = int(m[1]), 206
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": commit}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        broken = self.hub.broken_after
        if self.command == "GET" and broken is not None and len(data) > broken:
            self.hub.broken_after = None
            self.send_response(status)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(data[:broken])
            self.close_connection = True
            return
        self.answer(status, data[start:], **headers)

    def do_POST(self):
        path, body, hub = urlsplit(self.path).path, self.body(), self.hub
        hub.requests.append((self.command, path))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "others":
                return self.refuse(403, "Forbidden", "You are not in this organization")
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, [])
            self.answer(status, {"url": f"http://{self.headers['Host']}/{name}"})
        elif path == "/api/validate-yaml":
            front = json.loads(body)["content"]
            errors = [] if front.startswith("---\n") else [{"message": "no front matter"}]
            self.answer(200, {"errors": errors, "warnings": []})
        elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            if self.repository(m[1], m[2], write=True):
                files = json.loads(body)["files"]
                self.answer(200, {"files": [upload_mode(file) for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            url = f"http://{self.headers['Host']}/lfs/"
            answers = [
                {**o, "actions": {"upload": {"href": url + o["oid"], "header": {}}}}
                if o["oid"] not in hub.objects
                else o
                for o in objects
            ]
            self.answer(200, {"transfer": "basic", "objects": answers})
        elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            if found := self.repository(m[1], m[2], write=True):
                commit = hub.commit(m[1], committed(found[1], body, hub.objects))
                url = f"http://{self.headers['Host']}/{m[1]}/commit/{commit}"
                self.answer(200, {"commitUrl": url, "commitOid": commit, "hookOutput": ""})
        else:
            self.refuse(404, "NotFound")

    def do_PUT(self):
        oid, data = self.path.rsplit("/", 1)[1], self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, "BadRequest", "wrong checksum")
        self.hub.objects[oid] = data
        self.hub.uploads += 1
        self.answer(200)


def entry(name, data):
    digest = hashlib.sha256(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": digest[:40]}


def upload_mode(file):
    mode = "lfs" if file["size"] > LFS_BYTES else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


def committed(files, body, objects):
    """The files after a commit, whose operations are the lines of `body`."""
    files = dict(files)
    for line in body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            files[value["path"]] = objects[value["oid"]]
        elif operation["key"] == "deletedFile":
            del files[value["path"]]
        elif operation["key"] != "header":
            raise AssertionError(operation)
    return files


@contextlib.contextmanager
def serving():
    """(the hub, its address) while a thread serves it."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
