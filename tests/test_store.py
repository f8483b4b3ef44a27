"""Storage: the same calls on a folder and on a real S3 server; what fails says what to do and tells no secret."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from storage import FAULTS, KEY, SECRET, Seaweed, fault_proxy

from distill.trajectory.store import PIECE_BYTES, Store, StoreError, open_store


def noise(num_bytes: int, seed: int = 0) -> bytes:
    import random

    return random.Random(seed).randbytes(num_bytes)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store" if request.param == "folder" else request.getfixturevalue("bucket"))


def test_what_is_written_is_read_listed_and_counted(store: Store, tmp_path: Path) -> None:
    big = noise(2 * PIECE_BYTES + 12345)
    (tmp_path / "big").write_bytes(big)
    store.upload(tmp_path / "big", "step_8/big")
    store.write("step_8/small", b"small")
    store.write("other", b"")
    assert [(o.path, o.size) for o in store.objects()] == [
        ("other", 0),
        ("step_8/big", len(big)),
        ("step_8/small", 5),
    ]
    assert [o.path for o in store.objects("step_8")] == ["step_8/big", "step_8/small"]
    assert store.read("other") == b""
    assert store.read("step_8/big", 7, 1007) == big[7:1007]
    within = store.under("step_8")
    assert [o.path for o in within.objects()] == ["big", "small"]
    assert within.read_many([("small", 1, 3), ("big", 0, 4), ("small", 0, 5)]) == [b"ma", big[:4], b"small"]
    before, found = store.bytes_read, bytearray(len(big) - 3)
    within.read_into("big", memoryview(found), 3, etag=store.head("step_8/big").etag)
    assert found == big[3:]
    assert store.bytes_read - before == len(found)  # those of `under` too


def test_create_and_replace_tell_who_came_first(store: Store) -> None:
    assert store.create("manifest.json", b"1")
    assert not store.create("manifest.json", b"2")
    etag = store.head("manifest.json").etag or ""
    assert store.replace("manifest.json", b"3", etag)
    assert not store.replace("manifest.json", b"4", etag)
    assert store.read("manifest.json") == b"3"


def test_missing_short_and_replaced_files_are_told_apart(store: Store) -> None:
    store.write("file", b"12345")
    etag = store.head("file").etag
    store.write("file", b"67890")
    cases: dict[str, Callable[[], object]] = {
        "missing": lambda: store.head("nothing"),
        "short": lambda: store.read("file", 0, 9),
        "changed": lambda: store.read_into("file", memoryview(bytearray(5)), etag=etag),
    }
    for kind, call in cases.items():
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.kind == kind
        assert str(caught.value).startswith(store.url)


def test_half_written_files_of_a_folder_are_not_there(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    (tmp_path / ".file.123.tmp").write_bytes(b"half")
    assert store.objects() == []
    with pytest.raises(StoreError, match="does not exist or is no folder"):
        open_store(tmp_path / "nowhere").objects()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/x", "is no kind of storage known here"),
        ("s3://", "names no bucket"),
        ("s3://user:hidden@bucket/x", "s3://bucket/x has credentials or a query in its URL"),
        ("https://host/x?sig=hidden", "has credentials or a query in its URL"),
    ],
)
def test_addresses_that_can_not_be_are_refused_without_their_secrets(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        open_store(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "n0t-the-secret"), ("AWS_ACCESS_KEY_ID", "n0body-known")]
)
def test_wrong_credentials_are_said_and_not_shown(
    name: str, value: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    store = open_store(bucket)
    calls: list[Callable[[], object]] = [
        store.objects,
        lambda: store.head("x"),
        lambda: store.read("x", 0, 1),
        lambda: store.write("x", b""),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="the credentials were refused") as caught:
            call()
        assert caught.value.kind == "denied"
        shown = "".join(traceback.format_exception(caught.value)) + repr(store) + repr(vars(store))
        assert not [secret for secret in (KEY, SECRET, value) if secret in shown.replace(bucket, "")]


def test_missing_bucket_is_told_apart_from_a_missing_file(bucket: str) -> None:
    store = open_store("s3://no-such-bucket/x")
    for call in (store.objects, lambda: store.head("x"), lambda: store.read("x", 0, 1)):
        with pytest.raises(StoreError, match="the bucket does not exist") as caught:
            call()
        assert caught.value.kind == "bucket"


def test_server_that_is_not_there_is_given_up_after_some_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"can't be reached \(.*attempts\)") as caught:
        open_store("s3://bucket", patience=0.5).objects()
    assert caught.value.kind == "unreachable"
    assert time.monotonic() - start < 30


def test_web_server_is_read_only(bucket: str, seaweed: Seaweed) -> None:
    store = open_store(f"{seaweed.address}/teacher/x")
    with pytest.raises(StoreError, match="can't be listed"):
        store.objects()
    with pytest.raises(StoreError, match="can't be written"):
        store.write("x", b"")


# ------------------------------------------------------------------------------------------------ faults


# Flipped bytes are for hashes to find, which the store does not know.
PASSING = [fault for fault in FAULTS if fault not in ("flipped", "stale")]


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_tried_again_until_the_bytes_are_right(
    fault: str, seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(PIECE_BYTES + 999, 1)
    open_store(bucket).write("file", content)
    with fault_proxy(seaweed.address, {fault: 0.3}, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        store = open_store(bucket)
        for _ in range(6):
            found = bytearray(len(content))
            store.read_into("file", memoryview(found), etag=store.head("file").etag)
            assert found == content
        assert store.read_many([("file", i, i + 9) for i in range(20)]) == [
            content[i : i + 9] for i in range(20)
        ]
        assert proxy.injected[fault] >= 5
        if fault != "latency":
            assert store.traffic.retries >= proxy.injected[fault]


def test_file_whose_creation_was_not_confirmed_is_known_as_ours(
    seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(seaweed.address, {"lost": 0.4}, seed=5) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        store = open_store(bucket)
        for name in map(str, range(12)):
            assert store.create(name, f"ours {name}".encode())
            assert not store.create(name, b"theirs")
            assert store.replace(name, b"newer", store.head(name).etag or "")
        assert proxy.injected["lost"] > 5
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.address)
    direct = open_store(bucket)
    assert {direct.read(found.path) for found in direct.objects()} == {b"newer"}


def test_all_requests_failing_ends_with_one_clear_sentence(
    seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(seaweed.address, {"503": 1.0}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        with pytest.raises(
            StoreError, match=r"x can't be reached \(503 Service Unavailable\).*\(\d attempts\)"
        ):
            open_store(bucket, patience=1).read("x", 0, 5)


def test_stale_answers_are_seen_by_the_etag(
    seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(seaweed.address, {"stale": 0.5}, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        store = open_store(bucket)
        store.write("file", b"old!!")
        store.read("file", 0, 5)
        store.write("file", b"new!!")
        etag, found = open_store(bucket).head("file").etag, bytearray(5)
        for _ in range(20):
            try:
                store.read_into("file", memoryview(found), etag=etag)
            except StoreError as error:
                assert error.kind == "changed"  # three stale answers in a row
            else:
                assert found == b"new!!"
        assert proxy.injected["stale"] > 5


def test_server_killed_while_it_is_read_and_back_again_gives_the_right_bytes(
    own_seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(12 * PIECE_BYTES, 2)
    store = open_store("s3://teacher/x")
    store.write("file", content)
    with fault_proxy(own_seaweed.address, {"latency": 1.0}, latency=0.2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        slow, found = open_store("s3://teacher/x"), bytearray(len(content))
        reader = threading.Thread(target=lambda: slow.read_into("file", memoryview(found)))
        reader.start()
        time.sleep(0.1)
        own_seaweed.kill()
        assert reader.is_alive()
        time.sleep(0.5)
        own_seaweed.start()
        reader.join(60)
    assert not reader.is_alive()
    assert found == content
    assert slow.traffic.retries > 0
