"""The Kubernetes manifests and the Dockerfile: their fields are KubeRay's and Kubernetes', and their numbers agree.

The models below hold the fields that the manifests use, after KubeRay's ``ray-operator/apis/ray/v1`` and Kubernetes'
``core/v1``, and refuse all others: the API server drops an unknown field without a warning.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import promql_parser
import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.schema import ServeDeploySchema
from typer.main import get_command

from serve_app.cli.main import app
from serve_app.gateway_gauges import GAUGES
from serve_app.local_ray import PROCESSES
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tpu import CHIPS_OF_A_SLICES_HOST, HOSTS

ROOT = Path(__file__).parents[2]
GATEWAY = ROOT / "configs" / "kuberay" / "inference-gateway.yaml"
MANIFESTS = sorted({*(ROOT / "configs" / "kuberay").glob("*.yaml")} - {GATEWAY})
FRONT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
}
KUBERAYS_V6E = {
    "VBAR_CONTROL_SERVICE_URL": "$(NODE_IP):8353",
    "JAX_PLATFORMS": "tpu,cpu",
    "ENABLE_PJRT_COMPATIBILITY": "true",
}
GKES_CHIPS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
CHIPS = "google.com/tpu"
CARDS = "nvidia.com/gpu"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(RAY,) = [need for need in map(Requirement, PROJECT["dependencies"]) if need.name == "ray"]

Quantity = Annotated[str, Field(pattern=r"^\d+(m|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FieldRef(Strict):
    fieldPath: Literal["status.hostIP"]  # noqa: N815 - Kubernetes' names


class Source(Strict):
    fieldRef: FieldRef  # noqa: N815


class Variable(Strict):
    name: str
    value: str | None = None
    valueFrom: Source | None = None  # noqa: N815


class Port(Strict):
    name: Annotated[Name, Field(max_length=15)]
    containerPort: int  # noqa: N815 - Kubernetes' names


class Mount(Strict):
    name: Name
    mountPath: str  # noqa: N815


class Exec(Strict):
    command: list[str]


class Probe(Strict):
    exec: Exec
    initialDelaySeconds: int  # noqa: N815
    periodSeconds: int  # noqa: N815
    timeoutSeconds: int  # noqa: N815
    failureThreshold: int  # noqa: N815


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Capabilities(Strict):
    add: list[Literal["SYS_RESOURCE"]]


class ContainerSecurity(Strict):
    capabilities: Capabilities


class Container(Strict):
    name: Name
    image: str
    securityContext: ContainerSecurity | None = None  # noqa: N815
    ports: list[Port] = []
    env: list[Variable]
    volumeMounts: list[Mount]  # noqa: N815
    livenessProbe: Probe | None = None  # noqa: N815
    readinessProbe: Probe | None = None  # noqa: N815
    resources: Resources


class Claim(Strict):
    claimName: Name  # noqa: N815


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim  # noqa: N815


class SecurityContext(Strict):
    runAsUser: int  # noqa: N815


class PodSpec(Strict):
    securityContext: SecurityContext  # noqa: N815
    nodeSelector: dict[str, str] = {}  # noqa: N815
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]


class Template(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: Template


class WorkerGroup(HeadGroup):
    labels: dict[str, str] = {}
    groupName: Name  # noqa: N815
    replicas: int
    minReplicas: int  # noqa: N815
    maxReplicas: int  # noqa: N815
    numOfHosts: int = 1  # noqa: N815


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]


class ClusterSpec(Strict):
    rayVersion: str  # noqa: N815
    enableInTreeAutoscaling: bool = False  # noqa: N815
    autoscalerOptions: AutoscalerOptions | None = None  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815


class ServiceSpec(Strict):
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: ClusterSpec  # noqa: N815


class Metadata(Strict):
    name: Name


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec

    @property
    def settings(self) -> ServiceSettings:
        (application,) = ServeDeploySchema.model_validate(yaml.safe_load(self.spec.serveConfigV2)).applications
        assert application.import_path == "serve_app.app:build"
        return ServiceSettings.model_validate(application.args)

    @property
    def pods(self) -> list[PodSpec]:
        cluster = self.spec.rayClusterConfig
        return [group.template.spec for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]


class StorageRequest(Strict):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Strict):
    accessModes: list[Literal["ReadWriteMany"]]  # noqa: N815
    storageClassName: str  # noqa: N815
    resources: StorageRequest


class PersistentVolumeClaim(Strict):
    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class HttpGet(Strict):
    path: Literal["/ready", "/health"]
    port: int


class HttpProbe(Strict):
    httpGet: HttpGet  # noqa: N815
    initialDelaySeconds: int = 0  # noqa: N815
    periodSeconds: int  # noqa: N815
    timeoutSeconds: int  # noqa: N815
    failureThreshold: int  # noqa: N815


class EmptyDir(Strict):
    medium: Literal["Memory"]
    sizeLimit: Quantity  # noqa: N815


class OwnVolume(Strict):
    name: Name
    emptyDir: EmptyDir  # noqa: N815


class Server(Strict):
    name: Name
    image: str
    args: list[str]
    ports: list[Port]
    readinessProbe: HttpProbe  # noqa: N815
    livenessProbe: HttpProbe  # noqa: N815
    resources: Resources
    volumeMounts: list[Mount]  # noqa: N815


class ServerSpec(Strict):
    terminationGracePeriodSeconds: int  # noqa: N815
    containers: Annotated[list[Server], Field(min_length=1, max_length=1)]
    volumes: list[OwnVolume]


class Labels(Strict):
    labels: dict[str, str]
    annotations: dict[str, str]


class ServerTemplate(Strict):
    metadata: Labels
    spec: ServerSpec


class Selector(Strict):
    matchLabels: dict[str, str]  # noqa: N815


class DeploymentSpec(Strict):
    replicas: int
    selector: Selector
    template: ServerTemplate


class Deployment(Strict):
    apiVersion: Literal["apps/v1"]  # noqa: N815
    kind: Literal["Deployment"]
    metadata: Metadata
    spec: DeploymentSpec


PortNumber = Annotated[int, Field(ge=1, le=65_535)]


class NumberedPort(Strict):
    number: PortNumber


class EndpointPicker(Strict):
    name: Name
    port: NumberedPort
    failureMode: Literal["FailOpen", "FailClose"]  # noqa: N815


class PoolSpec(Strict):
    selector: Selector
    targetPorts: Annotated[list[NumberedPort], Field(min_length=1, max_length=8)]  # noqa: N815
    endpointPickerRef: EndpointPicker  # noqa: N815


class InferencePool(Strict):
    """After ``api/v1/inferencepool_types.go`` of Gateway API's inference extension."""

    apiVersion: Literal["inference.networking.k8s.io/v1"]  # noqa: N815
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: PoolSpec


class ScaleTarget(Strict):
    apiVersion: Literal["apps/v1"]  # noqa: N815
    kind: Literal["Deployment"]
    name: Name


class PrometheusQuery(Strict):
    serverAddress: str  # noqa: N815
    query: str
    threshold: Annotated[str, Field(pattern=r"^[0-9.]+$")]


class Trigger(Strict):
    type: Literal["prometheus"]
    metadata: PrometheusQuery


class ScaledSpec(Strict):
    scaleTargetRef: ScaleTarget  # noqa: N815
    pollingInterval: int  # noqa: N815
    cooldownPeriod: int  # noqa: N815
    minReplicaCount: int  # noqa: N815
    maxReplicaCount: int  # noqa: N815
    triggers: Annotated[list[Trigger], Field(min_length=1)]


class ScaledObject(Strict):
    """After ``apis/keda/v1alpha1/scaledobject_types.go`` of KEDA, and its Prometheus scaler."""

    apiVersion: Literal["keda.sh/v1alpha1"]  # noqa: N815
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledSpec


class ClaimRef(Strict):
    namespace: Literal["default"]
    name: Name


class Driver(Strict):
    driver: Literal["gcsfuse.csi.storage.gke.io"]
    volumeHandle: Literal["BUCKET"]  # noqa: N815


class VolumeSpec(Strict):
    accessModes: list[Literal["ReadWriteMany"]]  # noqa: N815
    capacity: dict[Literal["storage"], Quantity]
    storageClassName: Name  # noqa: N815
    claimRef: ClaimRef  # noqa: N815
    mountOptions: list[str]  # noqa: N815
    csi: Driver


class PersistentVolume(Strict):
    apiVersion: Literal["v1"]  # noqa: N815
    kind: Literal["PersistentVolume"]
    metadata: Metadata
    spec: VolumeSpec


KINDS: dict[str, type[BaseModel]] = {
    each.__name__: each
    for each in (RayService, PersistentVolume, PersistentVolumeClaim, Deployment, InferencePool, ScaledObject)
}


def documents(path: Path) -> list[Any]:
    contents = yaml.safe_load_all(path.read_text())
    return [KINDS[content["kind"]].model_validate(content) for content in contents]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.name)
def objects(request: pytest.FixtureRequest) -> list[Any]:
    return documents(request.param)


@pytest.fixture
def service(objects: list[Any]) -> RayService:
    (found,) = [each for each in objects if isinstance(each, RayService)]
    return found


def test_there_is_a_manifest():
    assert MANIFESTS


def test_a_misspelt_field_is_refused():
    content = next(yaml.safe_load_all(MANIFESTS[0].read_text()))
    content["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(ValueError, match="minReplica"):
        RayService.model_validate(content)


def test_every_node_has_the_front_the_cache_and_the_weights(service: RayService, objects: list[Any]):
    claims = {each.metadata.name for each in objects if isinstance(each, PersistentVolumeClaim)}
    for pod in service.pods:
        assert {volume.persistentVolumeClaim.claimName for volume in pod.volumes} == claims
        for container in pod.containers:
            env = {variable.name: variable.value for variable in container.env}
            assert env.items() >= FRONT.items()
            mounted = {mount.mountPath: mount.name for mount in container.volumeMounts}
            assert {mounted[env["SCORE_SERVE_CACHE"]], mounted[env["HF_HOME"]]} == {v.name for v in pod.volumes}


def test_every_pod_may_write_the_volumes_and_those_with_chips_may_use_them(service: RayService):
    """New Filestore volumes and TPU device files belong to root; the variables are those of KubeRay's v6e sample."""
    for pod in service.pods:
        assert pod.securityContext.runAsUser == 0
        (container,) = pod.containers
        names = [variable.name for variable in container.env]
        env = {variable.name: variable.value for variable in container.env}
        if CHIPS not in container.resources.limits:
            assert container.securityContext is None
            assert not env.keys() & KUBERAYS_V6E.keys()
            continue
        assert container.securityContext
        assert container.securityContext.capabilities.add == ["SYS_RESOURCE"]
        assert env.items() >= KUBERAYS_V6E.items()
        (node_ip,) = [variable for variable in container.env if variable.name == "NODE_IP"]
        assert node_ip.valueFrom
        assert names.index("NODE_IP") < names.index("VBAR_CONTROL_SERVICE_URL")  # Kubernetes expands earlier ones


def test_an_update_compiles_beside_the_old_replicas_into_the_folder_that_all_share(service: RayService):
    """Where the cluster adds chips; slices of several hosts are of a fixed number."""
    (model,) = service.settings.models
    assert model.max_surge_percent == (1 if service.spec.rayClusterConfig.enableInTreeAutoscaling else 0)
    caches = {
        (env["SCORE_SERVE_CACHE"], volume.persistentVolumeClaim.claimName)
        for pod in service.pods
        for env in [{variable.name: variable.value for variable in pod.containers[0].env}]
        for mount in pod.containers[0].volumeMounts
        if mount.mountPath == env["SCORE_SERVE_CACHE"]
        for volume in pod.volumes
        if volume.name == mount.name
    }
    assert caches == {("/cache", "score-serve-compiled")}


def test_a_bucket_may_take_the_place_of_the_folder_of_programs(service: RayService, objects: list[Any]):
    """Its claim has the name of a manifest's; its files belong to the pods' user, else no replica would run them."""
    volume, claim = documents(ROOT / "configs" / "kuberay" / "bucket" / "compiled.yaml")
    assert claim.metadata.name in {each.metadata.name for each in objects if isinstance(each, PersistentVolumeClaim)}
    assert volume.spec.claimRef.name == claim.metadata.name == "score-serve-compiled"
    assert volume.spec.storageClassName == claim.spec.storageClassName
    options = dict(option.partition("=")[::2] for option in volume.spec.mountOptions)
    assert {int(options["uid"])} == {pod.securityContext.runAsUser for pod in service.pods}
    assert not int(options["file-mode"], 8) & 0o002


def test_the_image_has_the_python_and_the_jax_that_are_tested():
    dockerfile = (ROOT / "configs" / "Dockerfile").read_text()
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim", dockerfile, re.MULTILINE)
    assert python == "3.11"  # CI's
    (jax,) = re.findall(r'^ARG JAX="(.+)"', dockerfile, re.MULTILINE)
    assert f"jax {jax}" in (ROOT / "docs" / "measurements.md").read_text()
    assert all('=$JAX"' in line for line in dockerfile.splitlines() if line.startswith("RUN pip install"))


def test_the_replicas_fit_on_the_chips_of_their_group(service: RayService):
    settings, cluster = service.settings, service.spec.rayClusterConfig
    (model,) = settings.models
    if not model.tpu:
        assert model.scorer_gpus, "no card is in sight while the service is built"
        return
    assert cluster.rayVersion in RAY.specifier
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    chips, tpu = 0, model.tpu
    front_cpus = settings.ingress_replicas * settings.ingress_cpus
    if tpu.hosts > 1:  # the leaders are where the front ends are
        front_cpus += model.most_replicas * model.scorer_cpus
    for group in cluster.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas
        (container,) = group.template.spec.containers
        own = int(container.resources.limits.get(CHIPS, 0))
        assert container.resources.requests == container.resources.limits
        assert container.livenessProbe
        assert container.readinessProbe
        selector = group.template.spec.nodeSelector
        if not own:
            assert selector == {}
            assert int(container.resources.limits["cpu"]) * group.minReplicas >= front_cpus
            continue
        assert selector["cloud.google.com/gke-tpu-accelerator"] == GKES_CHIPS[tpu.chip]
        assert selector["cloud.google.com/gke-tpu-topology"] == tpu.topology
        assert own == (CHIPS_OF_A_SLICES_HOST if tpu.hosts > 1 else HOSTS[tpu.chip][tpu.topology])
        assert group.numOfHosts == tpu.hosts
        assert group.labels == tpu.labels
        assert int(container.resources.limits["cpu"]) >= model.scorer_cpus * max(1, own / tpu.chips)
        chips += own * group.numOfHosts * group.maxReplicas
    assert model.most_replicas * tpu.chips == chips


def test_the_replicas_fit_on_the_cards_of_their_group(service: RayService):
    settings, cluster = service.settings, service.spec.rayClusterConfig
    (model,) = settings.models
    if not model.scorer_gpus:
        assert model.tpu
        return
    assert cluster.rayVersion in RAY.specifier
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    cards = fronts = 0
    for group in cluster.workerGroupSpecs:
        (container,) = group.template.spec.containers
        own = int(container.resources.limits.get(CARDS, 0))
        assert container.resources.requests == container.resources.limits
        assert container.livenessProbe
        assert container.readinessProbe
        assert group.minReplicas <= group.replicas <= group.maxReplicas
        cpus = int(container.resources.limits["cpu"])
        if own:
            assert cpus >= model.scorer_cpus * own / model.scorer_gpus
            cards += own * group.maxReplicas
        else:
            fronts += cpus * group.minReplicas
    assert model.most_replicas * model.scorer_gpus == cards
    assert fronts >= settings.ingress_replicas * settings.ingress_cpus


def test_the_image_copies_and_installs_only_what_exists():
    text = (ROOT / "configs" / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert {"cpu", "tpu", "gpu"} <= set(stages)
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= PROJECT["optional-dependencies"].keys()
    variables = " ".join(re.findall(r"^ENV (.+)$", text, re.MULTILINE)).split()
    assert PROCESSES.items() <= dict(variable.split("=") for variable in variables).items()
    for path in MANIFESTS:
        (service,) = [each for each in documents(path) if isinstance(each, RayService)]
        assert {container.image for pod in service.pods for container in pod.containers} == {
            f"score-serve:{path.name.split('-')[0].removesuffix('.yaml')}"
        }


def test_a_gateways_pool_and_keda_fit_the_pods_that_they_are_for():
    deployment, pool, scaled = documents(GATEWAY)
    assert isinstance(deployment, Deployment)
    assert isinstance(pool, InferencePool)
    assert isinstance(scaled, ScaledObject)
    template = deployment.spec.template
    (server,) = template.spec.containers
    (port,) = [each.containerPort for each in server.ports]
    assert server.image == "score-serve:cpu"
    assert pool.spec.selector == deployment.spec.selector
    assert template.metadata.labels == pool.spec.selector.matchLabels
    assert [each.number for each in pool.spec.targetPorts] == [port]
    assert template.metadata.annotations["prometheus.io/port"] == str(port)
    assert (server.readinessProbe.httpGet, server.livenessProbe.httpGet) == (
        HttpGet(path="/ready", port=port),
        HttpGet(path="/health", port=port),
    )
    assert {mount.name for mount in server.volumeMounts} == {volume.name for volume in template.spec.volumes}
    assert scaled.spec.scaleTargetRef.name == deployment.metadata.name
    assert scaled.spec.minReplicaCount <= deployment.spec.replicas <= scaled.spec.maxReplicaCount


def test_the_pods_of_a_gateway_are_started_by_a_command_that_exists():
    deployment, *_ = documents(GATEWAY)
    program, command, *options = deployment.spec.template.spec.containers[0].args
    assert PROJECT["scripts"][program] == "serve_app.cli.main:main"
    parsed = get_command(app).commands[command].make_context(command, options).params  # type: ignore[attr-defined]
    assert (parsed["host"], parsed["port"]) == ("0.0.0.0", 8000)


def test_keda_asks_for_a_gauge_of_the_model_that_is_served():
    deployment, _, scaled = documents(GATEWAY)
    args = deployment.spec.template.spec.containers[0].args
    model = ModelSettings(model=args[args.index("--model") + 1])
    for trigger in scaled.spec.triggers:
        expression: Any = promql_parser.parse(trigger.metadata.query)
        assert expression.expr.name in {gauge.name for gauge in GAUGES}
        assert {each.name: each.value for each in expression.expr.matchers.matchers} == {"model_name": model.name}
