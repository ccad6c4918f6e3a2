"""TPU chips that can be requested, compared with Ray's own tables, and the messages about chips that are missing."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import pytest
from pydantic import ValidationError
from ray._private.accelerators import tpu as rays
from ray.util.tpu import get_tpu_version_from_type

from serve_app.app import build
from serve_app.cli import launcher, main
from serve_app.cli.launcher import LaunchError
from serve_app.scorer.engines import load_engine
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tpu import (
    CHIP_LABEL,
    CHIPS_OF_A_SLICES_HOST,
    HOSTS,
    NUMBER_LABEL,
    SLICE_LABEL,
    SLICES,
    TOPOLOGY_LABEL,
    Tpu,
)
from tests.local import service_of
from tests.tiny import make_llama


@pytest.mark.parametrize("chip", HOSTS)
def test_the_hosts_are_rays(chip: Any):
    version = get_tpu_version_from_type(Tpu(chip=chip, topology=next(iter(HOSTS[chip]))).labels[CHIP_LABEL])
    on_one_host = {
        topology: chips
        for topology in rays.VALID_TPU_TOPOLOGY[version]
        if (chips := rays.get_num_chips_from_topology(topology)) <= rays.get_chips_per_host(topology, version)
    }
    assert on_one_host == HOSTS[chip]


def bounds_of(visible: int, chips: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The chips that Ray leaves visible on a host of GKE, and the bounds that it leaves beside them."""
    monkeypatch.setattr(rays.TPUAcceleratorManager, "get_current_node_num_accelerators", lambda: chips)
    monkeypatch.setenv("TPU_CHIPS_PER_HOST_BOUNDS", f"2,{chips // 2},1" if chips > 1 else "1,1,1")
    monkeypatch.setenv("TPU_HOST_BOUNDS", "1,1,1")
    monkeypatch.setenv("TPU_VISIBLE_CHIPS", ",".join(map(str, range(chips))))
    rays.TPUAcceleratorManager.set_current_process_visible_accelerator_ids([str(chip) for chip in range(visible)])
    seen = os.environ.get("TPU_VISIBLE_CHIPS")
    return chips if seen is None else len(seen.split(",")), os.environ["TPU_CHIPS_PER_HOST_BOUNDS"]


@pytest.mark.parametrize(("chip", "topology"), [(chip, topology) for chip in HOSTS for topology in HOSTS[chip]])
def test_ray_gives_libtpu_bounds_that_hold_the_chips_that_a_replica_can_have(
    chip: Any, topology: str, monkeypatch: pytest.MonkeyPatch
):
    host = HOSTS[chip][topology]
    for chips in rays.TPU_VALID_CHIP_OPTIONS:
        seen, bounds = bounds_of(min(chips, host), host, monkeypatch)
        possible = chips <= host and math.prod(map(int, bounds.split(","))) == seen
        if possible:
            assert Tpu(chip=chip, topology=topology, chips=chips).chips == chips
        else:
            with pytest.raises(ValidationError, match=f"cannot have {chips} chips"):
                Tpu(chip=chip, topology=topology, chips=chips)


@pytest.mark.parametrize("chip", SLICES)
def test_the_slices_are_rays(chip: Any):
    version = get_tpu_version_from_type(Tpu(chip=chip, topology=SLICES[chip][0]).labels[CHIP_LABEL])
    for topology in SLICES[chip]:
        assert topology in rays.VALID_TPU_TOPOLOGY[version]
        assert rays.get_chips_per_host(topology, version) == CHIPS_OF_A_SLICES_HOST
        tpu = Tpu(chip=chip, topology=topology)
        assert tpu.chips == rays.get_num_chips_from_topology(topology) == tpu.hosts * CHIPS_OF_A_SLICES_HOST
        assert tpu.hosts == math.prod(rays._get_worker_dims_for_topology(topology))


@pytest.mark.parametrize(
    ("chip", "gkes", "topology"),
    [
        ("v4", "v4-8", "2x2x1"),
        ("v5e", "v5litepod-8", "2x4"),
        ("v5p", "v5p-8", "2x2x1"),
        ("v6e", "v6e-4", "2x2"),
        ("v6e", "v6e-16", "4x4"),
    ],
)
def test_the_labels_are_those_of_rays_tpu_hosts(chip: Any, gkes: str, topology: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", gkes)
    monkeypatch.setenv("TPU_TOPOLOGY", topology)
    monkeypatch.setenv("TPU_NAME", "a-slice")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    host = rays.TPUAcceleratorManager
    found = {CHIP_LABEL: host.get_current_node_accelerator_type()} | host.get_current_node_accelerator_labels()
    assert Tpu(chip=chip, topology=topology).labels.items() <= found.items()
    assert (found[SLICE_LABEL], found[NUMBER_LABEL]) == ("a-slice", "0")


@pytest.mark.parametrize(
    ("asked", "possible"),
    [
        ({"chip": "v6e", "topology": "2x2", "chips": 3}, "1 or 2 or 4"),
        ({"chip": "v6e", "topology": "2x2", "chips": 8}, "1 or 2 or 4"),
        ({"chip": "v6e", "topology": "2x4", "chips": 4}, "1 or 2 or 8, for which Ray tells libtpu where they are"),
        ({"chip": "v5p", "topology": "2x2x1", "chips": 0}, "1 or 2 or 4"),
        ({"chip": "v6e", "topology": "3x3"}, "1x1, 2x2, 2x4"),
        ({"chip": "v6e", "topology": "3x3"}, "on one host, and 4x4, 4x8, 8x8, 8x16, 16x16 on several"),
        ({"chip": "v6e", "topology": "4x4", "chips": 8}, "which has 4 hosts; it needs all 16; leave out chips"),
        ({"chip": "v4", "topology": "2x2"}, "2x2x1"),
        ({"chip": "h100", "topology": "2x2"}, "'v4', 'v5e', 'v5p' or 'v6e'"),
        ({"chip": "v6e", "topology": "2x2", "chip_count": 1}, "chip_count"),
    ],
)
def test_chips_that_do_not_exist_are_refused_with_those_that_do(asked: dict[str, Any], possible: str):
    with pytest.raises(ValidationError, match=possible):
        ModelSettings.model_validate({"tpu": asked})


def node(chips: int, chip: str = "TPU-V6E", topology: str = "2x2", *, alive: bool = True) -> dict[str, Any]:
    return {
        "Alive": alive,
        "Labels": {CHIP_LABEL: chip, TOPOLOGY_LABEL: topology},
        "Resources": {"CPU": 4.0, "TPU": float(chips)},
    }


PLAIN = {"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0}}


@pytest.mark.parametrize(
    ("replicas", "nodes", "said"),
    [
        (4, [PLAIN, node(4), node(4)], None),
        (
            5,
            [PLAIN, node(4), node(4)],
            "5 replicas of 2 chips need 10 chips of v6e.* matching nodes: 2, with room for 4",
        ),
        (4, [node(4), node(4, alive=False)], "matching nodes: 1, with room for 2"),
        (1, [node(1)], "room for 0"),
        (1, [PLAIN], "no node has chips of v6e in topology 2x2; the nodes have no TPU at all"),
        (1, [node(8, topology="2x4")], "the nodes have 8 of TPU-V6E in topology 2x4"),
        (1, [node(4, chip="TPU-V5LITEPOD")], "the nodes have 4 of TPU-V5LITEPOD in topology 2x2"),
    ],
)
def test_chips_that_a_cluster_lacks_are_named(replicas: int, nodes: list[dict[str, Any]], said: str | None):
    lacking = Tpu(chip="v6e", topology="2x2", chips=2).lacking(replicas, nodes)
    if said is None:
        assert lacking is None
    else:
        assert re.search(said, lacking or "")


def host(name: str, number: int, chips: int = 4) -> dict[str, Any]:
    made = node(chips, topology="4x4")
    made["Labels"] |= {SLICE_LABEL: name, NUMBER_LABEL: str(number)}
    return made


@pytest.mark.parametrize(
    ("replicas", "nodes", "said"),
    [
        (2, [host(name, number) for name in "ab" for number in range(4)], None),
        (
            2,
            [host("a", number) for number in range(4)],
            "2 replicas need as many slices of v6e in topology 4x4; 1 complete slice found",
        ),
        (1, [host("a", number) for number in (0, 1, 3)], "0 complete slices found; slice a has 3 of 4 hosts"),
        (1, [host("a", 0) for _ in range(4)], "a has 1 of 4 hosts"),
        (1, [host("a", number, chips=1) for number in range(4)], "0 complete slices found"),
        (1, [node(4, topology="4x4") for _ in range(4)], "0 complete slices found"),
        (1, [node(4)], "no node has chips of v6e in topology 4x4; the nodes have 4 of TPU-V6E in topology 2x2"),
    ],
)
def test_slices_that_a_cluster_lacks_are_named(replicas: int, nodes: list[dict[str, Any]], said: str | None):
    lacking = Tpu(chip="v6e", topology="4x4").lacking(replicas, nodes)
    assert lacking is None if said is None else said in (lacking or "")


def test_the_launcher_does_not_wait_for_chips_that_cannot_come():
    settings = service_of(ModelSettings(tpu=Tpu(chip="v6e", topology="2x2"), scorer_replicas=5))
    launcher.check_chips(settings, [node(4), node(4)])
    launcher.check_chips(ServiceSettings(), [PLAIN])
    with pytest.raises(LaunchError, match="room for 4 replicas; change --tpu"):
        launcher.check_chips(settings, [node(4)])


def test_the_scorer_asks_ray_for_its_chips_and_the_front_end_keeps_away_from_them():
    application = build(service_of(ModelSettings(tpu=Tpu(chip="v5e", topology="2x4"), scorer_cpus=2)))
    front = application._bound_deployment
    scorer = front.init_args[1]._bound_deployment
    assert scorer.ray_actor_options["resources"] == {"TPU": 1}
    assert scorer.ray_actor_options["label_selector"] == {CHIP_LABEL: "TPU-V5LITEPOD", TOPOLOGY_LABEL: "2x4"}
    assert front.ray_actor_options["label_selector"] == {CHIP_LABEL: "!TPU-V5LITEPOD"}


def test_the_leader_of_a_slice_keeps_away_from_the_chips_and_leaves_them_to_its_hosts():
    application = build(service_of(ModelSettings(tpu=Tpu(chip="v6e", topology="4x4"), scorer_cpus=2)))
    scorer = application._bound_deployment.init_args[1]._bound_deployment
    assert scorer.ray_actor_options["num_cpus"] == 2
    assert "TPU" not in scorer.ray_actor_options.get("resources", {})
    assert scorer.ray_actor_options["label_selector"] == {CHIP_LABEL: "!TPU-V6E"}
    assert scorer.ray_actor_options["fallback_strategy"] == [{"label_selector": {}}]


def test_a_replica_with_chips_that_jax_does_not_find_does_not_start(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    """This process's jax has begun with the CPU."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert jax.default_backend() == "cpu"
    settings = ModelSettings(model=str(make_llama(tmp_path, context=32)), tpu=Tpu(chip="v6e", topology="2x2"))
    with pytest.raises(RuntimeError, match="jax found only cpu"):
        load_engine(settings)


@pytest.mark.heavy
def test_a_replica_whose_tpu_does_not_start_says_libtpus_reason(tmp_path: Any):
    """Without JAX_PLATFORMS jax goes on with the CPU. Here libtpu is installed and there is no TPU."""
    script = (
        "from serve_app.scorer.engines import load_engine\n"
        "from serve_app.settings import ModelSettings\n"
        "from serve_app.tpu import Tpu\n"
        f"load_engine(ModelSettings(model={str(make_llama(tmp_path, context=32))!r}, "
        "tpu=Tpu(chip='v6e', topology='2x2')))"
    )
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "RuntimeError: the replica was given TPU chips and jax cannot use them: Unable to initialize backend 'tpu'"
    )
    assert "TPU initialization failed" in last


def test_the_command_line_names_chips_and_topology(monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    got: list[ServiceSettings] = []
    monkeypatch.setattr(launcher, "run", lambda settings, **_: got.append(settings))
    assert CliRunner().invoke(main.app, ["serve", "--tpu", "v6e:2x4"]).exit_code == 0
    assert got[0].models[0].tpu == Tpu(chip="v6e", topology="2x4", chips=1)
    assert CliRunner().invoke(main.app, ["serve", "--tpu", "v6e:4x4"]).exit_code == 0
    assert got[1].models[0].tpu == Tpu(chip="v6e", topology="4x4", chips=16)
    for wrong in ("v6e", "v6e:9x9", "v6e:4x4:4"):
        refused = CliRunner().invoke(main.app, ["serve", "--tpu", wrong])
        assert refused.exit_code == 1
        assert "topology" in refused.stderr


@pytest.mark.parametrize("data", [1, 2, 4])
def test_a_replica_s_chips_are_divided_among_calls(data: int):
    assert Tpu(chip="v6e", topology="2x2", chips=4, data=data).data == data


@pytest.mark.parametrize("data", [0, 3, 8])
def test_calls_that_do_not_divide_a_replica_s_chips_are_refused(data: int):
    with pytest.raises(ValidationError, match=rf"4 chips .* among {data} calls at once; data can be 1 or 2 or 4"):
        Tpu(chip="v6e", topology="2x2", chips=4, data=data)


def test_chips_are_counted_together_however_they_are_divided():
    chips = {"chip": "v6e", "topology": "2x2", "chips": 4}
    models = [{"model": f"model{n}", "tpu": {**chips, "data": n}} for n in (1, 4)]
    settings = ServiceSettings.model_validate({"models": models})
    assert settings.replicas_on_chips() == {Tpu.model_validate(chips): 2}
