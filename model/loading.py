"""From a folder in Hugging Face layout to an engine, in three steps.

``prepare`` decides how the model runs on its devices and whether it fits, ``place`` reads the weights onto them, and
the engine is made of both.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh

from model import checkpoint, decision_heads, decoder, sharding
from model.adapters import Adapters
from model.attention import FOLD_PREFIX, NATIVE, TRITON
from model.attention_gpu import LEAST_CAPABILITY
from model.checkpoint import Place, Tensor
from model.computations import Model, State, Weights, stack_of
from model.config import Lora, ModelConfig
from model.contract import MemoryUse, Progress
from model.cpu import build as cpu_build
from model.cpu import linear
from model.cpu.build import Kernels
from model.engine import Engine
from model.families import heads, registry, wrappers
from model.families.registry import Family
from model.fields import ConfigError, read_config
from model.layers import quantized
from model.memory import Room, Weighed, fit
from model.programs import Programs
from model.sharding import MODEL, by_device, divided, stacked
from model.sizes import BY_PLATFORM, Layout, Sizes, layout
from model.tensors.adapters import REMEDY, Merged
from model.tensors.folder import HEAD_FILE, Opened, differ, opened

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["int8"]


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model runs on its devices.

    Attributes:
        whole: the config of the whole model.
        model: one device's part, and how it runs.
        memory: what it takes.
    """

    whole: ModelConfig
    family: Family
    model: Model
    memory: MemoryUse


def load(
    folder: Path, *, progress: Progress | None = None, compiled_folder: Path | None = None, **options: Any
) -> Engine:
    """Read a checkpoint in Hugging Face layout onto the device; call ``Engine.warmup`` next.

    Args:
        compiled_folder: keeps compiled programs for the next start, see ``model.compiled``.
        options: see ``prepare``.

    Raises:
        CheckpointError: a tensor missing, unexpected or mis-shaped, or a broken file.
        ConfigError, MemoryNeededError, RuntimeError: see ``prepare``.
    """
    return read(folder, prepare(folder, compiled_folder=compiled_folder, **options), progress, compiled_folder)


def read(folder: Path, choice: Choice, progress: Progress | None = None, compiled_folder: Path | None = None) -> Engine:
    """Read the weights of a model that ``prepare`` has chosen; see ``load``."""
    programs = _programs(folder, choice, progress, compiled_folder)
    targets = choice.family.weights(choice.whole)
    adapters = Adapters(programs.model, targets, programs.weights) if choice.whole.lora else None
    return Engine(programs, choice.memory, adapters)


def load_programs(folder: Path, *, compiled_folder: Path | None = None, **options: Any) -> Programs:
    """The programs of ``load``'s engine over the same weights, without its page pool."""
    return _programs(folder, prepare(folder, compiled_folder=compiled_folder, **options), None, compiled_folder)


def _programs(folder: Path, choice: Choice, progress: Progress | None, compiled_folder: Path | None) -> Programs:
    with opened(folder) as stored:
        weights = place(_with_embedding(choice.whole, stored), choice, progress)
    return Programs(choice.model, weights, compiled_folder)


def prepare(
    folder: Path,
    *,
    dtype: Dtype | None = None,
    implementation: str | None = None,
    by_layer: bool | None = None,
    max_prompt_tokens: int | None = None,
    compiled_folder: Path | None = None,
    quantization: Quantization | None = None,
    ragged: bool | None = None,
    by_tokens: bool | None = None,
    mesh: Mesh | None = None,
    trust_config: Sequence[str] = (),
    room: Room | None = None,
    lora: Lora | None = None,
    **sizes: int | tuple[int, ...],
) -> Choice:
    """Decide how a checkpoint's model runs here, from its config and the headers of its files.

    Args:
        folder: has ``config.json`` and safetensors.
        dtype: of weights and matmul operands; None: float32 on a CPU and bfloat16 elsewhere.
        implementation: of attention, see ``model.attention``; None: the platform's kernel, or "paged".
        by_layer: how the layers run, see ``model.computations``; None: by layer on CPU.
        max_prompt_tokens: the longest sequence; None: the model's context, or what fits into ``room``.
        compiled_folder: keeps the CPU's kernels for the next start.
        quantization: of the kernels of attention and MLP, applied while they are read.
        ragged: how experts multiply, see ``model.config``; None: so on TPU.
        by_tokens: whether devices divide the tokens of large calls, see ``model.config``; None: they do on TPU.
        mesh: devices to spread the model over, see ``model.sharding``; None: the first device.
        trust_config: keys of ``config.json`` that change nothing, as the user says.
        room: the memory that it may take; None: any.
        lora: room for adapters beside the weights, see ``model.adapters``.
        sizes: fields of ``Sizes`` that replace the platform's.

    Raises:
        ConfigError: a config key or architecture that is not known, or sizes that the mesh cannot divide.
        MemoryNeededError: it does not fit into ``room``.
        RuntimeError: "native" attention is asked for where its kernel cannot be built.
    """
    raw = read_config(folder)
    with opened(folder) as stored:
        config = registry.from_hf(heads.decided(wrappers.unwrapped(raw, trust_config), stored), trust_config)
        config = _with_decision_head(_with_stored_head(config, stored), stored)
        notes = [note for note in (wrappers.note(raw), stored.adapter and stored.adapter.note) if note]
    config = replace(config, notes=(*config.notes, *notes))
    if quantization and config.experts:
        raise ConfigError(f"{config.architecture}: mixtures of experts are not quantised; leave out {quantization}")
    platform = jax.default_backend()
    dtype = dtype or ("float32" if platform == "cpu" else "bfloat16")
    implementation, kernels = _implementation(implementation, platform, compiled_folder)
    native = packed = kernels is not None and mesh is None
    if kernels is not None and dtype == "bfloat16":  # two numbers make one operand
        native = native and config.width % 2 == 0
        packed = native and kernels.bfloat16 and config.ff_width % 2 == 0 and config.shared_ff_width % 2 == 0
    packed = packed and not quantization
    ragged, by_tokens = (platform == "tpu" if each is None else each for each in (ragged, by_tokens))
    if lora and config.encoder:
        raise ConfigError(f"{config.architecture}: encoders take no adapters beside their weights; {REMEDY}")
    lora = lora and replace(lora, rank=-(-lora.rank // linear.STRIP) * linear.STRIP)
    return choose(
        replace(
            config,
            int8=quantization == "int8",
            native=native,
            packed=packed,
            ragged=ragged,
            by_tokens=by_tokens,
            lora=lora,
        ),
        dtype=dtype,
        implementation=implementation,
        by_layer=platform == "cpu" if by_layer is None else by_layer,
        sizes=replace(BY_PLATFORM.get(platform, BY_PLATFORM["tpu"]), **sizes),
        max_prompt_tokens=max_prompt_tokens,
        mesh=mesh,
        room=room,
        cache_bytes=cast(int | None, sizes.get("prefix_cache_bytes")),
    )


def choose(
    config: ModelConfig,
    *,
    dtype: Dtype,
    implementation: str,
    by_layer: bool,
    sizes: Sizes,
    max_prompt_tokens: int | None,
    mesh: Mesh | None,
    room: Room | None = None,
    cache_bytes: int | None = None,
) -> Choice:
    """What one device computes, with which sizes, and the shapes of its parameters.

    Args:
        cache_bytes: the prefix cache that is asked for; None: as in ``sizes``, or less if that does not fit.

    Raises:
        ConfigError: sizes that the mesh cannot divide.
        MemoryNeededError: it does not fit into ``room``.
    """
    target = jnp.dtype(dtype)
    if config.encoder and implementation not in (NATIVE, *FOLD_PREFIX):
        implementation = "paged"  # the accelerators' kernels are causal
    if config.recurrence and implementation in TRITON:
        implementation = "paged"  # recurrent layers by XLA know one prefix a call, and that kernel's calls have several
    part = config if mesh is None else divided(config, mesh.shape[MODEL])
    by_tokens = config.by_tokens and not by_layer and part.shards > 1
    # Their layers are written for all of a call's tokens.
    by_tokens = by_tokens and not (part.recurrence or part.encoder or part.lora)
    part = replace(part, by_tokens=by_tokens)
    whole_calls = replace(part, by_tokens=False)
    family, abstract = registry.build(whole_calls, dtype=target, implementation=implementation)

    def laid(longest: int | None, cache: int | None) -> Layout:
        own = sizes if cache is None else replace(sizes, prefix_cache_bytes=cache)
        return layout(part, own, dtype=target, implementation=implementation, max_prompt_tokens=longest)

    weighed = Weighed.of(abstract, part.layers)
    chosen, memory = fit(part, weighed, laid, room, max_prompt_tokens=max_prompt_tokens, cache_bytes=cache_bytes)
    of_tokens = None
    if by_tokens:
        _, abstract_of_tokens = registry.build(part, dtype=target, implementation=implementation)
        of_tokens = Model(part, abstract_of_tokens, chosen, by_layer, mesh)
    return Choice(config, family, Model(whole_calls, abstract, chosen, by_layer, mesh, of_tokens), memory)


def place(stored: Opened, choice: Choice, progress: Progress | None = None) -> Weights:
    """Read all weights onto the devices, one tensor after the other.

    Raises:
        CheckpointError: a tensor missing, unexpected or mis-shaped.
    """
    placed = _Placed(choice)
    table = {**choice.family.weights(choice.whole), **decision_heads.table(choice.whole)}
    checkpoint.load(
        stored,
        table,
        ignored=(*decoder.ignored(choice.whole), *choice.family.ignored),
        put=placed.put,
        progress=progress,
    )
    block = choice.model.abstract.block[1]
    places = [("blocks", layer) for layer in range(choice.whole.layers)] if choice.model.by_layer else [("blocks",)]
    return Weights(placed.state(choice.model.abstract.ends[1]), [placed.state(block, *each) for each in places])


def without_weights(
    config: ModelConfig,
    mesh: Mesh,
    sizes: Sizes,
    *,
    dtype: Dtype = "bfloat16",
    implementation: str = "fused",
    max_prompt_tokens: int | None = None,
    room: Room | None = None,
    cache_bytes: int | None = None,
) -> tuple[Programs, Layout]:
    """The programs that ``load`` would make on those TPU chips or GPUs, over shapes alone: to compile, not to run.

    Args:
        mesh: of devices, which may come from ``jax.experimental.topologies`` and need no TPU or GPU.
        room, cache_bytes: see ``choose``.

    Raises:
        ConfigError: sizes that the mesh cannot divide.
        MemoryNeededError: it does not fit into ``room``.
    """
    model = choose(
        replace(config, ragged=implementation == "fused", by_tokens=implementation == "fused"),
        dtype=dtype,
        implementation=implementation,
        by_layer=False,
        sizes=sizes,
        max_prompt_tokens=max_prompt_tokens,
        mesh=mesh,
        room=room,
        cache_bytes=cache_bytes,
    ).model
    shapes = Weights(model.abstract.ends[1], [stack_of(model.abstract.block[1], model.config.layers)])
    return Programs(model, shapes, None), model.layout


class _Placed:
    """Parameters by their path, put onto the devices as they are read."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        flat: Any = [nnx.to_flat_state(state) for _, state in (choice.model.abstract.ends, choice.model.abstract.block)]
        self._leaves: dict[Place, Any] = {path: leaf for part in flat for path, leaf in part}
        self._arrays: dict[Place, jax.Array] = {}

    def put(self, path: Place, tensor: Tensor) -> None:
        """Place one parameter, quantised where the model is."""
        within = path[2:] if path[0] == "blocks" else path
        array = self._on_device(self._leaves[within], tensor)
        if self._leaves[within].dtype == jnp.int8:
            array, scales = by_device(quantized, array)
            self._store((*path[:-1], "scales"), scales)
        self._store(path, array)

    def state(self, like: State, *prefix: str | int) -> State:
        """The parameters of ``like``, stored under ``prefix``."""
        leaves: Any = nnx.to_flat_state(like)
        for path, leaf in leaves:
            if (*prefix, *path) not in self._arrays:  # empty slots, and what a layer lacks in ``families.modernbert``
                zeros = self._on_device(leaf, np.zeros(leaf.shape, np.float32))
                in_stack = prefix == ("blocks",)
                self._arrays[*prefix, *path] = stacked(zeros, self._choice.whole.layers) if in_stack else zeros
        return nnx.from_flat_state([(path, leaf.replace(self._arrays[*prefix, *path])) for path, leaf in leaves])

    def _on_device(self, leaf: Any, tensor: Tensor | npt.NDArray[np.float32]) -> jax.Array:
        mesh = self._choice.model.mesh
        dtype = leaf.dtype if leaf.dtype == jnp.float32 else self._choice.model.dtype
        if mesh is not None:
            return sharding.place(tensor, leaf.axes, leaf.shape, dtype, mesh)
        whole = np.asarray(tensor)
        if leaf.get_metadata().get("packed"):
            return jnp.asarray(linear.pack(whole.astype(dtype, copy=False)))
        return jnp.asarray(whole, dtype)

    def _store(self, path: Place, array: jax.Array) -> None:
        """Keep an array by itself, or in its place in the stack of all layers."""
        if path[0] != "blocks" or self._choice.model.by_layer:
            self._arrays[path] = array
            return
        _, layer, *rest = path
        stack = ("blocks", *rest)
        if stack not in self._arrays:
            self._arrays[stack] = stacked(array, self._choice.whole.layers)
        self._arrays[stack] = _insert(self._arrays[stack], array, layer)


@partial(jax.jit, donate_argnums=0)
def _insert(stack: jax.Array, array: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _with_stored_head(config: ModelConfig, stored: Opened) -> ModelConfig:
    """``config``, untied where the checkpoint stores a head that differs from the embedding: transformers uses it."""
    if config.tied_head and isinstance(stored.tensors.get(HEAD), Merged):
        raise ConfigError(
            f"the adapter {stored.adapter and stored.adapter.name} changes {HEAD}, which config.json ties to the "
            f"embedding: with peft it would change both; {REMEDY}"
        )
    if not config.tied_head or not differ(stored.tensors, HEAD, EMBEDDING):
        return config
    logger.warning(
        "config.json ties the output head to the embedding, and %s is stored with other numbers than %s: it is used, "
        "as by transformers; write tie_word_embeddings: false into config.json",
        HEAD,
        EMBEDDING,
    )
    return replace(config, tied_head=False)


def _with_decision_head(config: ModelConfig, stored: Opened) -> ModelConfig:
    """``config`` with the decision head that is stored in place of an output head, which nothing would read."""
    if (head := decision_heads.of(stored.tensors)) is None:
        return config
    if config.classes:
        raise ConfigError(
            f"{config.architecture} has the head of a classifier, and {HEAD_FILE} lies beside it; only one of them can "
            "be meant: take the other out of the folder"
        )
    note = f"answers are read by a {head.kind} head of {head.width} channels: only the decision routes score"
    return replace(config, decision_head=head, tied_head=True, notes=(*config.notes, note))


def _with_embedding(config: ModelConfig, stored: Opened) -> Opened:
    """``stored`` with an embedding: of a tied pair of which only the head is stored, it is the embedding too."""
    if config.tied_head and HEAD in stored.tensors and EMBEDDING not in stored.tensors:
        return replace(stored, tensors={**stored.tensors, EMBEDDING: stored.tensors[HEAD]})
    return stored


def _implementation(asked: str | None, platform: str, folder: Path | None) -> tuple[str, Kernels | None]:
    """The attention that is asked for, or else the fastest that runs here; with the CPU's kernels if it needs them."""
    if asked not in (None, NATIVE):
        return asked, None
    if asked is None and platform == "tpu":
        return "fused", None
    if asked is None and platform == "gpu" and float(jax.devices()[0].compute_capability) >= LEAST_CAPABILITY:
        return "triton", None
    if of_jax := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(of_jax)  # then nothing else keeps anything, see ``model.compiled``
    if platform == "cpu" and (kernels := cpu_build.load(folder)):
        return NATIVE, kernels
    if asked == NATIVE:
        raise RuntimeError(f"attention {asked!r} cannot be built here, and the log says why; 'paged' runs everywhere")
    return "paged", None
