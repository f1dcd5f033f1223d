"""A web server on this machine, with what servers do: break off, be busy, redirect."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Web:
    """files: path -> content. breaks: bytes after which each next answer ends. busy: answers of 503
    to come. wrong_parts: answers to come that give the whole for a part. asked: the headers of each
    request."""

    def __init__(self, port: int):
        self.port = port
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.breaks: list[int] = []
        self.busy = self.wrong_parts = 0
        self.asked: list[dict[str, str]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def tag(self, content: bytes) -> str:
        return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


class _Handler(http.server.BaseHTTPRequestHandler):
    web: Web

    def do_GET(self) -> None:
        web = self.web
        web.asked.append(dict(self.headers))
        if web.busy:
            web.busy -= 1
            return self.send_error(503)
        if self.path in web.redirects:
            self.send_response(302)
            self.send_header("Location", web.redirects[self.path])
            return self.end_headers()
        content = web.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start, tag = 0, web.tag(content)
        if "Range" in self.headers and self.headers.get("If-Range") == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start and web.wrong_parts:
            web.wrong_parts, start = web.wrong_parts - 1, 0
        if "Range" in self.headers:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        end = start + web.breaks.pop(0) if web.breaks else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Web]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    web = Web(server.server_address[1])
    server.RequestHandlerClass = type("Handler", (_Handler,), {"web": web})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
