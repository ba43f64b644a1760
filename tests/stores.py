"""Object stores on the loopback: emulators of GCS and S3, each behind a proxy that injects faults.

A test asks for `gcs`, `s3` or `store` (both in turn) and gets a `Store` with a folder of its own.
Each emulator is one process that keeps its objects in memory. It starts at the first use and ends
with the test session.
"""

import contextlib
import http.client
import http.server
import importlib.util
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

BUCKET = "emu-jax-tests"
# Each prints its port and ends when its standard input does, which a killed test run closes too.
_SERVERS = {
    "gs": f"""
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="{BUCKET}")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()
server.stop()
""",
    "s3": """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
""",
}
_PACKAGES = {"gs": ("gcp_storage_emulator", "gcsfs"), "s3": ("moto", "s3fs")}
# The variables of gcsfs, tensorstore and array_record.
_GCS_CLIENTS = (
    "STORAGE_EMULATOR_HOST",
    "TENSORSTORE_GCS_HTTP_URL",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",
)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "te"}


class Store:
    """An emulated object store.

    Attributes:
        scheme: "gs" or "s3".
        address: URL of the proxy, for clients.
        folder: URL of an empty folder, such as gs://emu-jax-tests/ab12.
        environment: variables with which every client finds the store; the fixtures set them.
        requests: (method, object name or listed prefix) of all requests, in order.
        sent: bytes of the bodies of all answers.
        latency: seconds by which each request is delayed.
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVERS[scheme]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._server.stdout is not None
        self._port = int(self._server.stdout.readline())
        self._proxy = _Proxy(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        # The GCS emulator answers a request at a time; and a precondition and its write are atomic.
        self._turn = threading.Lock() if scheme == "gs" else contextlib.nullcontext()
        self.reset()
        if scheme == "s3":
            self.forward("PUT", f"/{BUCKET}", b"", {})
        self.environment = _environment(scheme, self.address)

    def reset(self) -> None:
        """Ends all faults, and gives the next test an empty folder."""
        self.folder = f"{self.scheme}://{BUCKET}/{secrets.token_hex(4)}"
        self.requests: list[tuple[str, str]] = []
        self.latency, self.sent = 0.0, 0
        self._refuse_until, self._denied = 0.0, list[tuple[str, set[str]]]()

    def refuse(self, seconds: float) -> None:
        """Answers every request with 503 for that time."""
        self._refuse_until = time.monotonic() + seconds

    def deny(self, url: str, *methods: str) -> None:
        """Answers requests for objects at or below a URL with 403.

        Args:
            methods: HTTP methods that are denied; by default all.
        """
        prefix = url.removeprefix(f"{self.scheme}://{BUCKET}").lstrip("/")
        self._denied.append((prefix, set(methods)))

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.kill()  # nothing is lost: all objects are in its memory
        self._server.communicate()

    def answer(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns (status, headers, body) of a request, after faults and preconditions."""
        name = self._name(path, body)
        self.requests.append((method, name))
        if self.latency:
            time.sleep(self.latency)
        if time.monotonic() < self._refuse_until:
            return self._error(503, "SlowDown", "the store is busy")
        for prefix, methods in self._denied:
            if name.startswith(prefix) and (not methods or method in methods):
                return self._error(403, "AccessDenied", f"no access to {name}")
        with self._turn:
            if self.scheme == "gs" and not self._matches(method, path, name):
                return self._error(412, "conditionNotMet", "a precondition does not hold")
            if self.scheme == "gs" and headers.get("range", "").startswith("bytes=-"):
                return self._suffix(path, headers)
            status, answered, content = self.forward(method, path, body, headers)
            if self.scheme == "gs" and method == "GET" and "alt=media" in path and status < 300:
                answered["X-Goog-Generation"] = self._generation(name)  # as GCS does
            return status, answered, content

    def _suffix(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Answers a request for the last bytes of an object, which the emulator does not know."""
        count = int(headers["range"].removeprefix("bytes=-"))
        kept = {k: v for k, v in headers.items() if k != "range"}
        status, answered, content = self.forward("GET", path, b"", kept)
        if status != 200:
            return status, answered, content
        start = max(0, len(content) - count)
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = {"Content-Length": str(len(content) - start), "Content-Range": span}
        return 206, answered | part, content[start:]

    def forward(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Sends a request to the emulator."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, path, body, headers | {"Content-Length": str(len(body))})
            response = connection.getresponse()
            content = response.read()
            kept = {k: v for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP}
            length = response.getheader("Content-Length") if method == "HEAD" else None
            return response.status, kept | {"Content-Length": length or str(len(content))}, content
        finally:
            connection.close()

    def _matches(self, method: str, path: str, name: str) -> bool:
        """Checks `ifGenerationMatch` of a write or delete, which the emulator ignores."""
        wanted = parse_qs(urlsplit(path).query).get("ifGenerationMatch")
        if method == "GET" or not wanted:
            return True
        return self._generation(name) == wanted[0]

    def _generation(self, name: str) -> str:
        """Returns the generation of an object of the GCS emulator, "0" if it does not exist."""
        quoted = name.replace("%", "%25").replace("/", "%2F").replace(" ", "%20")
        status, _, content = self.forward("GET", f"/storage/v1/b/{BUCKET}/o/{quoted}", b"", {})
        return str(json.loads(content)["generation"]) if status == 200 else "0"

    def _name(self, path: str, body: bytes) -> str:
        """Returns the object or prefix that a request is about."""
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if self.scheme == "gs":
            named = re.search(r"/o/(.+)", parts.path)
            if not named and "uploadType" in query and "name" not in query:
                in_body = re.search(rb'"name":\s*"((?:[^"\\]|\\.)*)"', body[:4096])
                return json.loads(b'"%s"' % in_body[1]) if in_body else ""
        else:
            named = re.match(r"/[^/]+/(.+)", parts.path)
        return unquote(named[1]) if named else query.get("name", query.get("prefix", [""]))[0]

    def _error(self, status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
        if self.scheme == "gs":
            error = {"code": status, "message": message, "errors": [{"reason": code}]}
            kind, content = "application/json", json.dumps({"error": error}).encode()
        else:
            kind = "application/xml"
            content = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        return status, {"Content-Type": kind, "Content-Length": str(len(content))}, content


def _environment(scheme: str, address: str) -> dict[str, str]:
    local = {"NO_PROXY": "127.0.0.1"}
    if scheme == "gs":
        # Otherwise gcsfs looks up the kind of a bucket, with credentials that no test has.
        kind = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        return local | kind | dict.fromkeys(_GCS_CLIENTS, address)
    return local | {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that hang up, as killed ones do."""


def _handler(store: Store) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def _serve(self) -> None:
            lowered = {k.lower(): v for k, v in self.headers.items()}
            headers = {k: v for k, v in lowered.items() if k not in _HOP_BY_HOP}
            status, headers, content = store.answer(self.command, self.path, self._body(), headers)
            store.sent += len(content)
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


_running: dict[str, Store] = {}


@pytest.fixture(scope="session")
def _stores():
    yield _running
    for store in _running.values():
        store.close()
    _running.clear()


def _use(scheme: str, monkeypatch: pytest.MonkeyPatch):
    for package in _PACKAGES[scheme]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    store = _running.get(scheme) or _running.setdefault(scheme, Store(scheme))
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    store.reset()
    yield store
    store.reset()


@pytest.fixture
def gcs(_stores, monkeypatch):
    yield from _use("gs", monkeypatch)


@pytest.fixture
def s3(_stores, monkeypatch):
    yield from _use("s3", monkeypatch)


@pytest.fixture(params=["gs", "s3"])
def store(request, _stores, monkeypatch):
    yield from _use(request.param, monkeypatch)
