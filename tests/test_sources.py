"""Indexing and pulling from where checkpoints lie: folders, object storage, web servers, the hub, caches of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import hub_of
from safetensors.torch import load_file
from trajectories import NAMES, STEPS, copy_as, pickle_weights, shards_of, train_checkpoints

from data_prep.files import sha256_of
from distill.__main__ import main
from distill.trajectory.audit.report import audit
from distill.trajectory.audit.verdicts import store_audit
from distill.trajectory.index import index_trajectory
from distill.trajectory.manifest import BadTrajectory, Manifest, load_manifest
from distill.trajectory.pull import pull
from distill.trajectory.show import difference_lines, size_text
from distill.trajectory.store import StoreError, open_store

REPOSITORY = "EleutherAI/pythia-tiny"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` and `sharded` checkpoints by their steps; never written to."""
    return train_checkpoints(tmp_path_factory.mktemp("checkpoints"), "llama")


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    return copy_as(checkpoints / "sharded", tmp_path / "source", "pythia")


def hashes(manifest: Manifest) -> dict[int, dict[str, list[object]]]:
    return {step: checkpoint.files for step, checkpoint in manifest.checkpoints.items()}


# ------------------------------------------------------------------------------------------------ the hub


def test_repository_of_the_hub_is_indexed_by_revision_audited_and_pulled(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = {NAMES["pythia"](step): checkpoints / "whole" / str(step) for step in STEPS}
    branches["main"] = branches["step64"]
    with hub_of({REPOSITORY: branches}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        manifest = index_trajectory(f"hf://{REPOSITORY}", tmp_path / "index")
        assert list(manifest.checkpoints) == list(STEPS)
        known = manifest.checkpoints[16]
        assert known.location == f"hf://{REPOSITORY}@{hub.commit(REPOSITORY, 'step16')}"
        assert known.tokens == 16 * 2_097_152
        weights = checkpoints / "whole" / "16" / "model.safetensors"
        # The hub tells the hash of large files: nothing of them was read.
        assert known.files["model.safetensors"] == [weights.stat().st_size, sha256_of(weights)]
        assert manifest.store.bytes_read < weights.stat().st_size
        assert audit(load_manifest(tmp_path / "index")).bad == {}
        local = pull(manifest, tmp_path / "pulled", [8, 16])
        assert hashes(local) == {step: manifest.checkpoints[step].files for step in (8, 16)}
    assert sha256_of(tmp_path / "pulled" / "step_00000016" / "model.safetensors") == sha256_of(weights)


def test_closed_repository_needs_the_token_which_goes_nowhere_else(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = {f"step{step}": checkpoints / "whole" / str(step) for step in (8, 16)}
    with hub_of({REPOSITORY: branches}, token="t0ken") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        with pytest.raises(StoreError, match=r"may not be read \(status 401\): .*HF_TOKEN"):
            index_trajectory(f"hf://{REPOSITORY}", tmp_path / "index")
        monkeypatch.setenv("HF_TOKEN", "t0ken")
        hub.failures = 2  # passes by itself
        manifest = index_trajectory(f"hf://{REPOSITORY}", tmp_path / "index")
        pull(manifest, tmp_path / "pulled", [8])
        assert not hub.elsewhere_saw_token
    assert "t0ken" not in (tmp_path / "index" / "manifest.json").read_text()
    with pytest.raises(StoreError, match="can't be reached"):
        monkeypatch.setattr("distill.trajectory.hub.ATTEMPTS", 1)
        index_trajectory(f"hf://{REPOSITORY}", tmp_path / "index")


def test_repository_that_is_missing_and_a_manifest_without_a_place_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        with pytest.raises(StoreError, match="hf://nobody/nothing does not exist"):
            index_trajectory("hf://nobody/nothing", tmp_path)
    with pytest.raises(ValueError, match="can't be written: give --out FOLDER"):
        index_trajectory(f"hf://{REPOSITORY}")


def test_repositories_of_multiberts_are_one_trajectory(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"google/multiberts-seed_{seed}-step_{step}k" for seed in (0, 1) for step in (0, 20, 40)}
    repositories = {name: {"main": checkpoints / "whole" / "8"} for name in [*names, "google/multiberts-x"]}
    with hub_of(repositories) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        manifest = index_trajectory("hf://google/multiberts-seed_0-step_*", tmp_path)
    assert (manifest.family, list(manifest.checkpoints)) == ("multiberts", [0, 20_000, 40_000])


def cache_of(root: Path, repository: str, branches: dict[str, Path]) -> Path:
    """What the hub's own client leaves on a disk: blobs, and links to them by commit."""
    cached = root / f"models--{repository.replace('/', '--')}"
    for number, (branch, source) in enumerate(branches.items()):
        commit = f"{number:040x}"
        (cached / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (cached / "refs" / branch).write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "blobs").mkdir(exist_ok=True)
        for path in source.iterdir():
            blob = cached / "blobs" / sha256_of(path)
            shutil.copy(path, blob)
            (cached / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob.name}")
    return cached


def test_local_cache_of_the_hub_is_read_where_it_lies(checkpoints: Path, tmp_path: Path) -> None:
    branches = {"main": checkpoints / "whole" / "64"}
    branches |= {f"step{step}": checkpoints / "whole" / str(step) for step in STEPS}
    cached = cache_of(tmp_path, REPOSITORY, branches)
    manifest = index_trajectory(cached)
    assert (manifest.family, list(manifest.checkpoints)) == ("pythia", list(STEPS))
    assert audit(manifest).bad == {}


def test_local_cache_of_many_repositories_is_read_by_their_names(checkpoints: Path, tmp_path: Path) -> None:
    for step in (8, 16):
        source = {"main": checkpoints / "whole" / str(step)}
        cache_of(tmp_path, f"google/multiberts-seed_3-step_{step}k", source)
    manifest = index_trajectory(tmp_path)
    assert (manifest.family, list(manifest.checkpoints)) == ("multiberts", [8000, 16_000])


# ------------------------------------------------------------------------------------------------ other places


def test_object_storage_is_indexed_without_its_weights_and_with_them_on_request(
    bucket: str, folder: Path
) -> None:
    store = open_store(bucket)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.upload(path, path.relative_to(folder).as_posix())
    here, there = index_trajectory(folder), index_trajectory(bucket)
    shards = here.checkpoints[8].shards
    assert len(shards) > 1
    assert all(there.checkpoints[8].files[name][1] is None for name in shards)
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert there.store.bytes_read < weights / 4  # all tokenizers are one
    assert list(difference_lines(here, there)) == []
    assert hashes(index_trajectory(bucket, full=True)) == hashes(here)
    manifest = load_manifest(bucket)
    manifest.checkpoints[8] = dataclasses.replace(manifest.checkpoints[8], validation_loss=2.5)
    manifest.write()
    again = index_trajectory(bucket)  # what is known of unchanged files stays known
    assert (again.losses, hashes(again)) == ({8: 2.5}, hashes(here))


def test_web_server_with_a_manifest_is_audited_and_pulled_from(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = index_trajectory(folder)
    with hub_of({}) as server:
        manifest = load_manifest(f"{server.address}/cdn{folder}")
        found = audit(manifest)
        assert found.bad == {}
        store_audit(manifest.store, found)
        assert "the audit is not kept, so training does not know of it" in caplog.text
        assert hashes(pull(manifest, tmp_path / "pulled", [8])) == {8: here.checkpoints[8].files}


@pytest.fixture
def plain_web(tmp_path: Path) -> Iterator[str]:
    """Address of a web server over tmp_path/source that knows no ranges: it always sends the whole file."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "source")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_web_server_without_a_manifest_or_without_ranges_is_refused(plain_web: str, folder: Path) -> None:
    with pytest.raises(StoreError, match="can't be listed, it is no object storage: it needs a manifest"):
        index_trajectory(plain_web)
    with pytest.raises(StoreError, match="the server sends no parts of files"):
        open_store(plain_web).read("step8/config.json", 3, 5)


def test_manifest_may_lie_elsewhere_than_its_checkpoints(folder: Path, tmp_path: Path) -> None:
    manifest = index_trajectory(folder, tmp_path / "index")
    assert manifest.checkpoints[8].location == f"{folder.as_uri()}/step8"
    assert not (folder / "manifest.json").exists()
    assert audit(load_manifest(tmp_path / "index")).bad == {}
    assert list(difference_lines(manifest, index_trajectory(folder))) == []


def test_manifest_whose_paths_lead_out_of_its_place_is_refused(folder: Path) -> None:
    index_trajectory(folder)
    content = (folder / "manifest.json").read_text()
    for inside, outside in (('"step8"', '"../secrets"'), ('"config.json"', '"/etc/passwd"')):
        (folder / "manifest.json").write_text(content.replace(inside, outside))
        with pytest.raises(BadTrajectory, match="leads out of the trajectory"):
            load_manifest(folder)


# ------------------------------------------------------------------------------------------------ pull


def test_pull_goes_on_where_it_was_cut_off_and_refuses_damage(folder: Path, tmp_path: Path) -> None:
    manifest = index_trajectory(folder)
    spoilt = shards_of(folder / "step16")[1]
    good = spoilt.read_bytes()
    spoilt.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BadTrajectory, match=f"step16/{spoilt.name} has sha256 .*damaged in storage"):
        pull(manifest, tmp_path / "pulled")
    assert list(load_manifest(tmp_path / "pulled").checkpoints) == [1, 2, 4, 8]
    assert not list((tmp_path / "pulled").rglob("*.tmp"))
    spoilt.write_bytes(good)
    before = manifest.store.bytes_read
    pulled = pull(manifest, tmp_path / "pulled")
    rest = sum(manifest.checkpoints[step].num_bytes for step in STEPS if step >= 16)
    assert manifest.store.bytes_read - before < rest
    assert list(difference_lines(manifest, pulled)) == []
    assert audit(pulled, full=True).bad == {}


def test_pull_of_unknown_steps_or_into_another_trajectory_is_refused(
    folder: Path, checkpoints: Path, tmp_path: Path
) -> None:
    manifest = index_trajectory(folder)
    with pytest.raises(BadTrajectory, match=r"has no steps \[3, 5\]; it has \[1, 2, 4"):
        pull(manifest, tmp_path / "pulled", [3, 4, 5])
    other = index_trajectory(copy_as(checkpoints / "whole", tmp_path / "other", "transformers"))
    with pytest.raises(BadTrajectory, match=r"holds another trajectory \(transformers\)"):
        pull(manifest, Path(other.url))


def test_step_that_was_mended_at_the_source_is_pulled_again(folder: Path, tmp_path: Path) -> None:
    """With the same sizes, and with other files."""
    pull(index_trajectory(folder), tmp_path / "pulled", [8, 16, 24])
    shard = shards_of(folder / "step8")[0]
    spoilt = bytearray(shard.read_bytes())
    spoilt[-1] ^= 1
    shard.write_bytes(spoilt)
    (folder / "step16" / "generation_config.json").unlink()
    mended = index_trajectory(folder)
    pulled = pull(mended, tmp_path / "pulled", [8, 16, 24])
    assert hashes(pulled) == {step: mended.checkpoints[step].files for step in (8, 16, 24)}
    assert (tmp_path / "pulled" / "step_00000008" / shard.name).read_bytes() == spoilt
    assert not (tmp_path / "pulled" / "step_00000016" / "generation_config.json").exists()
    before = mended.store.bytes_read
    pull(mended, tmp_path / "pulled", [8, 16, 24])
    assert mended.store.bytes_read == before


def test_step_whose_hashes_the_source_does_not_tell_is_pulled_once(folder: Path, tmp_path: Path) -> None:
    manifest = index_trajectory(folder)
    for checkpoint in manifest.checkpoints.values():
        for name in checkpoint.shards:
            checkpoint.files[name][1] = None
    pull(manifest, tmp_path / "pulled", [8])
    before = manifest.store.bytes_read
    assert pull(manifest, tmp_path / "pulled", [8]).checkpoints[8].is_hashed
    assert manifest.store.bytes_read == before


def test_trajectory_that_grew_and_ended_is_pulled_into_the_same_folder(folder: Path, tmp_path: Path) -> None:
    whole = index_trajectory(folder)
    part = {step: whole.checkpoints[step] for step in (8, 16)}
    growing = dataclasses.replace(whole, complete=False, checkpoints=part)
    assert not pull(growing, tmp_path / "pulled").complete
    ended = dataclasses.replace(growing, complete=True)
    pull(ended, tmp_path / "pulled")
    assert load_manifest(tmp_path / "pulled").complete  # with nothing new to fetch
    pull(whole, tmp_path / "pulled")
    pulled = load_manifest(tmp_path / "pulled")
    assert (pulled.complete, hashes(pulled)) == (True, hashes(whole))


def test_pull_that_is_cut_off_is_not_complete(folder: Path, tmp_path: Path) -> None:
    manifest = index_trajectory(folder)
    shards_of(folder / "step16")[0].unlink()
    with pytest.raises(StoreError):
        pull(manifest, tmp_path / "pulled")
    assert not load_manifest(tmp_path / "pulled").complete


def test_pickled_weights_are_pulled_again_only_when_they_were_mended(folder: Path, tmp_path: Path) -> None:
    pickle_weights(folder / "step8")
    manifest, target = index_trajectory(folder, allow_bin=True), tmp_path / "pulled" / "step_00000008"
    pull(manifest, tmp_path / "pulled", [8])
    before = manifest.store.bytes_read
    local = pull(manifest, tmp_path / "pulled", [8])
    assert manifest.store.bytes_read == before
    weights = torch.load(folder / "step8" / "pytorch_model.bin", weights_only=True)
    name = next(iter(weights))
    weights[name] += 1
    torch.save(weights, folder / "step8" / "pytorch_model.bin")
    mended = index_trajectory(folder, allow_bin=True)
    again = pull(mended, tmp_path / "pulled", [8])
    assert hashes(again) != hashes(local)
    assert torch.equal(load_file(target / "model.safetensors")[name], weights[name])
    before = mended.store.bytes_read
    assert hashes(pull(mended, tmp_path / "pulled", [8])) == hashes(again)
    assert mended.store.bytes_read == before
    (target / ".source").write_text("{")
    pull(mended, tmp_path / "pulled", [8])
    assert mended.store.bytes_read > before
    assert hashes(index_trajectory(tmp_path / "pulled")) == hashes(again)


def test_pickled_weights_are_pulled_as_safetensors(folder: Path, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for path in shards_of(folder / "step8"):
        expected |= load_file(path)
    pickle_weights(folder / "step8")
    local = pull(index_trajectory(folder, allow_bin=True), tmp_path / "pulled")
    found = load_file(tmp_path / "pulled" / "step_00000008" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list((tmp_path / "pulled").rglob("*.bin"))
    assert audit(local, full=True).bad == {}


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch pwned",)


def test_pickle_with_code_in_it_is_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle_weights(folder / "step8")
    for content in (Evil(), {"weight": 3}):
        torch.save(content, folder / "step8" / "pytorch_model.bin")
        with pytest.raises(BadTrajectory, match="leave this step out"):
            pull(index_trajectory(folder, allow_bin=True), tmp_path / "pulled", [8])
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `distill trajectory ARGUMENTS` here. Returns its exit code and stdout."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distill", "trajectory", *map(str, arguments)])
        code = main()
        return code, capsys.readouterr().out

    return run


def test_commands_draw_compare_and_fetch(command: Any, folder: Path, tmp_path: Path) -> None:
    assert command("index", folder) == (0, f"pythia: 11 checkpoints, steps {list(STEPS)}\n")
    content = json.loads((folder / "manifest.json").read_text())
    for number, entry in enumerate(content["checkpoints"]):
        entry["validation_loss"] = 5.0 / (number + 1)
    (folder / "manifest.json").write_text(json.dumps(content))
    drawn = command("ls", folder)[1].splitlines()
    assert drawn[0].startswith(
        f"{folder}: pythia, llama, float32, 128 tokens, 128 logits, untied, 11 checkpoints"
    )
    assert drawn[1].split() == ["step", "tokens", "size", "loss", "verdict"]
    size = size_text(load_manifest(folder).checkpoints[1].num_bytes)
    assert drawn[2].split() == ["1", *size.split(), "5.000", "█" * 24, "not", "audited"]
    assert drawn[3].split()[4] == "█" * 12
    assert command("audit", folder)[0] == 0
    assert command("ls", folder)[1].splitlines()[2].endswith("ok")
    pulled = tmp_path / "pulled"
    fetched = command("pull", folder, "--to", pulled, "--steps", "8,16")
    assert fetched == (0, f"{pulled}: 2 checkpoints, steps [8, 16]\n")
    code, differences = command("diff", folder, pulled)
    assert (code, differences.splitlines()[0]) == (1, f"step 1: only in {folder}")
    assert command("diff", folder, folder) == (0, "no difference\n")


def test_difference_names_facts_files_sizes_and_hashes(command: Any, folder: Path, tmp_path: Path) -> None:
    index_trajectory(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    shard = shards_of(other / "step8")[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (other / "step16" / "config.json").unlink()
    (other / "step24" / "generation_config.json").write_text("{}")
    index_trajectory(other)
    code, said = command("diff", folder, other)
    assert code == 1
    assert [line.split(":")[:2] for line in said.splitlines()] == [
        ["step 8", f" {shard.name}"],
        ["step 16", " config.json"],
        ["step 24", " generation_config.json"],
    ]
    assert "sha256" in said
    assert "only in the first" in said
    assert "/ 2 bytes" in said


def test_audit_as_json_has_a_verdict_a_step(command: Any, folder: Path) -> None:
    index_trajectory(folder)
    shards_of(folder / "step8")[0].unlink()
    code, said = command("audit", folder, "--json", "-")
    assert code == 1
    steps = json.loads(said)["steps"]
    assert {step: told["verdict"] for step, told in steps.items()} == {
        str(step): "bad" if step == 8 else "ok" for step in STEPS
    }
    assert {finding["kind"] for finding in steps["8"]["findings"]} >= {"missing"}


def test_steps_that_are_no_numbers_are_wrong_usage(command: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        command("pull", folder, "--to", tmp_path, "--steps", "1,x")
    assert ended.value.code == 2
