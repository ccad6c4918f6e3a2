"""A loaded model as a scorer of token batches: one compiled program per shape, nothing compiled late.

Life of a batch: ``plan.groups`` finds shared prefixes and segments; each group's prefix is looked up in, or prefilled
into, the pages of the prefix cache; the group's segments run in packed calls that collect hidden states at the reads;
the head turns those into logits and, where asked for, log-probabilities. All of it is launched before the batch waits
once, for the head's results. What is compiled is in ``model.computations``.
"""

import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from model import decision_heads, device_check, plan, prefill
from model.adapters import Adapters
from model.config import DecisionHead
from model.contract import (
    PAGE_TOKENS,
    SALT_BITS,
    TOKEN_BITS,
    BatchResult,
    EngineStats,
    MemoryUse,
    ModelInfo,
    Progress,
    TokenBatch,
    shared_by_all,
)
from model.inputs import Inputs, padding
from model.pages import CacheStats, Node, OutOfPagesError, PrefixCache, SeenPrefixes
from model.prefill import PinnedPrefix
from model.programs import Programs
from model.sharding import DATA, MODEL


class Engine:
    """Scores token batches. Several threads may call it: one plans or waits for results while another's calls run.

    Args:
        programs: the programs over the weights.
        memory: what it takes.
        adapters: the slots of its weights; None: it has none.
    """

    def __init__(self, programs: Programs, memory: MemoryUse | None = None, adapters: Adapters | None = None) -> None:
        self._programs, self._memory, self._adapters = programs, memory, adapters
        self._adapter_salts: dict[int, int] = {}
        """By the slot's number: in the prefix cache, what an adapter in it has computed. No other has the same."""
        self._config, self._layout = programs.model.config, programs.model.layout
        self._scalar = programs.decision_scalar()
        self._launching = threading.Lock()
        self._computed = self._padded = 0
        self._pool, self._snapshots = programs.empty_pool(), programs.empty_snapshots()
        self._begin()

    @property
    def info(self) -> ModelInfo:
        mesh = self._programs.model.mesh
        return ModelInfo(
            vocab_size=self._config.vocab_size,
            max_prompt_tokens=self._layout.longest,
            context_length=self._config.context_length,
            dtype=self._programs.model.dtype.name,
            architecture=self._config.architecture,
            platform=jax.default_backend(),
            buckets=tuple(map(str, self._layout.ladder)),
            classes=self._config.classes,
            quantization="int8" if self._config.int8 else None,
            pad_token_id=self._config.pad_token_id,
            notes=self._config.notes,
            memory=self._memory,
            mesh=None if mesh is None or mesh.size == 1 else (mesh.shape[DATA], mesh.shape[MODEL]),
            decision_head=None if self._config.decision_head is None else self._config.decision_head.kind,
            adapters=0 if self._config.lora is None else self._config.lora.slots,
            token_types=max(1, self._config.encoder.token_types) if self._config.encoder else 0,
        )

    @property
    def cache_stats(self) -> CacheStats:
        return self._cache.stats

    @property
    def compilations(self) -> int:
        """Programs compiled since the start: no more after ``warmup``."""
        return self._programs.compiler.compilations

    @property
    def stats(self) -> EngineStats:
        cache = self._cache.stats
        return EngineStats(
            compilations=self.compilations,
            computed_tokens=self._computed,
            padded_tokens=self._padded,
            prefix_hit_tokens=cache.hit_tokens,
            prefix_missed_tokens=cache.missed_tokens,
            prefix_evicted_pages=cache.evicted_pages,
            prefix_pages=cache.pages,
            prefix_pages_used=cache.pages_used,
            prefix_page_bytes=self._layout.page_bytes,
        )

    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every program that ``score`` can call, several at a time; on an accelerator, see that they run there.

        Raises:
            DeviceError: the device computes wrong values.
        """
        self._programs.compiler.compile_all(self._programs.wanted(), progress)
        if device_check.has_own_kernel(self._programs.model):
            device_check.prove(self._programs)
            self.score(device_check.first_batch(self._programs))

    def load_adapter(self, number: int, folder: Path) -> str:
        """Read a LoRA adapter that peft has saved, and put it into a slot, over what was there.

        Args:
            number: the slot's, as ``TokenBatch.adapters`` names it: from 1.

        Returns:
            What it is, in words.

        Raises:
            ConfigError, CheckpointError: see ``Adapters.read``.
        """
        if self._adapters is None:
            raise ValueError("this model was loaded without room for adapters")
        adapter = self._adapters.read(folder)
        with self._launching:
            self._adapters.put(number - 1, adapter)
            self._adapter_salts[number] = secrets.randbits(SALT_BITS)
        return adapter.kind

    def score(self, batch: TokenBatch) -> BatchResult:
        """Compute the values of all targets of all reads; see ``model.contract.TokenBatch``.

        Raises:
            ValueError: a sequence is empty or longer than the model's context.
        """
        return self.launch(batch)()

    def launch(self, batch: TokenBatch) -> Callable[[], BatchResult]:
        """Plan a batch, and start all of its calls. Returns what waits for its result.

        Raises:
            ValueError: see ``score``.
        """
        work = self._work(batch)
        parts = [(part, *self._planned(part, batch)) for part in work.parts(self._layout.adapters)]
        head = self._config.decision_head
        found = _Found.of(batch, 0 if head is None else decision_heads.features_of(head))
        with self._launching:
            try:
                collected: list[_Collected] = []
                for part, groups, kept in parts:
                    self._launch([*self._with_recurring(groups, part), *kept], part, collected)
                results = self._head(collected, batch, found)
            except Exception:  # the next thread would find pages that were never written
                self._forget_prefixes()
                raise
        return partial(self._result, batch, work, found, results)

    def _planned(self, work: "_Work", batch: TokenBatch) -> tuple[list[plan.Group], list[plan.Group]]:
        """The groups of what is read, and of what is only kept."""
        groups = self._layout.groups(
            [work.sequences[number] for number in work.read],
            [work.reads[number] for number in work.read],
            () if batch.common is None else batch.common[work.read].tolist(),
            [work.salts[number] for number in work.read],
            work.shared,
        )
        kept = [
            plan.Group(place, len(tokens) - len(tokens) % PAGE_TOKENS, plan.NO_SEGMENTS)
            for place, tokens in enumerate((work.sequences[number] for number in work.unread), len(work.read))
        ]
        return groups, kept

    def _result(self, batch: TokenBatch, work: "_Work", found: "_Found", results: Sequence["_Launched"]) -> BatchResult:
        """Wait for the head's results, and put them where they belong."""
        try:
            fetched = jax.device_get([each.results for each in results])
        except Exception:  # the pool comes from calls that failed
            with self._launching:
                self._forget_prefixes()
            raise
        for launched, arrays in zip(results, fetched, strict=True):
            for into, array in zip(launched.into, arrays, strict=True):
                of_reads = array[: len(launched.places)]
                into[launched.places] = of_reads if into.ndim == 1 else of_reads[:, : into.shape[1]]
        if self._config.decision_head:
            found.values[:] = self._option_logits(self._config.decision_head, batch, found.features)
        computed = np.minimum(work.computed, batch.lengths).astype(np.int32)
        return found.result(batch, computed)

    def _option_logits(
        self, head: DecisionHead, batch: TokenBatch, features: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """The targets' values by a decision head, from the features of all reads."""
        options = np.repeat(np.arange(len(features)), np.diff(batch.target_offsets))
        queries = np.searchsorted(batch.read_sequences, batch.read_sequences[options], side="right") - 1
        return decision_heads.logits(head, self._scalar, features[options], features[queries])

    def set_batch_timeout(self, stall_s: float) -> None:
        """Do nothing: a batch ends by itself, or with the process."""

    def check_health(self) -> None:
        """Do nothing: this engine fails with its process."""

    def _work(self, batch: TokenBatch) -> "_Work":
        """Check a batch, and take it apart.

        Raises:
            ValueError: see ``score``.
        """
        lengths, longest = batch.lengths, self._layout.longest
        for number in np.flatnonzero((lengths < 1) | (lengths > longest)).tolist():
            raise ValueError(f"sequence {number} has {lengths[number]} tokens; this model reads 1 to {longest}")
        order = _in_order(batch.read_sequences, batch.read_positions)
        for number in np.flatnonzero(np.diff(order) <= 0).tolist():
            sequence, position = batch.read_sequences[number + 1], batch.read_positions[number + 1]
            raise ValueError(f"the reads of sequence {sequence} are not at ascending positions: {position}")
        tokens, count = self._marked(batch.tokens, lengths), batch.num_sequences
        first = np.searchsorted(batch.read_sequences, np.arange(count + 1))
        read = np.flatnonzero(np.diff(first)).tolist()
        keep = batch.keep and not self._layout.whole
        unread = np.flatnonzero(np.diff(first) == 0).tolist() if keep else []
        positions = batch.read_positions.tolist()
        adapters = np.zeros(count, np.int32) if batch.adapters is None else batch.adapters
        return _Work(
            tokens=tokens,
            offsets=batch.offsets,
            sequences=[tokens[start:stop] for start, stop in itertools.pairwise(batch.offsets.tolist())],
            salts=self._salts(batch, adapters),
            adapters=adapters,
            shared=0 if batch.shared is None or tokens is not batch.tokens else shared_by_all(batch.shared),
            reads=[positions[start:stop] for start, stop in itertools.pairwise(first.tolist())],
            positions=batch.read_positions,
            order=order,
            read=read,
            unread=unread,
            computed=np.zeros(count, np.int64),
        )

    def _salts(self, batch: TokenBatch, adapters: npt.NDArray[np.int32]) -> list[int]:
        """What keeps the prefixes of sequences apart: their salts, and those of their adapters.

        Raises:
            ValueError: a slot is empty.
        """
        salts = [0] * batch.num_sequences if batch.salts is None else batch.salts.tolist()
        if not adapters.any():
            return salts
        if missing := sorted(set(adapters.tolist()) - {0, *self._adapter_salts}):
            raise ValueError(f"there is no adapter in slot {missing[0]}")
        return [salt ^ self._adapter_salts.get(slot, 0) for salt, slot in zip(salts, adapters.tolist(), strict=True)]

    def _marked(self, tokens: npt.NDArray[np.int32], lengths: plan.Numbers) -> npt.NDArray[np.int32]:
        """Ids that differ where tokens have different keys, for the planner, the cache and the programs.

        A prompt beyond a ``longrope``'s original context has other angles at all positions: its ids are V higher.
        """
        rope = self._config.rope
        if rope.kind != "longrope":
            return tokens
        long = np.repeat(lengths > rope.original_context_length, lengths)
        return tokens + long * np.int32(self._config.vocab_size)

    def _forget_prefixes(self) -> None:
        """Take an empty pool. The old one goes first, whoever refers to it still: there may be no room for both."""
        for part in jax.tree.leaves((self._pool, self._snapshots)):
            part.delete()
        self._pool, self._snapshots = self._programs.empty_pool(), self._programs.empty_snapshots()
        self._begin()

    def _begin(self) -> None:
        """Begin with an empty pool, and wait for nothing that was launched before."""
        self._launched: Any = None
        self._none_collected = self._programs.none_collected()
        self._cache = PrefixCache(self._layout.pool.shape[0], self._layout.snapshot_slots)
        self._recurring = SeenPrefixes()

    def _with_recurring(self, groups: Sequence[plan.Group], work: "_Work") -> list[plan.Group]:
        """Groups where a segment that begins like a segment of an earlier batch takes that beginning as its prefix.

        A prompt that comes alone shares nothing within its batch. Its beginning is kept when it comes the second time,
        in whole pages, so that prompts that never recur cost no page.
        """
        if self._layout.whole:
            return list(groups)
        result: list[plan.Group] = []
        for group in groups:
            if group.first_read is not None:
                result.append(group)
                continue
            segments = group.segments
            first_read = work.order[work.first_reads(segments)] & _POSITION
            long = (segments.starts == group.prefix_length) & (first_read - group.prefix_length >= PAGE_TOKENS)
            stay = np.ones(len(segments), bool)
            deeper: dict[bytes, list[plan.Segment]] = {}
            for place in np.flatnonzero(long).tolist():
                [segment] = segments[np.array([place])]
                until = int(first_read[place])
                tokens = work.key(segment.sequence, until - until % PAGE_TOKENS)
                pages = max(self._recurring.pages(tokens), len(self._cache.lookup(tokens)))
                if pages * PAGE_TOKENS - group.prefix_length >= PAGE_TOKENS:
                    cut = segment._replace(start=pages * PAGE_TOKENS)
                    deeper.setdefault(tokens[: cut.start].tobytes(), []).append(cut)
                    stay[place] = False
            if stay.any():
                result.append(plan.Group(group.prefix_of, group.prefix_length, segments[stay]))
            result += [
                plan.Group(members[0].sequence, members[0].start, plan.Segments.of(members))
                for members in deeper.values()
            ]
        return result

    def _launch(self, groups: Sequence[plan.Group], work: "_Work", collected: list["_Collected"]) -> None:
        """Start all calls. They add to the collected hidden states, which are still being computed.

        The missing prefixes of as many groups as a call can see and the pool can hold come first, then these groups'
        segments.
        """
        waiting = deque(groups)
        while waiting:
            with ExitStack() as pins:
                held: list[PinnedPrefix] = []
                while waiting and len(held) < self._layout.prefixes:
                    try:
                        held.append(self._hold(waiting[0], work, pins))
                    except OutOfPagesError:
                        if not held:
                            raise
                        break
                    waiting.popleft()
                self._prefill(held, work, collected)
                self._segments(held, work, collected)

    def _hold(self, group: plan.Group, work: "_Work", pins: ExitStack) -> PinnedPrefix:
        """Pages for a group's prefix, see ``PrefixCache.hold``."""
        owner = int(work.numbering[group.prefix_of])
        prefix = work.sequences[owner][: group.prefix_length]
        key = work.key(group.prefix_of, group.prefix_length)
        held = pins.enter_context(self._cache.hold(key, read_from=group.first_read))
        pinned = PinnedPrefix(group, prefix, *held)
        work.computed[owner] += len(prefix) - pinned.start
        return pinned

    def _prefill(self, held: Sequence[PinnedPrefix], work: "_Work", collected: list["_Collected"]) -> None:
        """Fill the pages that are empty, and collect the hidden states of prefixes that are read."""
        for call in prefill.calls(held, self._layout.sizes.chunks, self._layout.prefixes):
            array, inputs = padding(self._programs.model.at_once, call.size, self._layout.room)
            owners = work.numbering[[piece.held.group.prefix_of for piece in call.pieces]]
            call.fill(inputs, work.chosen[owners].tolist())
            _fill_shared(inputs, [(piece.held.path, piece.start) for piece in call.pieces], work.slots)
            inputs.slots[:, : len(call.pieces)] = [(piece.begin, piece.end) for piece in call.pieces]
            self._wait_for_last()
            layers = self._programs.layers
            if call.is_read:
                room = self._room(collected, call.size)
                inputs.place[:] = room.filled
                written, self._snapshots, room.states = layers.prefill_read(
                    call.size, array, self._pool, self._snapshots, room.states
                )
                for piece, at in zip(call.pieces, call.places, strict=True):
                    if piece.held.group.first_read is not None:
                        reads = work.reads_between(piece.held.group.prefix_of, piece.start, piece.stop)
                        room.rows.append(inputs.place[0] + at + work.positions[reads] - piece.start)
                        room.reads.append(reads)
                room.filled += call.tokens
            else:
                written, self._snapshots = layers.prefill(call.size, array, self._pool, self._snapshots)
            if call.spans:
                self._pool = self._programs.write(self._pool, written, call.size, call.spans)
            self._count(call.computed, call.size)

    def _segments(self, held: Sequence[PinnedPrefix], work: "_Work", collected: list["_Collected"]) -> None:
        """Start the calls of groups after their prefixes are in their pages; see ``_launch``."""
        if not (held := [each for each in held if len(each.group.segments)]):
            return
        model, seen = self._programs.model, [(each.path, len(each.prefix)) for each in held]
        for calls in plan.batch_calls(self._layout.calls([each.group for each in held]), model.at_once):
            shape = calls[0].shape
            array, inputs = padding(model.at_once, shape.tokens, self._layout.room)
            _fill_shared(inputs, seen, work.slots)
            inputs.slots[:, : len(held), 0] = [each.end for each in held]
            room = self._room(collected, model.at_once * shape.reads)
            inputs.place[:] = first = room.filled
            for number, call in enumerate(calls):
                reads = work.fill(call, Inputs(*(part[number] for part in inputs)))
                room.add(first + number * shape.reads, reads)
                sequences, lengths = work.numbering[call.segments.sequences], call.segments.lengths
                np.add.at(work.computed, sequences, lengths)
                self._count(int(lengths.sum()), shape.tokens)
            self._count(0, (model.at_once - len(calls)) * shape.tokens)
            launch = partial(self._programs.layers.segments, shape, array, self._pool, self._snapshots)
            room.states = self._after_last(launch, room.states)

    def _room(self, collected: list["_Collected"], rows: int) -> "_Collected":
        """Where there is room for the hidden states of one more launch."""
        if not collected or collected[-1].filled + rows > len(self._none_collected):
            collected.append(_Collected(self._none_collected))
        return collected[-1]

    def _head(self, collected: Sequence["_Collected"], batch: TokenBatch, found: "_Found") -> list["_Launched"]:
        """Start the head's calls: target logits, and log-normalisers and top-1 tokens where those are asked for."""
        if self._config.decision_head:
            return self._features(collected, found)
        programs, sizes = self._programs, self._layout.sizes
        first, counts = batch.target_offsets[:-1], np.diff(batch.target_offsets)
        launched: list[_Launched] = []
        for one in collected:
            rows, reads = np.concatenate(one.rows), np.concatenate(one.reads)
            places = _ranges(first[reads], counts[reads])
            ids = batch.targets[places].astype(np.int64)
            if self._config.classes and batch.adapters is not None:  # the heads follow each other
                ids += self._config.classes * np.repeat(batch.adapters[batch.read_sequences[reads]], counts[reads])
            pairs = np.stack([np.repeat(rows, counts[reads]), ids])
            for at, size, count in plan.blocks(len(places), sizes.target_sizes):
                launch = partial(programs.targets, pairs=_padded(pairs[:, at : at + count], size))
                result = self._after_last(launch, one.states)
                launched.append(_Launched((found.values,), places[at : at + count], (result,)))
            top = _top_count(batch)
            if not (top or batch.argmax or batch.vocab_logprobs):
                continue
            head_sizes = sizes.argmax_sizes[-1:] if top else sizes.argmax_sizes if batch.argmax else sizes.head_sizes
            for at, size, count in plan.blocks(len(rows), head_sizes):
                numbers, of_reads = _padded(rows[at : at + count], size), reads[at : at + count]
                if top:
                    launch = partial(
                        programs.top, numbers=numbers, count=top, states=count, scale=1 / batch.temperature
                    )
                    results = self._after_last(launch, one.states)
                    into = (found.normalizers, found.top_ids, found.top_values)
                    launched.append(_Launched(into, of_reads, results))
                elif batch.argmax:
                    results = self._after_last(partial(programs.argmax, numbers=numbers), one.states)
                    into = (found.normalizers, found.argmax, found.argmax_values)
                    launched.append(_Launched(into, of_reads, results))
                else:
                    result = self._after_last(partial(programs.normalizer, numbers=numbers), one.states)
                    launched.append(_Launched((found.normalizers,), of_reads, (result,)))
        return launched

    def _features(self, collected: Sequence["_Collected"], found: "_Found") -> list["_Launched"]:
        """Start the calls of a decision head, for all reads."""
        launched: list[_Launched] = []
        for one in collected:
            rows, reads = np.concatenate(one.rows), np.concatenate(one.reads)
            for at, size, count in plan.blocks(len(rows), self._layout.sizes.head_sizes):
                launch = partial(self._programs.features, numbers=_padded(rows[at : at + count], size))
                result = self._after_last(launch, one.states)
                launched.append(_Launched((found.features,), reads[at : at + count], (result,)))
        return launched

    def _after_last(self, launch: Callable[[jax.Array], Any], states: jax.Array) -> Any:
        """Launch what takes the collected hidden states, or adds to them."""
        self._wait_for_last()
        self._launched = launch(states)
        return self._launched

    def _wait_for_last(self) -> None:
        """Wait for the last launched call: a CPU would run both at once, and each would slow the other."""
        if self._launched is not None and jax.default_backend() == "cpu":
            jax.block_until_ready(self._launched)

    def _count(self, real: int, positions: int) -> None:
        self._computed += real
        self._padded += positions - real


_POSITION = 2**32 - 1


def _in_order(sequences: npt.NDArray[Any], positions: npt.NDArray[Any]) -> plan.Numbers:
    """Numbers that are in order where reads are: by sequence, then by position."""
    return sequences.astype(np.int64) << 32 | positions


def _ranges(starts: plan.Numbers, counts: plan.Numbers) -> plan.Numbers:
    """The numbers from each start on, as many as its count, one range after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _padded(numbers: plan.Tokens, size: int) -> npt.NDArray[np.int32]:
    """As many columns as a program takes."""
    array = np.zeros((*numbers.shape[:-1], size), np.int32)
    array[..., : numbers.shape[-1]] = numbers
    return array


def _fill_shared(inputs: Inputs, prefixes: Sequence[tuple[Sequence[Node], int]], slots: Sequence[int]) -> None:
    """Write the pages and the length of each prefix, and the adapters' slots, into all rows."""
    inputs.adapters[:, : len(slots)] = slots
    for number, (path, length) in enumerate(prefixes):
        inputs.tables[:, number, : len(path)] = [node.page for node in path]
        inputs.lengths[:, number] = length


@dataclass(slots=True)
class _Collected:
    """Hidden states at reads, on the device.

    Attributes:
        states: those of all launches so far.
        rows: by call, which of them are reads'.
        reads: by call, these reads' numbers in the batch.
        filled: rows up to the last read's.
    """

    states: jax.Array
    rows: list[plan.Numbers] = field(default_factory=list[plan.Numbers])
    reads: list[plan.Numbers] = field(default_factory=list[plan.Numbers])
    filled: int = 0

    def add(self, first: int, reads: plan.Numbers) -> None:
        """Take the rows from ``first`` on for these reads."""
        self.filled = first + len(reads)
        self.rows.append(np.arange(first, self.filled))
        self.reads.append(reads)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A launch of the head: its results, still being computed, and at which places of which arrays they belong."""

    into: tuple[npt.NDArray[Any], ...]
    places: plan.Numbers
    results: tuple[jax.Array, ...]


class _Found(NamedTuple):
    """What the head finds: values of targets, and of each read the log-normaliser, the top-1 token or the highest ones,
    and their values; of a decision head, each read's features, of which the values are made."""

    values: npt.NDArray[np.float32]
    normalizers: npt.NDArray[np.float32]
    argmax: npt.NDArray[np.int32]
    argmax_values: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_values: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]

    @classmethod
    def of(cls, batch: TokenBatch, features: int) -> "_Found":
        """Room for a batch's.

        Args:
            features: of each read.
        """
        reads = len(batch.read_positions)
        values, normalizers = np.empty(len(batch.targets), np.float32), np.zeros(reads, np.float32)
        tops = reads, _top_count(batch)
        highest = reads if batch.argmax and not tops[1] else 0
        of_highest = np.empty(highest, np.int32), np.empty(highest, np.float32)
        of_tops = np.empty(tops, np.int32), np.empty(tops, np.float32)
        return cls(values, normalizers, *of_highest, *of_tops, np.empty((reads, features), np.float32))

    def result(self, batch: TokenBatch, computed: npt.NDArray[np.int32]) -> BatchResult:
        """The batch's, from logits."""
        values, normalizers, argmax, argmax_values, top_ids, top_values, _ = self
        if batch.temperature != 1:  # the others were divided before they were compared
            values *= np.float32(1 / batch.temperature)
        if batch.vocab_logprobs:
            values -= np.repeat(normalizers, np.diff(batch.target_offsets))
            argmax_values -= normalizers[: len(argmax)]
            top_values -= normalizers[:, None]
        if batch.argmax and _top_count(batch):
            argmax, argmax_values = top_ids[:, 0].copy(), top_values[:, 0].copy()
        return BatchResult(values, computed, argmax, argmax_values, top_ids[:, : batch.top], top_values[:, : batch.top])


def _top_count(batch: TokenBatch) -> int:
    """How many of the highest logits the head finds: one at least where it is to scale them."""
    return batch.top or int(batch.temperature != 1)


@dataclass(frozen=True)
class _Work:
    """A batch on its way.

    Attributes:
        tokens: of all sequences.
        offsets: where each begins.
        sequences: the tokens of each.
        salts: of each; sequences with different ones share no prefix.
        adapters: the slot of each one's adapter, from 1; 0: none.
        shared: leading tokens that all sequences are known to share.
        reads: each sequence's read positions, ascending.
        positions: of all reads.
        order: of all reads, see ``_in_order``.
        read: sequences with reads.
        unread: sequences that are only kept.
        computed: for each sequence, tokens computed so far.
        slots: of the adapters of ``read`` and ``unread``, from 0; a call sees all of them.
    """

    tokens: npt.NDArray[np.int32]
    offsets: plan.Numbers
    sequences: Sequence[npt.NDArray[np.int32]]
    salts: Sequence[int]
    adapters: npt.NDArray[np.int32]
    shared: int
    reads: Sequence[Sequence[int]]
    positions: npt.NDArray[np.int32]
    order: plan.Numbers
    read: Sequence[int]
    unread: Sequence[int]
    computed: plan.Numbers
    slots: Sequence[int] = ()

    @cached_property
    def numbering(self) -> plan.Numbers:
        """The planner's sequence number -> the batch's; the planner sees ``read``, followed by ``unread``."""
        return np.array([*self.read, *self.unread], np.int64)

    @cached_property
    def chosen(self) -> npt.NDArray[np.int32]:
        """Which of ``slots`` each sequence of ``read`` and ``unread`` takes; -1: none."""
        return np.where(self.adapters > 0, np.searchsorted(self.slots, self.adapters - 1), -1).astype(np.int32)

    def parts(self, most: int) -> list["_Work"]:
        """Parts whose sequences take no more adapters than a call sees.

        Args:
            most: how many that are.
        """
        used = self.adapters[self.numbering]
        if not used.any():
            return [self]
        numbers = np.unique(used[used > 0]).tolist()
        parts: list[_Work] = []
        for first in range(0, len(numbers), most):
            own = set(numbers[first : first + most]) | ({0} if first == 0 else set())
            read, unread = (
                [number for number in some if self.adapters[number] in own] for some in (self.read, self.unread)
            )
            parts.append(replace(self, read=read, unread=unread, slots=[slot - 1 for slot in sorted(own - {0})]))
        return parts

    def key(self, sequence: int, length: int) -> plan.Numbers:
        """What the prefix cache knows tokens by: the ids, with the salt in the upper bits.

        Args:
            sequence: the planner's number.
            length: tokens at its front.
        """
        number = self.numbering[sequence]
        return self.sequences[number][:length].astype(np.int64) | self.salts[number] << TOKEN_BITS

    def first_reads(self, segments: plan.Segments) -> plan.Numbers:
        """The number of each segment's first read."""
        return np.searchsorted(self.order, _in_order(self.numbering[segments.sequences], segments.starts))

    def reads_between(self, sequence: int, start: int, stop: int) -> plan.Numbers:
        """The numbers in the batch of the reads of tokens ``start`` to ``stop``.

        Args:
            sequence: the planner's number.
        """
        ends = _in_order(self.numbering[[sequence, sequence]], np.array([start, stop]))
        return np.arange(*np.searchsorted(self.order, ends))

    def fill(self, call: plan.Call, inputs: Inputs) -> plan.Numbers:
        """Write a call's tokens into its row. Returns the numbers in the batch of the call's reads."""
        segments, lengths = call.segments, call.segments.lengths
        at = call.bins * call.shape.width + call.offsets
        places = _ranges(at, lengths)
        sequences = self.numbering[segments.sequences]
        inputs.tokens[places] = self.tokens[_ranges(self.offsets[sequences] + segments.starts, lengths)]
        inputs.positions[places] = _ranges(segments.starts, lengths)
        inputs.prefixes[places] = np.repeat(call.prefixes, lengths)
        inputs.segments[places] = np.repeat(np.arange(len(segments)), lengths)
        if self.slots:
            inputs.adapted[places] = np.repeat(self.chosen[sequences], lengths)
        reads = _ranges(self.first_reads(segments), segments.reads)
        inputs.reads[: len(reads)] = self.positions[reads] + np.repeat(at - segments.starts, segments.reads)
        return reads
