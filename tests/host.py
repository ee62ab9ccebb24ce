"""A host on this machine that answers every connection alike: another service, a proxy, a login page."""

from __future__ import annotations

import re
import socket
import threading


def http(status, body=b"", **headers):
    """One reply, after which the connection ends."""
    content = body if isinstance(body, bytes) else body.encode()
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(content)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + content


class Host:
    """Answers every connection with fixed bytes, over TLS where asked, and keeps what it was sent.

    A list has the bytes for each connection; the last ones are for all that follow.
    """

    def __init__(self, reply, context=None):
        self._reply, self._context = reply, context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.got = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    self._answer(connection)
                except OSError:  # the other side gave up
                    continue

    def _answer(self, connection):
        connection.settimeout(60)
        if self._context:
            connection = self._context.wrap_socket(connection, server_side=True)
        with connection:
            got = b""
            while not _is_whole(got):
                piece = connection.recv(65536)
                if not piece:
                    return
                got += piece
            self.got.append(got)
            replies = self._reply if isinstance(self._reply, list) else [self._reply]
            connection.sendall(replies[min(len(self.got), len(replies)) - 1])
            while connection.recv(65536):  # the other side closes first, so that nothing is lost
                pass

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


def _is_whole(got):
    head, end, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *([0-9]+)", head)
    return bool(end) and len(body) >= int(length[1] if length else 0)
