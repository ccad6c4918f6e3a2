"""What the programs on the device compute: one function for each kind, and the shapes that it is compiled for.

The layers run in one of two ways. By layer: one launch per layer, each layer's weights an argument of their own;
launches are cheap on a CPU, and XLA there copies whatever a loop cuts from stacked weights. In a loop over stacked
layers within one program, for devices where a launch is dear and a cut is free: it compiles in the time of one layer.

Hidden states at the reads stay on the device: each launch puts its own after those of the launches before, and the
head's programs take their numbers and the target ids.

On a mesh of devices (``model.sharding``) the same functions run on every device's part of the arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout as Order
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh

from model import decoder, overlap
from model.attention import AttentionContext, prepared, to_pool
from model.config import ModelConfig
from model.contract import PAGE_TOKENS
from model.cpu import linear, pages
from model.delta import Snapshots
from model.encoder import EmbeddingAndClassifier
from model.families import laya
from model.families.registry import Abstract, Ends
from model.inputs import Inputs, width
from model.layers import OfStack
from model.logprobs import argmax, log_normalizer, target_logits, top
from model.lora import Rows
from model.plan import Shape
from model.sharding import DATA, RULES
from model.sizes import Layout

State = nnx.State[Any, Any]
Angles = tuple[jax.Array, jax.Array]
KeysValues = jax.Array | tuple[jax.Array, ...]
"""Keys and values of all layers, [L, 2, M, K, H]; by layer a tuple of the L parts."""
Kept = Snapshots | None
"""What a hybrid keeps of prefixes beside keys and values, see ``model.delta``; None: the model is none."""
Size = Shape | int
"""What a program is compiled for: the shape of a call, or a number of tokens, hidden states or targets."""

WHOLE, CALLS = RULES.spec(), RULES.spec("calls")
POOL = RULES.spec(None, None, None, "kv_heads", None, None)


class Kind(StrEnum):
    """The kinds of programs; ``definition`` says which function is which."""

    # Only where the layers run one by one.
    EMBED = "embed"
    LAYER = "layer"
    KEEP = "keep"
    LAST = "last"
    READ = "read"
    READ_ALL = "read-all"
    # Only where they run in a loop.
    SEGMENTS = "segments"
    PREFILL = "prefill"
    PREFILL_READ = "prefill-read"
    # Everywhere.
    WRITE = "write"
    TARGETS = "targets"
    NORMALIZER = "normalizer"
    ARGMAX = "argmax"
    TOP = "top"
    FEATURES = "features"


class Span(NamedTuple):
    """Tokens ``start`` to ``start + length`` of a prefill call, which belong into page ``page`` from ``offset`` on."""

    page: int
    offset: int
    start: int
    length: int


def begins_with_pages(sizes: Sequence[int]) -> bool:
    """Whether each prefix of a prefill call begins where a page would, if the call were cut into pages.

    Args:
        sizes: of the calls, in tokens.
    """
    return not any(size % PAGE_TOKENS for size in sizes)


def spans_of(size: int) -> int:
    """Spans that a prefill call of ``size`` tokens has room for: of one prefix, wherever it begins in a page, or of
    several shorter ones."""
    return max((size + PAGE_TOKENS - 2) // PAGE_TOKENS + 1, size // 16)


@dataclass(slots=True)
class Weights:
    """Parameters on the devices. They change only where ``model.adapters`` puts one into its slot.

    Attributes:
        ends: parameters of ``registry.Ends``.
        layers: each layer's parameters; or, in a list of one, all layers' in stacks.
    """

    ends: State
    layers: list[State]


@dataclass(frozen=True, slots=True)
class Model:
    """What all programs of a model have in common.

    Attributes:
        config: of one device's part.
        abstract: how to merge the parameters, and their shapes on one device.
        layout: the sizes that programs are compiled for.
        by_layer: how the layers run.
        mesh: that the parameters lie on; None: one device.
        divided: the same with the tokens of its calls divided among devices, for large calls; None: it has none.
    """

    config: ModelConfig
    abstract: Abstract
    layout: Layout
    by_layer: bool
    mesh: Mesh | None
    divided: "Model | None" = None

    def of_call(self, tokens: int) -> "Model":
        """The model for a call of so many tokens."""
        large = tokens >= self.layout.divided_tokens and overlap.can_share(tokens, self.config.shards)
        return self.divided if self.divided is not None and large else self

    @property
    def at_once(self) -> int:
        """Calls that one launch runs, each on other devices."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def collected(self) -> int:
        """Hidden states that are kept on the device: those of some launches, or of many that are not full."""
        some = 4 * self.at_once * max(shape.reads for shape in self.layout.ladder)
        return max([some, *self.layout.sizes.chunks])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights, matmul operands, keys and values."""
        return dict(nnx.to_flat_state(self.abstract.ends[1]))["embedding",].dtype

    @property
    def implementation(self) -> str:
        """Of attention, see ``model.attention``."""
        return self.block(self.abstract.block[1]).implementation

    def ends(self, ends: State) -> Ends:
        """The embedding and the head, with these parameters."""
        return nnx.merge(self.abstract.ends[0], ends)

    def head(self, ends: State) -> decoder.EmbeddingAndHead | EmbeddingAndClassifier:
        """The output head, of a model that has one, with these parameters."""
        return cast(decoder.EmbeddingAndHead | EmbeddingAndClassifier, self.ends(ends))

    def block(self, weights: State) -> decoder.Block:
        """One layer, with these parameters."""
        return nnx.merge(self.abstract.block[0], weights)

    def collect(self, ends: State, hidden: jax.Array, place: jax.Array, collected: jax.Array) -> jax.Array:
        """Collected hidden states with these, normalised, from ``place`` on. Every device, and so every host, gets
        those of all calls."""
        normed = self.normed(ends, hidden)
        rows = normed if self.at_once == 1 else lax.all_gather(normed, DATA, tiled=True)
        return lax.dynamic_update_slice(collected, rows, (place[0], 0))

    def normed(self, ends: State, hidden: jax.Array) -> jax.Array:
        """Hidden states, all of this device's call, after the last norm."""
        normed = self.ends(ends).norm(hidden)
        return overlap.all_rows(normed) if self.config.by_tokens else normed

    def inputs(self, array: jax.Array, size: int) -> Inputs:
        """What this device's call of ``size`` tokens is told."""
        return Inputs.of(array[0], size, self.layout.room)


def context_of(model: Model, inputs: Inputs, pool: jax.Array, snapshots: Kept, bins: int = 1) -> AttentionContext:
    """What attention takes.

    Args:
        bins: that the call's tokens are in.
    """
    segments = inputs.segments.reshape(bins, -1)
    pages = pool, inputs.tables, inputs.lengths
    adapters = Rows(inputs.adapters, inputs.adapted) if len(inputs.adapters) else None
    context = AttentionContext(segments, inputs.positions, inputs.prefixes, *pages, snapshots, inputs.slots, adapters)
    return context if decoder.windows(model.config) else prepared(context, model.implementation)


def embed(model: Model, size: int, ends: State, array: jax.Array) -> tuple[jax.Array, Angles, Inputs]:
    """The first layer's input, the angles of all layers, and what the call is told, taken apart."""
    inputs = model.inputs(array, size)
    return *model.ends(ends).embed(inputs.tokens, inputs.positions), inputs


def _embedded(model: Model, size: int, ends: State, array: jax.Array) -> tuple[jax.Array, Angles, Inputs]:
    """``embed`` before a loop over layers: without the barrier, XLA computes the angles in each of them."""
    x, angles, inputs = embed(model, size, ends, array)
    return *lax.optimization_barrier((x, angles)), inputs


def layer(
    model: Model,
    shape: Shape,
    weights: State,
    x: jax.Array,
    angles: Angles,
    inputs: Inputs,
    pool: jax.Array,
    snapshots: Kept,
    number: jax.Array,
) -> jax.Array:
    """The next layer's input."""
    return model.block(weights)(x, angles, context_of(model, inputs, pool, snapshots, shape.bins), number)[0]


def keep(
    model: Model,
    weights: State,
    x: jax.Array,
    angles: Angles,
    inputs: Inputs,
    pool: jax.Array,
    snapshots: Kept,
    number: jax.Array,
) -> tuple[jax.Array, jax.Array, Kept]:
    """The next layer's input, this layer's keys and values, and the snapshots with this layer's."""
    return _keep(model, weights, x, angles, context_of(model, inputs, pool, snapshots), number)


def _keep(
    model: Model, weights: State, x: jax.Array, angles: Angles, context: AttentionContext, number: jax.Array
) -> tuple[jax.Array, jax.Array, Kept]:
    x, keys_values, snapshots = model.block(weights).keep(x, angles, context, number)
    return x, _as_wide_as_pages(model, keys_values), snapshots


def last(
    model: Model, weights: State, x: jax.Array, angles: Angles, inputs: Inputs, snapshots: Kept
) -> tuple[jax.Array, Kept]:
    """The last layer's keys and values, and the snapshots with its own: a prefill needs no more of it."""
    final = model.config.layers - 1
    unread = jnp.zeros((), model.dtype)  # it attends to nothing
    keys_values, snapshots = model.block(weights).keep_last(
        x, angles, context_of(model, inputs, unread, snapshots), final
    )
    return _as_wide_as_pages(model, keys_values), snapshots


def _as_wide_as_pages(model: Model, keys_values: jax.Array) -> jax.Array:
    """Keys and values with zeros where the pool's heads are wider than the model's."""
    more = model.layout.pool.shape[-1] - keys_values.shape[-1]
    return jnp.pad(keys_values, [(0, 0)] * (keys_values.ndim - 1) + [(0, more)]) if more else keys_values


def read(
    model: Model,
    ends: State,
    weights: State,
    x: jax.Array,
    angles: Angles,
    inputs: Inputs,
    pool: jax.Array,
    snapshots: Kept,
    number: jax.Array,
    collected: jax.Array,
) -> jax.Array:
    """Collected hidden states with those at the reads: the last layer and the last norm, for the reads alone.

    What is read sees no bins, only segments: one program serves all shapes of as many tokens.
    """
    context = context_of(model, inputs, pool, snapshots)
    hidden = model.ends(ends).last_layer(model.block(weights), x, angles, context, number, inputs)
    return model.collect(ends, hidden, inputs.place, collected)


def read_all(model: Model, ends: State, x: jax.Array, inputs: Inputs, collected: jax.Array) -> jax.Array:
    """Collected hidden states with those of all tokens of a prefill, which every device has."""
    return lax.dynamic_update_slice(collected, model.normed(ends, x), (inputs.place[0], 0))


def segments(
    model: Model,
    shape: Shape,
    ends: State,
    layers: State,
    array: jax.Array,
    pool: jax.Array,
    snapshots: Kept,
    collected: jax.Array,
) -> jax.Array:
    """``read`` after all layers but the last."""
    final = model.config.layers - 1
    x, angles, inputs = _embedded(model, shape.tokens, ends, array)
    context = context_of(model, inputs, pool, snapshots, shape.bins)

    def step(number: jax.Array, x: jax.Array) -> jax.Array:
        return model.block(_cut(model, layers, number))(x, angles, context, number)[0]

    x = lax.fori_loop(0, final, step, x)
    block = model.block(_cut(model, layers, final))
    hidden = model.ends(ends).last_layer(block, x, angles, context, final, inputs)
    return model.collect(ends, hidden, inputs.place, collected)


def prefill(
    model: Model, size: int, ends: State, layers: State, array: jax.Array, pool: jax.Array, snapshots: Kept
) -> tuple[jax.Array, Kept]:
    """Keys and values of all layers, and the snapshots with theirs."""
    final = model.config.layers - 1
    embedded = _, angles, inputs = _embedded(model, size, ends, array)
    x, kept, snapshots = _kept_layers(model, layers, embedded, pool, snapshots, final)
    keys_values, snapshots = last(model, _cut(model, layers, final), x, angles, inputs, snapshots)
    return _put_kept(kept, keys_values, final), snapshots


def prefill_read(
    model: Model,
    size: int,
    ends: State,
    layers: State,
    array: jax.Array,
    pool: jax.Array,
    snapshots: Kept,
    collected: jax.Array,
) -> tuple[jax.Array, Kept, jax.Array]:
    """``prefill``, and ``read_all`` after it."""
    embedded = _, _, inputs = _embedded(model, size, ends, array)
    x, kept, snapshots = _kept_layers(model, layers, embedded, pool, snapshots, model.config.layers)
    return kept, snapshots, read_all(model, ends, x, inputs, collected)


def _kept_layers(
    model: Model,
    layers: State,
    embedded: tuple[jax.Array, Angles, Inputs],
    pool: jax.Array,
    snapshots: Kept,
    count: int,
) -> tuple[jax.Array, jax.Array, Kept]:
    """The output of the first ``count`` layers, their keys and values, with room for those of the others, and the
    snapshots with theirs."""
    x, angles, inputs = embedded
    context, stack = context_of(model, inputs, pool, snapshots), _stack_of_kept(model, len(inputs.tokens))

    def step(number: jax.Array, carry: tuple[jax.Array, jax.Array, Kept]) -> tuple[jax.Array, jax.Array, Kept]:
        x, kept, snapshots = carry
        weights = _cut(model, layers, number)
        with_snapshots = context._replace(snapshots=snapshots)
        x, keys_values, snapshots = _keep(model, weights, x, angles, with_snapshots, number)
        return x, _put_kept(kept, keys_values, number), snapshots

    return lax.fori_loop(0, count, step, (x, lax.empty(stack.shape, stack.dtype), snapshots))


def _put_kept(kept: jax.Array, keys_values: jax.Array, number: jax.Array | int) -> jax.Array:
    """All layers' keys and values with those of one.

    They lie as in pages. Else XLA turns all of them at the end, which on a TPU is a quarter of the prefill's time.
    """
    put = lax.dynamic_update_index_in_dim(kept, to_pool(keys_values).transpose(0, 2, 1, 3), number, 0)
    return with_layout_constraint(put, Order(tuple(range(put.ndim))))


def write(model: Model, pool: jax.Array, keys_values: KeysValues, spans: jax.Array, count: jax.Array) -> jax.Array:
    """The pool with keys and values of a prefill in the first ``count`` of ``spans``."""
    if model.config.native and isinstance(keys_values, tuple):
        return pages.write(pool, [to_pool(part) for part in keys_values], spans, count)
    if isinstance(keys_values, tuple):
        keys_values = to_pool(jnp.stack(keys_values)).transpose(0, 1, 3, 2, 4)
    layers, _, heads, _, head_width = keys_values.shape
    # Where prefixes begin with pages, no rows are needed around them. On a TPU they would cost as much as all the rest.
    around = 0 if begins_with_pages(model.layout.sizes.chunks) else PAGE_TOKENS
    rows = jnp.pad(keys_values, [(0, 0)] * 3 + [(around, around), (0, 0)]) if around else keys_values
    places = jnp.arange(PAGE_TOKENS)

    def step(number: jax.Array, pool: jax.Array) -> jax.Array:
        page, offset, start, length = spans[number]
        begin = (0, 0, 0, around + start - offset, 0)
        new = lax.dynamic_slice(rows, begin, (layers, 2, heads, PAGE_TOKENS, head_width))
        old = lax.dynamic_slice(pool, (page, 0, 0, 0, 0, 0), (1, *pool.shape[1:]))
        written = (places >= offset) & (places < offset + length)
        return lax.dynamic_update_slice(pool, jnp.where(written[:, None], new[None], old), (page, 0, 0, 0, 0, 0))

    return lax.fori_loop(0, count, step, pool)


def targets(model: Model, ends: State, collected: jax.Array, pairs: jax.Array) -> jax.Array:
    """Logits of pairs of a hidden state's number and an id."""
    head = model.head(ends)
    softcap, native = model.config.logit_softcap, model.config.native
    hidden, ids = collected[pairs[0]], pairs[1]
    logits = target_logits(hidden, ids, head.head_weights(), softcap, head.head_split(), native=native)
    return logits if (bias := head.head_bias()) is None else logits + bias[ids]


def normalizer(model: Model, ends: State, collected: jax.Array, numbers: jax.Array) -> jax.Array:
    """Log of the summed exponentials of all logits, of the hidden states of these numbers."""
    head, hidden = model.head(ends), collected[numbers]
    weights = head.head_weights()
    if model.config.native:
        return linear.argmax(hidden.astype(weights.dtype), weights, model.config.logit_softcap)[0]
    return log_normalizer(hidden, weights, model.config.logit_softcap, head.head_split())


def highest(
    model: Model, ends: State, collected: jax.Array, numbers: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``normalizer``'s values, and for each of these hidden states the id of the highest logit, and that logit."""
    head, hidden = model.head(ends), collected[numbers]
    weights = head.head_weights()
    if model.config.native:
        return linear.argmax(hidden.astype(weights.dtype), weights, model.config.logit_softcap)
    return argmax(hidden, weights, model.config.logit_softcap, head.head_split())


def tops(
    model: Model,
    count: int,
    ends: State,
    collected: jax.Array,
    numbers: jax.Array,
    wanted: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the scaled logits of the hidden states of these numbers: ``normalizer``'s values, and ids and values of the
    ``count`` highest. No more than ``wanted`` of so many states need be right: [ids, states]."""
    head, hidden = model.head(ends), collected[numbers]
    weights = head.head_weights()
    if model.config.native:
        return linear.top(hidden.astype(weights.dtype), weights, wanted, scale, count, model.config.logit_softcap)
    return top(hidden, weights, scale, count, model.config.logit_softcap, head.head_split())


def features(model: Model, ends: State, collected: jax.Array, numbers: jax.Array) -> jax.Array:
    """What a decision head makes of the hidden states of these numbers: [states, features]."""
    head = cast(decoder.EmbeddingAndHead | laya.Ends, model.ends(ends)).decision_head
    assert head is not None
    with jax.default_matmul_precision("highest"):
        return head(collected[numbers])


def _cut(model: Model, layers: State, number: jax.Array | int) -> State:
    """One layer's parameters from all layers' stacks."""

    def cut(leaf: Any) -> Any:
        if model.config.ragged and leaf.axes[0] == "experts":  # read where they lie
            return leaf.replace(OfStack(leaf[...], number))
        return leaf.replace(lax.dynamic_index_in_dim(leaf[...], number, keepdims=False))

    flat: Any = nnx.to_flat_state(layers)
    return nnx.from_flat_state([(path, cut(leaf)) for path, leaf in flat])


class Argument(NamedTuple):
    """An argument of a program.

    Attributes:
        part: shapes of what one device has of it; or itself, where there is one device.
        spec: how it lies on a mesh; or each of its branches.
    """

    part: Any
    spec: Any


class Definition(NamedTuple):
    """One program: its function, for one device, and its arguments.

    Attributes:
        results: how what is returned lies on a mesh.
        donated: numbers of the arguments that it may overwrite.
    """

    function: Callable[..., Any]
    arguments: tuple[Argument, ...]
    results: Any
    donated: tuple[int, ...] = ()


def definition(model: Model, weights: Weights, kind: Kind, size: Size) -> Definition:
    """The program of this kind, for arguments of this size."""
    tokens = size if isinstance(size, int) else size.tokens
    if kind in (Kind.SEGMENTS, Kind.PREFILL, Kind.PREFILL_READ):
        model = model.of_call(tokens)
    c, ends, layers = model.config, _ends(model, weights), _layers(model, weights)
    array = Argument(_int32(1, width(tokens, model.layout.room)), CALLS)
    number, pool = Argument(_int32(), WHOLE), Argument(model.layout.pool, POOL)
    x, angles, inputs = Argument(_float32(tokens, c.width), CALLS), _angles(model, tokens), _inputs(model, tokens)
    collected = Argument(_float32(model.collected, c.width), WHOLE)
    numbers, pairs = Argument(_int32(tokens), WHOLE), Argument(_int32(2, tokens), WHOLE)
    snapshots = Argument(model.layout.snapshots, WHOLE)
    of_layer = x, angles, inputs, pool, snapshots, number
    kept = _kept(model, tokens)
    match kind, size:
        case Kind.EMBED, int():
            return Definition(partial(embed, model, size), (ends, array), (x.spec, angles.spec, inputs.spec))
        case Kind.LAYER, Shape():
            return Definition(partial(layer, model, size), (layers, *of_layer), x.spec, donated=(1,))
        case Kind.KEEP, int():
            return Definition(partial(keep, model), (layers, *of_layer), (x.spec, kept.spec, WHOLE), donated=(1, 5))
        case Kind.LAST, int():
            return Definition(
                partial(last, model), (layers, x, angles, inputs, snapshots), (kept.spec, WHOLE), donated=(4,)
            )
        case Kind.READ, int():
            return Definition(partial(read, model), (ends, layers, *of_layer, collected), WHOLE)
        case Kind.READ_ALL, int():
            return Definition(partial(read_all, model), (ends, x, inputs, collected), WHOLE)
        case Kind.SEGMENTS, Shape():
            return Definition(partial(segments, model, size), (ends, layers, array, pool, snapshots, collected), WHOLE)
        case Kind.PREFILL, int():
            arguments = ends, layers, array, pool, snapshots
            return Definition(partial(prefill, model, size), arguments, (kept.spec, WHOLE), donated=(4,))
        case Kind.PREFILL_READ, int():
            arguments = ends, layers, array, pool, snapshots, collected
            results = kept.spec, WHOLE, WHOLE
            return Definition(partial(prefill_read, model, size), arguments, results, donated=(4,))
        case Kind.WRITE, int():
            spans = Argument(_int32(spans_of(tokens), len(Span._fields)), WHOLE)
            return Definition(partial(write, model), (pool, kept, spans, number), POOL, donated=(0,))
        case Kind.TARGETS, int():
            return Definition(partial(targets, model), (ends, collected, pairs), WHOLE)
        case Kind.NORMALIZER, int():
            return Definition(partial(normalizer, model), (ends, collected, numbers), WHOLE)
        case Kind.ARGMAX, int():
            return Definition(partial(highest, model), (ends, collected, numbers), WHOLE)
        case Kind.TOP, int():
            states = Argument(_int32(model.layout.sizes.argmax_sizes[-1]), WHOLE)
            asked = Argument(_int32(2), WHOLE), Argument(_float32(), WHOLE)
            return Definition(partial(tops, model, size), (ends, collected, states, *asked), WHOLE)
        case Kind.FEATURES, int():
            return Definition(partial(features, model), (ends, collected, numbers), WHOLE)
        case _:
            raise ValueError(f"there is no program {kind} of the size {size}")


def _ends(model: Model, weights: Weights) -> Argument:
    part = model.abstract.ends[1]
    return Argument(weights.ends if model.mesh is None else part, _specs(part))


def _layers(model: Model, weights: Weights) -> Argument:
    """One layer's parameters; in a loop, all layers' in stacks."""
    part = model.abstract.block[1]
    specs = _specs(part) if model.by_layer else _specs(part, None)
    part = part if model.by_layer else stack_of(part, model.config.layers)
    return Argument(weights.layers[0] if model.mesh is None else part, specs)


def _specs(part: State, *leading: None) -> State:
    """The spec of each parameter on a mesh.

    Args:
        leading: axes before those that the parameters name.
    """
    flat: Any = nnx.to_flat_state(part)
    return nnx.from_flat_state([(path, leaf.replace(RULES.spec(*leading, *leaf.axes))) for path, leaf in flat])


def _angles(model: Model, tokens: int) -> Argument:
    part = jax.eval_shape(partial(decoder.all_angles, model.config), _int32(tokens))
    return Argument(part, RULES.spec(*[None] * (part[0].ndim - 2), "calls", None))


def _inputs(model: Model, tokens: int) -> Argument:
    """What a call is told, taken apart."""
    row = _int32(width(tokens, model.layout.room))
    part = jax.eval_shape(partial(Inputs.of, size=tokens, room=model.layout.room), row)
    return Argument(part, Inputs(*[CALLS] * 6, adapters=WHOLE, tables=WHOLE, lengths=WHOLE, slots=WHOLE, place=WHOLE))


def _kept(model: Model, tokens: int) -> Argument:
    """The keys and values that a prefill returns. By layer, the spec is that of each part."""
    c = model.config
    if not model.by_layer:
        return Argument(_stack_of_kept(model, tokens), RULES.spec(None, None, "kv_heads", None, None))
    one = jax.ShapeDtypeStruct((2, tokens, c.kv_heads, model.layout.pool.shape[-1]), model.dtype)
    return Argument((one,) * c.layers, RULES.spec(None, None, "kv_heads", None))


def _stack_of_kept(model: Model, tokens: int) -> jax.ShapeDtypeStruct:
    """All layers' keys and values of so many tokens, by head: [L, 2, K, tokens, W]."""
    c = model.config
    shape = (c.layers, 2, c.kv_heads, tokens, model.layout.pool.shape[-1])
    return jax.ShapeDtypeStruct(shape, model.layout.pool.dtype)


def stack_of(layer: State, count: int) -> State:
    """Shapes of ``count`` layers' parameters, stacked, from one's."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct((count, *p.shape), p.dtype), layer)


def _int32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def _float32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)
