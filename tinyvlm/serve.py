"""One page and one function behind it: the HTTP of `python sample.py --serve`, by the standard library's server.

    GET  /         page.html, all of it: it loads nothing from anywhere
    GET  /about    what the page should know of the model, as JSON
    POST /ask      a line of JSON, then the bytes of a picture -> lines of JSON, each sent as soon as it is known;
                   what goes wrong is {"error": a sentence}, and the server goes on

By default only this machine can connect. But so can any web site that is open in its browser, by two tricks: a request
from its own page (which then has the site's name as Origin), and a name of its own that suddenly leads to 127.0.0.1
("DNS rebinding": then it stands in Host). Both headers are compared. Left out: encryption, passwords, several models.
"""
import contextlib
import json
import re
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .config import UserError, out_of_memory

MAX_BYTES = 50_000_000              # of a picture: more than any photograph, less than what would fill memory or disk
PAGE = Path(__file__).with_name("page.html")
HEADERS = {     # the page may load nothing from elsewhere, and no other site's page may show or read what is sent
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                               "img-src blob: data:; connect-src 'self'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class Refused(UserError):
    """A request that gets this HTTP status and this sentence."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One request. The server has what it needs: about, act, host, and the lock that lets one in at a time."""
    timeout = 30                        # seconds without a byte from the other side
    disable_nagle_algorithm = True      # a word is sent at once, not when the next one fills the packet
    begun = False

    def do_GET(self):
        with self.sentences():
            self.check_sender()
            if self.path == "/about":
                self.send(self.server.about)
            elif self.path == "/":
                self.begin(200, "text/html; charset=utf-8")
                self.wfile.write(PAGE.read_bytes())
            else:
                raise Refused(404, "there is nothing at this address; the page is at /")

    def do_POST(self):
        with self.sentences():
            self.check_sender()
            if self.path != "/ask":
                raise Refused(404, "there is nothing at this address; questions go to /ask")
            asked, data = self.body()
            with self.server.lock:
                self.server.act(asked, data, self.send)

    def check_sender(self):
        """Refuse other sites' pages. A Host that is an address, not a name, cannot have been led here by a stranger."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not re.fullmatch(rf"(localhost|[\d.]+|\[[\da-f:]+\]|{re.escape(self.server.host)})(:\d+)?", host):
            raise Refused(403, f"this page is not served as {host[:60]!r}; open the address that was printed")
        if origin not in (None, f"http://{host}"):
            raise Refused(403, "another site's page asked, and only this page may; open the address that was printed")

    def body(self):
        """A line of JSON, {option: value}, and all bytes behind it."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,15}", length):
            raise Refused(411, "the request does not tell its length")
        if int(length) > MAX_BYTES:
            raise Refused(413, f"the picture has more than {MAX_BYTES // 10 ** 6} MB; make it smaller")
        line, _, data = self.rfile.read(int(length)).partition(b"\n")
        try:
            asked = json.loads(line)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise Refused(400, "the request does not begin with a line of JSON, {option: value}")
        return asked, data

    def begin(self, status, kind):
        """Status and headers. The end of the body is the end of the connection: HTTP/1.0."""
        self.begun = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, row, status=200):
        """One row, as a line of JSON, at once."""
        if not self.begun:
            self.begin(status, "application/x-ndjson")
        self.wfile.write(json.dumps(row).encode() + b"\n")

    @contextlib.contextmanager
    def sentences(self):
        """Whatever goes wrong within is a sentence on the page; and a bug's traceback is on the terminal."""
        try:
            try:
                yield
            except UserError as error:
                self.send({"error": str(error)}, getattr(error, "status", 400))
            except (ConnectionError, TimeoutError):
                raise
            except Exception as error:
                traceback.print_exc()
                why = "memory ran out" if out_of_memory(error) else "a mistake in the program, which its terminal shows"
                self.send({"error": f"this did not work ({why}); try something else"}, 500)
        except (ConnectionError, TimeoutError):                 # the page was closed, or has asked something else
            pass

    def log_message(self, *args):
        """No line for each request."""


def make_server(about, act, host, port):
    """-> a server that listens, but does not answer yet. Raises UserError where that is impossible."""
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(f"no page can be at {host}, port {port} ({error.strerror}); give another --port") from None
    server.about, server.act, server.host, server.lock = about, act, host, threading.Lock()
    return server


def serve(about, act, host, port):
    """Answer until Ctrl-C. act(asked, data, send): see sample.page."""
    with make_server(about, act, host, port) as server:
        if not host.startswith("127.") and host != "localhost":
            print(f"warning: --host {host} lets everybody who reaches this machine use the model, and see the pictures "
                  "of --images, without a password", file=sys.stderr)
        print(f"the page is at http://{host}:{server.server_port}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
