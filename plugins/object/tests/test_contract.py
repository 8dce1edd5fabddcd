"""The contract of every tier, over a server, over files and over memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorway.testing.offload_tiers import TierSuite
from tensorway_object.testing.servers import S3, options_at


class TestOverS3(TierSuite):
    name = "object"

    @pytest.fixture(autouse=True)
    def _server(self, s3: S3, bucket: str, tmp_path: Path) -> None:
        # Beside the folder, all of whose files a test damages.
        tmp_path.with_suffix(".server").write_text(f"{s3.port} s3://{bucket}/prefix")

    @classmethod
    def options_in(cls, folder: Path) -> dict[str, object]:
        port, url = folder.with_suffix(".server").read_text().split()
        return options_at(int(port), url)


class TestOverFiles(TierSuite):
    name = "object"

    @pytest.fixture(autouse=True)
    def _library(self, library: object) -> None:
        """obstore is needed."""

    @classmethod
    def options_in(cls, folder: Path) -> dict[str, object]:
        return {"url": f"file://{folder}/store"}


class TestOverMemory(TierSuite):
    name = "object"

    @pytest.fixture(autouse=True)
    def _library(self, library: object) -> None:
        """obstore is needed."""

    @classmethod
    def options_in(cls, folder: Path) -> dict[str, object]:
        return {"url": f"memory://{folder.name}"}
