"""The hub code path against a local server: pinned revisions, ranges, resumption, and what it says when it fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session

from skynet.errors import ModelError, StepAborted, WeightError
from skynet.models.checkpoint import build_manifest
from skynet.models.hub import Hub, HubConfig, HubModel
from skynet.models.hub_files import hub_small_files
from skynet.models.hub_manifest import HubManifestBuilder
from skynet.models.manifest import Manifest
from skynet.models.store.hub_chunks import HubChunks
from skynet.models.store.store import StoreConfig, WeightStore
from skynet.models.store.swarm_source import SwarmSource
from skynet.protocol.plan import Span

from .hub_server import COMMIT, REPO, TOKEN, FakeHub, fake_hub


@pytest.fixture
def server(checkpoint: Path) -> Iterator[FakeHub]:
    with fake_hub(checkpoint) as running:
        yield running
        close_session()  # its kept connections, before the server goes


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(HubConfig(endpoint=server.endpoint, token=TOKEN, timeout_s=5.0, cache_dir=tmp_path / "hf"))


@pytest.fixture
def model(hub: Hub) -> HubModel:
    found = hub.locate(REPO).hub
    assert found is not None
    return found


def build(hub: Hub, model: HubModel, tmp_path: Path) -> Manifest:
    return HubManifestBuilder(hub, model, tmp_path / "cache").build()


def test_a_hub_id_is_pinned_to_its_commit(hub: Hub, model: HubModel, checkpoint: Path) -> None:
    assert model.revision == COMMIT
    assert {f.name for f in model.files} == {p.name for p in checkpoint.iterdir()}
    assert hub.resolve(REPO, "main") == model


def test_the_manifest_of_the_hub_equals_the_directorys(
    hub: Hub, model: HubModel, server: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    manifest = HubManifestBuilder(
        hub, model, tmp_path / "cache", lambda done, total: seen.append((done, total))
    ).build()
    assert manifest == build_manifest(checkpoint, tmp_path / "other-cache")
    assert seen[-1] == (sum(f.num_bytes for f in model.files),) * 2
    before = len(server.requests)
    assert build(hub, model, tmp_path) == manifest  # known by now
    assert len(server.requests) == before


def test_slices_come_by_range_and_no_file_is_kept(
    hub: Hub, model: HubModel, server: FakeHub, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    manifest = build(hub, model, tmp_path)
    server.requests.clear()
    with WeightStore(manifest, StoreConfig(cache_dir=tmp_path / "cache"), remote=[HubChunks(hub, model)]) as store:
        assert torch.equal(SwarmSource(store).read("wide.weight", 0, [Span(0, 9)]), tensors["wide.weight"][:9])
        assert len(server.ranges_of("model.safetensors")) == 1
        for name, expected in tensors.items():
            assert torch.equal(SwarmSource(store).read(name), expected)
        assert store.progress.bytes_by_source.keys() == {"hub"}
    chunks = manifest.file("model.safetensors").num_chunks
    assert len(server.ranges_of("model.safetensors")) == chunks


def test_configuration_is_had_before_any_weight(hub: Hub, model: HubModel, server: FakeHub, tmp_path: Path) -> None:
    directory = hub_small_files(hub, model, tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == {
        name: data for name, data in server.files.items() if name != "model.safetensors"
    }
    assert server.ranges_of("model.safetensors") == []
    before = len(server.requests)
    assert hub_small_files(hub, model, tmp_path / "cache") == directory
    assert len(server.requests) == before


def test_a_worker_knows_a_hub_model_by_id_and_revision_alone(
    hub: Hub, model: HubModel, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    manifest = build(hub, model, tmp_path)
    source = HubChunks(hub, HubModel(REPO, COMMIT))
    with WeightStore(manifest, StoreConfig(cache_dir=tmp_path / "cache"), remote=[source]) as store:
        assert torch.equal(SwarmSource(store).read("experts"), tensors["experts"])


def test_a_download_goes_on_where_the_connection_broke(
    hub: Hub, model: HubModel, server: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    server.break_after, server.breaks_left = 1_500_000, 3
    assert build(hub, model, tmp_path) == build_manifest(checkpoint, tmp_path / "other-cache")
    starts = [int(str(r).removeprefix("bytes=").partition("-")[0]) for r in server.ranges_of("model.safetensors")]
    assert starts == sorted(starts)
    assert starts[:3] == [0, 1_500_000, 3_000_000]
    assert len(starts) == 4


def test_a_busy_hub_and_one_without_ranges_are_coped_with(
    hub: Hub, model: HubModel, server: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    server.failures_left = 2
    server.ignores_range = True
    server.break_after, server.breaks_left = 1_500_000, 1
    assert build(hub, model, tmp_path) == build_manifest(checkpoint, tmp_path / "other-cache")


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, model: HubModel, server: FakeHub, tmp_path: Path
) -> None:
    server.is_gated = True
    build(hub, model, tmp_path)
    assert set(server.storage_authorizations) == {None}


def test_a_gated_model_says_how_to_get_in(hub: Hub, model: HubModel, server: FakeHub, tmp_path: Path) -> None:
    server.is_gated = True
    stranger = Hub(HubConfig(endpoint=server.endpoint, token="hf_wrong", timeout_s=5.0))
    with pytest.raises(ModelError, match=r"gated; accept its terms at http.*HF_TOKEN"):
        build(stranger, model, tmp_path)


def test_unknown_models_and_revisions_are_named(hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"Test/Absent: not found at http"):
        hub.resolve("Test/Absent")
    with pytest.raises(ModelError, match=r"Test/Tiny-Model: has no such revision at http\S+; check its name there"):
        hub.resolve(REPO, "nope")
    for name in ("/no/such/dir", "a/b/c", "", "--x", "../up"):
        with pytest.raises(ModelError, match="neither a directory nor a hub id"):
            hub.locate(name)


def test_no_network_is_said_and_a_directory_needs_none(tmp_path: Path, checkpoint: Path) -> None:
    nowhere = Hub(HubConfig(endpoint="http://127.0.0.1:9", timeout_s=1.0, cache_dir=tmp_path / "hf"))
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 can't be reached .*check the network, or give a directory"):
        nowhere.locate(REPO)
    assert nowhere.locate(str(checkpoint)).local == checkpoint


def test_offline_mode_uses_what_huggingface_hub_keeps(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the library read it from the environment
    offline = Hub(HubConfig(cache_dir=tmp_path / "hf"))
    with pytest.raises(ModelError, match="offline mode is on"):
        offline.locate(REPO)
    snapshot = tmp_path / "hf" / "models--Test--Tiny-Model" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    assert offline.locate(REPO).local == snapshot
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="offline mode is on"):
        offline.locate(REPO)


def test_a_file_altered_on_its_way_from_the_hub_is_refused(
    hub: Hub, model: HubModel, server: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    manifest = build_manifest(checkpoint, tmp_path / "other-cache")
    server.files["model.safetensors"] = server.files["model.safetensors"][:-1] + b"\x55"
    with pytest.raises(WeightError, match=r"Test/Tiny-Model/model\.safetensors: SHA-256 .* the hub states .*try again"):
        build(hub, model, tmp_path)
    server.corrupt = "model.safetensors"
    with (
        WeightStore(manifest, StoreConfig(cache_dir=tmp_path / "cache"), remote=[HubChunks(hub, model)]) as store,
        pytest.raises(WeightError, match="nowhere to be had"),
    ):
        SwarmSource(store).read("embed.weight")


def test_a_manifest_build_can_be_cancelled(hub: Hub, model: HubModel, tmp_path: Path) -> None:
    builder: list[HubManifestBuilder] = []
    builder.append(HubManifestBuilder(hub, model, tmp_path / "cache", lambda done, total: builder[0].cancel()))
    with pytest.raises(StepAborted, match="cancelled"):
        builder[0].build()


def test_several_readers_share_a_hub(hub: Hub, model: HubModel, server: FakeHub) -> None:
    data = server.files["model.safetensors"]
    got: dict[int, bytes] = {}

    def read(start: int) -> None:
        got[start] = b"".join(hub.stream(model, "model.safetensors", start, 300_000))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 1_200_000, 300_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {start: data[start : start + 300_000] for start in range(0, 1_200_000, 300_000)}
