"""Behind a proxy the proxy looks names up: an image is downloaded whatever its host resolves to here."""

import asyncio
import contextlib
import socket
import ssl
import threading

import pytest
import trustme

from langchain_cogview import CogViewImageGenerator
from tests.conftest import FAKE_KEY
from tests.faults.server import IMAGE, FaultServer

HOST = "images.example"
both = pytest.mark.parametrize("how", ["invoke", "ainvoke"])


class TunnellingProxy:
    """A proxy that leads every CONNECT to one port of this machine.

    Attributes:
        targets: What it was asked to connect to.
    """

    def __init__(self, port):
        self.targets = []
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._tunnel, args=(sock,), daemon=True).start()

    def _tunnel(self, sock):
        with sock, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(4096)
            self.targets.append(head.split(b" ")[1].decode())
            with socket.create_connection(("127.0.0.1", self._to)) as inside:
                sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=self._pump, args=(inside, sock), daemon=True)
                back.start()
                self._pump(sock, inside)
                back.join(5)

    @staticmethod
    def _pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self):
        self._listener.close()


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def proxy(authority, tmp_path, monkeypatch):
    """A proxy of the environment, behind which every host is one with a trusted certificate and a good image."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST, "198.18.0.5", "10.0.0.5", "127.0.0.2").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with FaultServer(tls=context) as images, contextlib.closing(TunnellingProxy(images.port)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        yield proxy


def generated(url, how, **settings):
    """An image whose link is `url`, from a service on this machine."""
    with FaultServer(lambda connection, _: connection.json({"data": [{"url": url}]})) as service:
        generator = CogViewImageGenerator(
            base_url=service.base_url, api_key=FAKE_KEY, download=True, timeout=100, **settings
        )
        result = generator.invoke("x") if how == "invoke" else asyncio.run(generator.ainvoke("x"))
        generator.close()  # the connection through the tunnel, too
    return result.images[0], result.warnings


@both
@pytest.mark.parametrize("address", ["198.18.0.5", "10.0.0.5", "127.0.0.2", None])
def test_the_proxy_downloads_an_image_whatever_its_host_resolves_to_here(address, how, proxy, monkeypatch):
    looked_up, look_up = [], socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        if host != HOST:
            return look_up(host, port, *args, **kwargs)
        looked_up.append(host)
        if address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    image, warnings = generated(f"https://{HOST}/a.png", how)
    assert (image.local_bytes(), list(warnings)) == (IMAGE, [])
    assert proxy.targets == [f"{HOST}:443"]
    assert looked_up == []


@both
@pytest.mark.parametrize("address", ["198.18.0.5", "10.0.0.5", "127.0.0.2"])
def test_the_proxy_is_not_asked_for_an_address_in_the_link_that_is_not_public(address, how, proxy):
    image, warnings = generated(f"https://{address}/a.png", how)
    assert image.local_bytes() is None
    assert image.url == f"https://{address}/a.png"
    assert warnings
    assert proxy.targets == []
