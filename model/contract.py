"""What goes into an engine, what comes out, and what an engine must do: numpy, builtins and frozen dataclasses only.

A leaf: it imports nothing else of this package, and never jax, since the service's front end unpickles these classes in
a process without jax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

PAGE_TOKENS = 128
"""Tokens of one page of the prefix cache, which keeps whole pages for later batches: wide enough for one efficient
matmul a step, small enough that a short prefix wastes little."""

SALT_BITS = 42
TOKEN_BITS = 63 - SALT_BITS
"""Bits of a salt, and of a token in the prefix cache's keys: together they fit into a signed integer of 64."""

MOST_TOP = 1024
"""The most tokens that are found of one read."""

MOST_READS = 128
"""The most positions that are read of an encoder's sequence: what every call has room for."""

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, what)`` while an engine warms up."""


def common_prefix(one: Int32 | Int64, other: Int32 | Int64) -> int:
    """The number of leading tokens that are equal."""
    room = min(len(one), len(other))
    differs = one[:room] != other[:room]
    first = int(differs.argmax()) if room else 0
    return first if room and differs[first] else room


def shared_by_all(shared: Int64) -> int:
    """The number of leading tokens that all sequences share, from what each shares with the one before it."""
    return int(shared[1:].min()) if len(shared) > 1 else 0


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token sequences and the positions whose next-token distribution is read, packed.

    Sequence ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``. Read ``r`` takes the distribution after position
    ``read_positions[r]`` (counted from the start of its sequence) of sequence ``read_sequences[r]``, and from it
    the values of the token ids ``targets[target_offsets[r]:target_offsets[r + 1]]``. Reads are ordered by
    sequence, then by position, each position once.

    A model with a decision head has one value for any target of a read: the logit of the option that is read there,
    for the query that is read at the last read of its sequence.

    Attributes:
        tokens: ids of all sequences, one after the other; each ``0 <= id < vocab_size``. With token types, ids of the
            second are ``vocab_size`` higher, and so on.
        offsets: n + 1 bounds into ``tokens``, the first 0; no sequence is empty.
        read_sequences: one sequence number a read, not descending.
        read_positions: one position a read, within its sequence.
        targets: ids of all reads, one after the other; class numbers where the model has classes.
        target_offsets: one more than there are reads, bounds into ``targets``.
        vocab_logprobs: True: values are log-probabilities over the whole vocabulary, in nats. False: values are
            logits, that is log-probabilities up to one constant per read, which a softmax over the targets
            removes; the vocabulary matmul is then not needed.
        argmax: also find each read's top-1 token, which takes the vocabulary matmul.
        top: how many tokens with the highest values to find of each read, at most ``MOST_TOP`` and the vocabulary.
        temperature: divides all logits, above 0.
        keep: also compute the whole pages of sequences that have no reads, for later batches; otherwise such sequences
            cost nothing.
        common: shape [n, 2], for each sequence what its request's sequences have in common, in this batch and others:
            how many tokens at the front, and in how many sequences. It decides what is worth a page of the prefix
            cache, by the whole request and not by how it was cut into batches. None: not known.
        salts: for each sequence a number, ``0 <= salt < 2**SALT_BITS``. Sequences with different salts share no prefix,
            in this batch or another. None: all are 0.
        adapters: for each sequence the slot of its LoRA adapter, from 1; 0: the model itself. None: all are 0.
        shared: for each sequence, how many leading tokens it shares with the one before it in this batch, its last
            token never counted; 0 for the first. Less is allowed; with more, scores are wrong, since engines do not
            compare these again. None: not measured.
    """

    tokens: Int32
    offsets: Int64
    read_sequences: Int32
    read_positions: Int32
    targets: Int32
    target_offsets: Int64
    vocab_logprobs: bool = True
    argmax: bool = False
    top: int = 0
    temperature: float = 1.0
    keep: bool = False
    common: Int32 | None = None
    shared: Int64 | None = None
    salts: Int64 | None = None
    adapters: Int32 | None = None

    @property
    def kind(self) -> tuple[bool, bool, int, float]:
        """What its reads need: only batches of one kind can be joined."""
        return self.vocab_logprobs, self.argmax, self.top, self.temperature

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64:
        """Tokens in each sequence."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What an engine answers for one ``TokenBatch``.

    Attributes:
        values: float32, aligned with ``TokenBatch.targets``. NaN where the model's arithmetic was not finite:
            only the sequences concerned carry it.
        computed_tokens: for each sequence, how many of its tokens were computed for it; the others came from
            a prefix shared with another sequence or with an earlier batch.
        argmax: for each read, the top-1 token, the lowest id of equals; empty if ``TokenBatch.argmax`` is False.
        argmax_values: their values, NaN where an id means nothing.
        top_ids: for each read, the tokens with the highest values, these descending, of equals the lowest id first:
            [reads, ``TokenBatch.top``].
        top_values: their values.
    """

    values: Float32
    computed_tokens: Int32
    argmax: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    argmax_values: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    top_ids: Int32 = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    top_values: Float32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """An engine's memory on each of its devices, in bytes, as its start has planned it.

    Attributes:
        weights: the parameters.
        workspace: what calls need while they run, and on a CPU the process.
        pages: the page pool, which keeps the prompts' beginnings.
        page_tokens: tokens that the pages hold.
        free: what was free before the start; None: not known.
    """

    weights: int
    workspace: int
    pages: int
    page_tokens: int
    free: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.workspace + self.pages


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about a loaded model that requests are checked against and ``/v1/info`` shows.

    Attributes:
        vocab_size: rows of a causal model's output head: valid ids are ``0 <= id < vocab_size``.
        max_prompt_tokens: the longest sequence that can be scored: the model's context, or what the pages hold.
        context_length: the model's own limit, in tokens.
        dtype: of the weights, ``"float32"`` or ``"bfloat16"``.
        architecture: the Hugging Face architecture name, or ``"fake"``.
        platform: ``"cpu"``, ``"tpu"`` or ``"gpu"``; the fake engine says ``"none"``.
        buckets: the shapes compiled at start-up, each as text, ``"4x256"``: bins x positions.
        classes: size of the sequence-classification head; targets are ``0 <= class < classes``. 0: the model is causal,
            and its targets are token ids.
        quantization: of the layers' weights: ``"int8"``, or None.
        pad_token_id: in a model with classes, the padding token: classes are read at a prompt's last token that is not
            padding, as in transformers; None: at its last token.
        tokens_per_s: tokens that a replica computes a second, measured at its start; 0.0: not measured.
        notes: what a user should know about how the model was loaded.
        memory: None: not planned.
        mesh: calls that run at once, and the devices that the model is split over for each; None: it is on one device.
        decision_head: the kind of a head that scores a question's options, see ``TokenBatch``; such a model has no
            next-token probabilities. None: it has none.
        adapters: LoRA adapters that it has room for beside its weights.
        token_types: of an encoder, how many types of tokens it tells apart: those of a pair's texts, or of questions.
            0: it is none.
    """

    vocab_size: int
    max_prompt_tokens: int
    context_length: int
    dtype: str
    architecture: str
    platform: str
    buckets: tuple[str, ...]
    classes: int = 0
    quantization: str | None = None
    pad_token_id: int | None = None
    tokens_per_s: float = 0.0
    notes: tuple[str, ...] = ()
    memory: MemoryUse | None = None
    mesh: tuple[int, int] | None = None
    token_types: int = 0
    decision_head: str | None = None
    adapters: int = 0

    @property
    def encoder(self) -> bool:
        """Whether every token sees the whole sequence, so that no other continues it."""
        return self.token_types > 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine's counters since its start; the last three are the present state.

    Attributes:
        compilations: programs compiled; none after ``Engine.warmup``.
        computed_tokens: positions computed that hold a token.
        padded_tokens: positions computed that hold none.
        prefix_hit_tokens: tokens of prefixes found in the prefix cache.
        prefix_missed_tokens: tokens of prefixes that had to be computed.
        prefix_evicted_pages: pages of the prefix cache given to other prefixes.
        prefix_pages: pages of the cache.
        prefix_pages_used: pages that hold a prefix.
        prefix_page_bytes: size of one page on the device.
    """

    compilations: int = 0
    computed_tokens: int = 0
    padded_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_missed_tokens: int = 0
    prefix_evicted_pages: int = 0
    prefix_pages: int = 0
    prefix_pages_used: int = 0
    prefix_page_bytes: int = 0


class Engine(Protocol):
    """A loaded model that scores batches. ``score`` is called from two threads at once."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every shape that ``score`` can need; afterwards nothing compiles."""
        ...

    def score(self, batch: TokenBatch) -> BatchResult:
        """Prefill the sequences and read the targets' values.

        Raises:
            ValueError: a sequence is empty or longer than ``info.max_prompt_tokens``.
        """
        ...

    def load_adapter(self, number: int, folder: Path) -> str:
        """Read a LoRA adapter into a slot, from 1, over what was there, and return what it is in words. No batch that
        names the slot may run meanwhile.

        Raises:
            ValueError: the adapter cannot be used, or there is no such slot.
        """
        ...

    def set_batch_timeout(self, stall_s: float) -> None:
        """Give up every later batch that takes longer than ``stall_s`` seconds. Has no effect where only the end of the
        process can end a batch."""
        ...

    def check_health(self) -> None:
        """Raise RuntimeError if the engine will not score again by itself."""
        ...


class LaunchingEngine(Engine, Protocol):
    """An engine that is one host's part of another: while it waits for one batch, it can plan and start the next."""

    def launch(self, batch: TokenBatch) -> Callable[[], BatchResult]:
        """Plan a batch and start to compute it; ``stats`` then count it. Returns what waits for its result.

        Raises:
            ValueError: see ``score``.
        """
        ...
