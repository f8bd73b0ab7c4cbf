"""A store's folder: what is put there is there, and what a client raises is one line with key, object and reason."""

import shutil
import time
from importlib.util import find_spec

import pytest

from adalora_scale.errors import UserError
from adalora_scale.store.address import check_address
from adalora_scale.store.client import Store, StoreError
from tests.stores import BUCKET, s3  # noqa: F401

KEY = "training.output_store"


@pytest.fixture(params=["s3", "file"])
def store(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Store(KEY, f"s3://{BUCKET}/deep/run/")
    return Store(KEY, f"file://{tmp_path}/deep/run")


def test_objects_are_put_read_listed_and_deleted(store, tmp_path):
    """The same on a store that has folders and on one that has none."""
    store.probe()
    assert store.names() == {} and store.names("none") == {} and store.read("none") is None
    content = bytes(range(256)) * 70_000  # more than a part of S3's
    (tmp_path / "big").write_bytes(content)
    store.put(tmp_path / "big", "a/big")
    store.write("a/small", b"x")
    store.write("top", b"yz")
    assert store.names() == {"a": None, "top": 2} and store.names("a") == {"big": len(content), "small": 1}
    store.get("a/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content and store.read("a/small") == b"x"
    store.copy("a/small", "b/small")
    store.remove("a/small")
    store.remove("a/small")
    store.remove_folder("b")
    assert store.names("a") == {"big": len(content)} and not store.names("b")
    with pytest.raises(StoreError, match=r"training\.output_store=.*: a/none cannot be read"):
        store.get("a/none", tmp_path / "none")


def answer(url):
    begun = time.monotonic()
    with pytest.raises(StoreError) as caught:
        Store(KEY, url).probe()
    assert time.monotonic() - begun < 20 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_grows_while_it_is_put_is_put(store, tmp_path, monkeypatch):
    """A run appends to its records while they are uploaded; else the checkpoint behind them waits for the next."""
    records = tmp_path / "records"
    records.write_bytes(b"1\n")
    copy = shutil.copyfileobj

    def appended(source, target, *more):
        with records.open("ab") as file:
            file.write(b"2\n")
        copy(source, target, *more)

    monkeypatch.setattr(shutil, "copyfileobj", appended)
    store.put(records, "records")
    assert store.read("records") == b"1\n2\n"


def test_bytes_that_are_lost_on_the_way_are_missed(store, tmp_path, monkeypatch):
    (tmp_path / "records").write_bytes(b"12345")
    monkeypatch.setattr(shutil, "copyfileobj", lambda source, target, *more: target.write(source.read()[:3]))
    with pytest.raises(StoreError, match="3 of 5 bytes arrived"):
        store.put(tmp_path / "records", "records")


def test_what_a_store_refuses_is_one_line_with_the_key(s3, monkeypatch):  # noqa: F811
    said = answer("s3://no-such-bucket/run")
    assert (
        "training.output_store=s3://no-such-bucket/run" in said and "NO_SUCH_BUCKET" in said and "AWS_PROFILE" in said
    )
    store = Store(KEY, f"s3://{BUCKET}/run")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # the server looks at credentials now
    said = answer(f"s3://{BUCKET}/run")
    assert "INVALID_ACCESS_KEY_ID" in said and s3.environment["AWS_SECRET_ACCESS_KEY"] not in said
    with pytest.raises(StoreError, match="cannot be listed"):  # and not an empty folder
        store.names()
    with pytest.raises(StoreError, match="cannot be read"):
        store.read("manifest.json")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect to server" in answer(f"s3://{BUCKET}/run")
    with pytest.raises(StoreError, match="cannot be listed"):
        Store(KEY, f"s3://{BUCKET}/run").names()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"training.output_store=file://{tmp_path}/file/run" in answer(f"file://{tmp_path}/file/run")


REFUSED = {
    "runs/a": "is not the URL of a store",
    "s3:/bucket/run": "is not the URL of a store",
    "s3://": "is not the URL of a store",
    "memory://run": "is gone with the process",
    "file://run": "is not a whole path",
    "file://": "is not the URL of a store",
    "s4://bucket/run": "no store of kind 's4' is known. Did you mean 's3'?",
    "gs://bucket/run": "needs a package that is not here: pip install gcsfs",
    "abfs://container@account.dfs.core.windows.net/run": "pip install adlfs",
    "oci://bucket@namespace/run": "pip install ocifs",
    "s3://key:hunter2@bucket/run": "holds a user or password",
    "s3://hunter2@bucket/run": "holds a user or password",
    "sftp://me:hunter2@host/run": "holds a user or password",
    "s3://bucket/run?secret_key=hunter2": "has options behind ? or #",
    "s3://bucket/run#hunter2": "has options behind ? or #",
    "s3://me:hun@ter2@bucket/run": "holds a user or password",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_can_be_no_store_is_refused_before_it_is_asked(url):
    """A password in a URL would stand in run.json, in the model card's command and in every log."""
    package = REFUSED[url].partition("pip install ")[2]
    if package and find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError) as caught:
        check_address(KEY, url)
    said = str(caught.value)
    assert said.startswith(KEY) and REFUSED[url] in said and "\n" not in said
    assert "hunter2" not in said and "ter2" not in said


def test_what_can_be_one_is_not():
    for url in ("s3://bucket/run", "S3://bucket", "s3a://bucket/a/b", "file:///mnt/store/run#1"):
        check_address(KEY, url)
