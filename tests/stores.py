"""A real S3 server of this process (moto), and what lies in it as another client than the package's sees it."""

from __future__ import annotations

import contextlib
import logging
import os

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


class S3:
    """A server on 127.0.0.1 that can be taken away and comes back with what it held."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key-of-a-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self):
        return boto3.client(
            "s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
            aws_access_key_id="key-of-a-test", aws_secret_access_key="secret-of-a-test",
        )  # fmt: skip

    def objects(self, prefix):
        """Name under a prefix → bytes; the empty objects that stand for folders are left out."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        read = self.client().get_object
        return {
            key.removeprefix(f"{prefix}/"): read(Bucket=BUCKET, Key=key)["Body"].read()
            for key in keys
            if not key.endswith("/")
        }

    def checkpoints(self, prefix):
        """Names of the complete ones."""
        return sorted(name.split("/")[0] for name in self.objects(prefix) if name.endswith("/manifest.json"))

    def down(self):
        self._server.stop()

    def up(self):
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()


@pytest.fixture
def s3(monkeypatch):
    """An S3 server with an empty bucket, in this process's environment."""
    server = S3()
    server.client().create_bucket(Bucket=BUCKET)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN")]:
        monkeypatch.delenv(name)
    yield server
    with contextlib.suppress(RuntimeError):  # it is down
        server.down()
    for backend in s3_backends.values():  # they are this process's, not the server's
        for one in backend.values():
            one.reset()
