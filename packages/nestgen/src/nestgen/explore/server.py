"""A page's server: on 127.0.0.1 only, and only for those who have the address with its token."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nestgen.errors import UserError

HOST = "127.0.0.1"
LONGEST = 2**25  # bytes of a request, in which an image may be
PAGE = Path(__file__).with_name("page.html")
FORBIDDEN = "open the whole address that nestgen explore printed"

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


class Server(ThreadingHTTPServer):
    """Answers GET / with the page and POST /NAME, a JSON object, with `answer(NAME, object)`."""

    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        self.answer, self.token = answer, secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}); leave --port out for a free one") from None

    @property
    def address(self) -> str:
        """The page's address, with the token."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Sends the page."""
        url = urlsplit(self.path)
        if url.path != "/":
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")
        elif not self._allowed(parse_qs(url.query).get("token", [""])[0]):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", FORBIDDEN.encode())
        else:
            nonce = secrets.token_urlsafe(16)
            page = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), {"Content-Security-Policy": policy})

    def do_POST(self) -> None:
        """Sends the answer to a request of the page."""
        length = self.headers.get("Content-Length", "")
        # Read in any case: closing the connection on what was not read could take the answer with it.
        body = self.rfile.read(min(int(length), 2 * LONGEST)) if length.isdecimal() else b""
        if self._allowed(self.headers.get("X-Token", "")):
            status, answer = self._answer(body)
        else:
            status, answer = HTTPStatus.FORBIDDEN, {"error": FORBIDDEN}
        self._send(status, "application/json", json.dumps(answer).encode())

    def _answer(self, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        try:
            if len(body) > LONGEST:
                raise ValueError(f"the request is longer than {LONGEST} bytes")
            request = json.loads(body)
            if not isinstance(request, dict):
                raise TypeError("a request is a JSON object")
            return HTTPStatus.OK, self.server.answer(self.path.lstrip("/"), request)
        # The last two: no space for a brought image, and torch's errors, such as a full GPU.
        except (TypeError, ValueError, AttributeError, UserError, OSError, RuntimeError) as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}

    def _allowed(self, token: str) -> bool:
        """Whether a request has the token and is for this address, not one that another name was made to lead to."""
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        return known and self.headers.get("Host") in names

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        try:
            self.send_response(status)
            for name, value in (fixed | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the page was closed
            pass

    def log_message(self, format: str, *arguments: object) -> None:
        """Prints nothing: the address has the token."""
