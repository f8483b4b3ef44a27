"""The part of `trajectory.py` that fetches a checkpoint: the streaming cache next to the fastest client."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import torch
from obstore.store import S3Store
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from measure import status_bytes  # noqa: E402
from storage import BUCKET, KEY, SECRET, Seaweed  # noqa: E402

from distill.distributed import start  # noqa: E402
from distill.trajectory.cache import Cache  # noqa: E402
from distill.trajectory.fetch import Fetcher  # noqa: E402
from distill.trajectory.landing import Landing  # noqa: E402
from distill.trajectory.manifest import Manifest, describe  # noqa: E402
from distill.trajectory.nodes import Nodes  # noqa: E402
from distill.trajectory.publish import publish  # noqa: E402
from distill.trajectory.store import open_store  # noqa: E402
from distill.trajectory.tensors import TensorInfo, read_header, view_of  # noqa: E402

CHUNK, WORKERS, SHARDS = 8 << 20, 16, 4


def timed(work: Callable[[], Any], seconds: list[float]) -> None:
    os.sync()  # else the disk slows whoever comes after a few GB that were written
    begin = time.perf_counter()
    work()
    seconds.append(time.perf_counter() - begin)


def extra_memory_mb(work: Callable[[], Any]) -> float:
    """By how much the anonymous memory of this process rose at most, sampled; the page cache is not its own."""
    before, peak, done = status_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], status_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(peak[0] - before, 0) / 1e6


def make_checkpoint(folder: Path, megabytes: int) -> Manifest:
    """A checkpoint of `megabytes` MB in 4 shards of 16 MiB bf16 tensors, with its manifest."""
    source = folder / "source" / "step_1"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    per_shard = max(megabytes // 16 // SHARDS, 1)
    for shard in range(SHARDS):
        tensors = {f"{shard}.{i}": torch.randn(2048, 4096).bfloat16() for i in range(per_shard)}
        save_file(tensors, source / f"model-{shard}.safetensors", {"format": "pt"})
    manifest = Manifest(open_store(folder / "source"), "distill", "none", 1)
    manifest.add(describe(source, "step_1", 1))
    return manifest


async def into_tensors(
    client: S3Store, prefix: str, layout: dict[str, dict[str, TensorInfo]], into: Any
) -> None:
    """The fastest client of those measured: single ranged requests, each into its place."""
    slots = asyncio.Semaphore(WORKERS)

    async def piece(key: str, view: memoryview, begin: int, end: int) -> None:
        async with slots:
            view[:] = memoryview(await obstore.get_range_async(client, key, start=begin, end=end))

    work = []
    for name, tensors in layout.items():
        for tensor, info in tensors.items():
            view = memoryview(into[tensor].view(torch.uint8).numpy().reshape(-1))
            for at in range(info.start, info.stop, CHUNK):
                end = min(at + CHUNK, info.stop)
                work.append(piece(f"{prefix}/{name}", view[at - info.start : end - info.start], at, end))
    await asyncio.gather(*work)


def measure_fetch(server: Seaweed, folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    make_checkpoint(folder, megabytes)
    there = publish(folder / "source", f"s3://{BUCKET}/fetch")
    checkpoint, store = there.checkpoints[1], there.files_of(1)
    client = S3Store(
        BUCKET,
        endpoint=server.address,
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "120s"},
    )
    layout = {
        name: read_header(lambda a, b, name=name: store.read(name, a, b), checkpoint.files[name][0])  # type: ignore[misc]
        for name in checkpoint.shards
    }
    into = {t: torch.zeros(i.shape, dtype=i.dtype) for infos in layout.values() for t, i in infos.items()}
    names = ("client", "fetch", "hashed", "verified", "staged")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    nodes = Nodes(start(), "here")
    (folder / "plain").mkdir()

    def fetch_only() -> dict[str, torch.Tensor]:
        """What a fetch does but for the hash: into the cache's files, which the tensors are views of."""
        tensors = {}
        for name, infos in layout.items():
            size = checkpoint.files[name][0]
            landing = Landing(folder / "plain" / name, size, False)
            store.read_into(name, landing.part(0, size), etag=store.head(name).etag)
            landing.close()
            tensors |= {tensor: view_of(landing.bytes, info) for tensor, info in infos.items()}
        return tensors

    def client_only() -> None:
        asyncio.run(into_tensors(client, "fetch/step_1", layout, into))

    def client_hashed() -> None:
        client_only()
        for tensor in into.values():
            hashlib.sha256(tensor.view(torch.uint8).numpy()).digest()

    def verified(cache: Cache) -> None:
        with Fetcher(there, nodes, cache, in_place=False).at_hand(1):
            pass

    def staged(cache: Cache) -> None:
        with Fetcher(there, nodes, cache, in_place=False).at_hand(1) as entry:
            for name, infos in layout.items():
                buffer = Landing(entry / name, checkpoint.files[name][0], True).bytes
                for tensor, info in infos.items():
                    into[tensor].view(-1).copy_(view_of(buffer, info))

    def in_new_cache(work: Callable[[Cache], None], measured: Callable[[Callable[[], None]], Any]) -> Any:
        cache = Cache(folder / "cache", 100 * 10**9)
        result = measured(lambda: work(cache))
        for entry in list(cache.folder.iterdir()):
            cache.remove(entry.name)
        return result

    memory = in_new_cache(verified, extra_memory_mb)
    for _ in range(repeats):
        timed(client_only, seconds["client"])
        timed(client_hashed, seconds["hashed"])
        in_new_cache(
            verified, lambda run: run()
        )  # where the host takes free memory back, it is cold at first
        for name, work in (("verified", verified), ("staged", staged)):
            in_new_cache(work, lambda run, name=name: timed(run, seconds[name]))  # type: ignore[misc]
        timed(fetch_only, seconds["fetch"])
    least = {name: min(values) for name, values in seconds.items()}
    return {
        "megabytes": round(checkpoint.num_bytes / 1e6),
        **{f"{name}_seconds": round(value, 3) for name, value in least.items()},
        **{f"{n}_ratio": round(least["client"] / least[n], 3) for n in ("fetch", "verified", "staged")},
        "verified_ratio_to_hashed": round(least["hashed"] / least["verified"], 3),
        "extra_memory_mb": round(memory, 1),
        "shard_mb": round(checkpoint.num_bytes / SHARDS / 1e6, 1),
    }
