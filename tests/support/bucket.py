"""A real S3-speaking server on this machine, with one empty bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from uuid import uuid4

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Serves while this is open: the bucket's URL, and the environment with which any client finds it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    name = f"hypha-{uuid4().hex}"  # the server's buckets are those of the whole process
    try:
        client.create_bucket(Bucket=name)
        yield f"s3://{name}", MappingProxyType(environment)
    finally:
        client.close()
        server.stop()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``s3://<bucket>`` for this process."""
    with s3_server() as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # clients of an earlier test, with that test's server
        fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()
        yield url
