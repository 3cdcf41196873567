"""A web server inside the test: each test writes what it answers, and reads afterwards which requests came.

A page is a function of the request's handler. `send` makes one from a body, `in_turn` one from several, and `answer` is
for those written by hand. Headers are keywords with _ for -: send(b"..", ETag='"v1"', Retry_After="7").
"""
import http.server
import sys
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = property(lambda self: self.server.protocol)
    disable_nagle_algorithm = True      # head and body are written apart: the second would wait for the first's ACK

    def do_GET(self):
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        self.server.pages.get(self.path.partition("?")[0], send(status=404))(self)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


class Host(http.server.ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1, at `url`, until the `with` ends.

    pages: path (without its query) -> page; seen: every (method, path, headers) that came, in order.
    protocol: HTTP/1.1 keeps connections, HTTP/1.0 ends each after its answer, so that a short body is seen at once.
    """

    def __init__(self, protocol="HTTP/1.1"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.protocol, self.pages, self.seen = protocol, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):          # a client that hangs up is often the point
            super().handle_error(request, address)

    def gets(self, header):
        """What each GET request so far had in one header."""
        return [headers.get(header) for method, _, headers in self.seen if method == "GET"]


def answer(handler, status=200, body=b"", **headers):
    handler.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def send(body=b"", status=200, **headers):
    return lambda handler: answer(handler, status, body, **headers)


def in_turn(*pages):
    """The first request gets the first page and so on; the last page stays."""
    rest = list(pages)
    return lambda handler: (rest.pop(0) if len(rest) > 1 else rest[0])(handler)


def raw(data):
    """Exactly these bytes, then the connection ends: for answers that are not HTTP as it should be."""
    def page(handler):
        handler.close_connection = True
        handler.wfile.write(data)
    return page


# Answers that no client should believe. Each would bring b"good" or nothing; none of them ends as HTTP demands.
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MALFORMED = {
    "silence": b"", "garbage": b"\x16\x03\x01 hello\r\n\r\n", "odd status": b"HTTP/1.1 two OK\r\n\r\n",
    "head cut after a line": OK + b"X: 1\r\n", "line too long": OK + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
    "too many lines": OK + b"X: 1\r\n" * 200 + b"\r\n",
    "line without colon": OK + b"X\r\nContent-Length: 9\r\n\r\ngood", "no end told": OK + b"\r\ngood",
    "short": OK + b"Content-Length: 9\r\n\r\ngood", "length no number": OK + b"Content-Length: four\r\n\r\ngood",
    "negative length": OK + b"Content-Length: -4\r\n\r\ngood",
    "two lengths": OK + b"Content-Length: 4\r\nContent-Length: 9\r\n\r\ngood",
    "no last chunk": CHUNKED + b"4\r\ngood\r\n", "chunk size no number": CHUNKED + b"4\r\ngood\r\nzz\r\n",
    "chunk of size -1": CHUNKED + b"-1\r\ngood", "packed": OK + b"Content-Encoding: x\r\nContent-Length: 4\r\n\r\ngood",
    "a part of it": b"HTTP/1.1 206 OK\r\nContent-Range: bytes 4-7/8\r\nContent-Length: 4\r\n\r\ngood",
    "redirect to no address": b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
    "redirect to no text": b"HTTP/1.1 302 Found\r\nLocation: /\xff\xfe\r\nContent-Length: 0\r\n\r\n"}
