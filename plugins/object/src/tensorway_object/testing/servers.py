"""A server that speaks S3, in a process of its own: moto's. May import the core's testing room; needs moto[server]."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

from tensorway.testing.servers import Server


class S3(Server):
    """Buckets in its memory; it believes every signature."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request as it is, without obstore: its status and its answer."""
        return ask(self.port, method, path, body)

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        status, said = self.ask("PUT", f"/{name}")
        assert status == 200, said
        return f"s3://{name}"

    def names(self, bucket: str) -> list[str]:
        """Of all objects in a bucket."""
        _, said = self.ask("GET", f"/{bucket}?list-type=2&max-keys=1000")
        return [part.partition(b"</Key>")[0].decode() for part in said.split(b"<Key>")[1:]]


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request to a server of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def options_at(port: int, url: str, **options: object) -> dict[str, object]:
    """What makes a tier speak to a server of this machine."""
    return {
        "url": url,
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "allow_http": True,
        "config": {"access_key_id": "nobody", "secret_access_key": "a key of the tests"},
        **options,
    }
