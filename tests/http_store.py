"""A folder behind HTTP on this machine, by a server that is slow and unreliable in the ways that it is told to be."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Store:
    """What the server does; `faults` maps the end of a path to a list of what befalls one request after another.

    Faults are an error code, "reset" and "cut" (the connection ends before anything, or in the middle), "flip" (a byte
    in the middle is another), "longer" (bytes behind the end) and "all" (the range that was asked for is ignored).
    """

    def __init__(self, folder, latency=0.0):
        self.folder, self.latency = folder, latency
        self.faults, self.requests, self.sent = {}, Counter(), 0
        self.lock = threading.Lock()

    def fault(self, path):
        with self.lock:
            self.requests[path] += 1
            waiting = next((faults for end, faults in self.faults.items() if path.endswith(end)), [])
            return waiting.pop(0) if waiting else None


@contextmanager
def http_store(folder, latency=0.0):
    """A Store that serves `folder`, and `store.url`."""
    store = Store(folder, latency)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"store": store}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        store = self.store
        time.sleep(store.latency)
        fault = store.fault(self.path)
        path = store.folder / self.path.lstrip("/")
        if fault == "reset":
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content = path.read_bytes()
        offset = int(self.headers.get("Range", "bytes=0-")[6:-1]) if fault != "all" else 0
        if offset >= len(content) > 0:
            self.send_error(416)
            return
        part = bytearray(content[offset:])
        if fault == "flip":
            part[len(part) // 2] ^= 1
        if fault == "longer":
            part += b"more"
        self.send_response(206 if "Range" in self.headers and fault != "all" else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        part = part[: len(part) // 2] if fault == "cut" else part
        store.sent += len(part)
        self.wfile.write(part)

    def log_message(self, *arguments):
        pass
