"""A loaded model as a scorer of token batches: one compiled program per shape, nothing compiled late.

Life of a batch: ``plan.groups`` finds shared prefixes and segments; each group's prefix is looked up in, or prefilled
into, the pages of the prefix cache; the group's segments run in packed calls that return hidden states at the reads;
the head turns those into logits and, where asked for, log-probabilities. What is compiled is in ``model.computations``.
"""

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import jax
import numpy as np
import numpy.typing as npt

from model import device_check, plan, prefill
from model.contract import PAGE_TOKENS, TOKEN_BITS, BatchResult, EngineStats, MemoryUse, ModelInfo, Progress, TokenBatch
from model.pages import CacheStats, Node, OutOfPagesError, PrefixCache, SeenPrefixes
from model.prefill import PinnedPrefix
from model.programs import Inputs, Prefixes, Programs
from model.sharding import DATA, MODEL


class Engine:
    """Scores token batches. Several threads may call it: one plans or waits for results while another's calls run.

    Args:
        programs: the programs over the weights.
        memory: what it takes.
    """

    def __init__(self, programs: Programs, memory: MemoryUse | None = None) -> None:
        self._programs, self._memory = programs, memory
        self._config, self._layout = programs.model.config, programs.model.layout
        self._launching = threading.Lock()
        self._launched: jax.Array | None = None
        self._computed = self._padded = 0
        self._forget_prefixes()

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

    def score(self, batch: TokenBatch) -> BatchResult:
        """Compute the values of all targets of all reads; see ``model.contract.TokenBatch``.

        Raises:
            ValueError: a sequence is empty or longer than the model's context.
        """
        bounds = batch.offsets.tolist()
        sequences = [self._marked(batch.tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        salts = [0] * len(sequences) if batch.salts is None else batch.salts.tolist()
        keys = [tokens.astype(np.int64) | salt << TOKEN_BITS for tokens, salt in zip(sequences, salts, strict=True)]
        for number, tokens in enumerate(sequences):
            if not 0 < len(tokens) <= (longest := self._layout.longest):
                raise ValueError(f"sequence {number} has {len(tokens)} tokens; this model reads 1 to {longest}")
        reads: list[list[int]] = [[] for _ in sequences]
        first_read = np.full(len(sequences), -1, np.int64)
        for number, (sequence, position) in enumerate(
            zip(batch.read_sequences.tolist(), batch.read_positions.tolist(), strict=True)
        ):
            if first_read[sequence] < 0:
                first_read[sequence] = number
            if reads[sequence] and reads[sequence][-1] >= position:
                raise ValueError(f"the reads of sequence {sequence} are not at ascending positions: {position}")
            reads[sequence].append(position)
        read_sequences = [number for number, positions in enumerate(reads) if positions]
        groups = self._layout.groups(
            [keys[i] for i in read_sequences],
            [reads[i] for i in read_sequences],
            () if batch.common is None else batch.common[read_sequences].tolist(),
        )
        unread = [number for number, positions in enumerate(reads) if batch.keep and not positions]
        numbering = [*read_sequences, *unread]
        work = _Work(sequences, keys, reads, numbering, first_read, np.zeros(len(sequences), np.int32))
        kept = [
            plan.Group(place, len(sequences[number]) - len(sequences[number]) % PAGE_TOKENS, ())
            for place, number in enumerate(unread, len(read_sequences))
        ]
        with self._launching:
            try:
                pending = self._launch([*self._with_recurring(groups, work), *kept], work)
            except Exception:  # the next thread would find pages that were never written
                self._forget_prefixes()
                raise
        try:
            hidden = np.zeros((len(batch.read_positions), self._config.width), np.float32)
            for values, numbers in pending:
                parts = np.split(np.asarray(values), self._programs.model.at_once)
                for part, of_call in zip(parts, numbers, strict=False):
                    hidden[of_call] = part[: len(of_call)]
            computed = np.minimum(work.computed, np.diff(batch.offsets)).astype(np.int32)
            values, argmax, argmax_values = self._read(hidden, batch)
            return BatchResult(values, computed, argmax, argmax_values)
        except Exception:  # the pool comes from calls that failed
            with self._launching:
                self._forget_prefixes()
            raise

    def set_batch_timeout(self, stall_s: float) -> None:
        """Do nothing: a batch ends by itself, or with the process."""

    def check_health(self) -> None:
        """Do nothing: this engine fails with its process."""

    def _marked(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Ids that differ where tokens have different keys, for the planner, the cache and the programs.

        A prompt beyond a ``longrope``'s original context has other angles at all positions: its ids are V higher.
        """
        rope = self._config.rope
        if rope.kind == "longrope" and len(tokens) > rope.original_context_length:
            return tokens + np.int32(self._config.vocab_size)
        return tokens

    def _forget_prefixes(self) -> None:
        """Start with an empty pool."""
        self._pool = self._programs.empty_pool()
        self._cache = PrefixCache(self._layout.pool.shape[0])
        self._recurring = SeenPrefixes()

    def _with_recurring(self, groups: Sequence[plan.Group], work: "_Work") -> list[plan.Group]:
        """Groups where a segment that begins like a segment of an earlier batch takes that beginning as its prefix.

        A prompt that comes alone shares nothing within its batch. Its beginning is kept when it comes the second time,
        in whole pages, so that prompts that never recur cost no page.
        """
        result: list[plan.Group] = []
        for group in groups:
            stay: list[plan.Segment] = []
            deeper: dict[bytes, list[plan.Segment]] = {}
            for segment in group.segments:
                number = work.numbering[segment.sequence]
                until = work.reads[number][0] if segment.start == group.prefix_length else 0
                if until - group.prefix_length < PAGE_TOKENS:
                    stay.append(segment)
                    continue
                tokens = work.keys[number][: until - until % PAGE_TOKENS]
                pages = max(self._recurring.pages(tokens), len(self._cache.lookup(tokens)))
                if pages * PAGE_TOKENS - group.prefix_length < PAGE_TOKENS:
                    stay.append(segment)
                else:
                    cut = plan.Segment(segment.sequence, pages * PAGE_TOKENS, segment.stop, segment.reads)
                    deeper.setdefault(tokens[: cut.start].tobytes(), []).append(cut)
            if stay:
                result.append(plan.Group(group.prefix_of, group.prefix_length, tuple(stay)))
            result += [plan.Group(members[0].sequence, members[0].start, tuple(members)) for members in deeper.values()]
        return result

    def _launch(self, groups: Sequence[plan.Group], work: "_Work") -> list[tuple[jax.Array, list[list[int]]]]:
        """Start all calls. Returns for each launch its hidden states, still being computed, and for each of its calls
        the numbers of the reads that they belong to.

        The missing prefixes of as many groups as a call can see and the pool can hold come first, then these groups'
        segments.
        """
        launched: list[tuple[jax.Array, list[list[int]]]] = []
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
                self._prefill(held)
                launched += self._segments(held, work)
        return launched

    def _hold(self, group: plan.Group, work: "_Work", pins: ExitStack) -> PinnedPrefix:
        """Pages for a group's prefix, see ``PrefixCache.hold``."""
        owner = work.numbering[group.prefix_of]
        prefix = work.sequences[owner][: group.prefix_length]
        path, cached = pins.enter_context(self._cache.hold(work.keys[owner][: group.prefix_length]))
        work.computed[owner] += len(prefix) - cached
        return PinnedPrefix(group, prefix, path, cached)

    def _prefill(self, held: Sequence[PinnedPrefix]) -> None:
        """Fill the pages that are empty."""
        for call in prefill.calls(held, self._layout.sizes.chunks, self._layout.prefixes):
            seen = self._prefixes([piece.held.path for piece in call.pieces], [piece.start for piece in call.pieces])
            self._wait_for_last()
            written = self._programs.layers.prefill(call.size, call.inputs(), seen)
            self._pool = self._programs.write(self._pool, written, call.size, call.spans)
            self._count(call.tokens, call.size)

    def _segments(self, held: Sequence[PinnedPrefix], work: "_Work") -> list[tuple[jax.Array, list[list[int]]]]:
        """Start the calls of groups after their prefixes are in their pages; see ``_launch``."""
        if not (held := [each for each in held if each.group.segments]):
            return []
        prefixes = self._prefixes([each.path for each in held], [len(each.prefix) for each in held])
        launched: list[tuple[jax.Array, list[list[int]]]] = []
        for calls in plan.batch_calls(self._layout.calls([each.group for each in held]), self._programs.model.at_once):
            inputs, numbers = zip(*map(work.inputs, calls), strict=True)
            self._wait_for_last()
            self._launched = self._programs.layers.segments(calls[0].shape, inputs, prefixes)
            launched.append((self._launched, list(numbers)))
            placements = [placement for call in calls for placement in call.placements]
            real = sum(placement.segment.length for placement in placements)
            self._count(real, calls[0].shape.tokens * self._programs.model.at_once)
            for placement in placements:
                work.computed[work.numbering[placement.segment.sequence]] += placement.segment.length
        return launched

    def _prefixes(self, paths: Sequence[Sequence[Node]], lengths: Sequence[int]) -> Prefixes:
        tables = np.zeros(self._layout.tables, np.int32)
        for table, path in zip(tables, paths, strict=False):
            table[: len(path)] = [node.page for node in path]
        padded = np.zeros(self._layout.prefixes, np.int32)
        padded[: len(lengths)] = lengths
        return Prefixes(self._pool, tables, padded)

    def _wait_for_last(self) -> None:
        """Wait for the last launched call: a CPU would run both at once, and each would slow the other."""
        if self._launched is not None and jax.default_backend() == "cpu":
            self._launched.block_until_ready()

    def _count(self, real: int, positions: int) -> None:
        self._computed += real
        self._padded += positions - real

    def _read(
        self, hidden: npt.NDArray[np.float32], batch: TokenBatch
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Read target logits, less the log-normaliser where log-probabilities are asked for; and the top-1 tokens with
        their values in the same way, where those are asked for.
        """
        repeats = np.diff(batch.target_offsets)
        values = np.empty(len(batch.targets), np.float32)
        rows = np.repeat(np.arange(len(hidden)), repeats)
        for at, size, count in plan.blocks(len(values), self._layout.sizes.target_sizes):
            inputs, ids = np.zeros((size, hidden.shape[1]), np.float32), np.zeros(size, np.int32)
            inputs[:count] = hidden[rows[at : at + count]]
            ids[:count] = batch.targets[at : at + count]
            values[at : at + count] = np.asarray(self._programs.targets(inputs, ids))[:count]
        tops = len(hidden) if batch.argmax else 0
        normalizers = np.zeros(len(hidden), np.float32)
        argmax, argmax_values = np.empty(tops, np.int32), np.empty(tops, np.float32)
        if batch.argmax or batch.vocab_logprobs:
            sizes = self._layout.sizes.argmax_sizes if batch.argmax else self._layout.sizes.head_sizes
            for at, size, count in plan.blocks(len(hidden), sizes):
                inputs, place = np.zeros((size, hidden.shape[1]), np.float32), slice(at, at + count)
                inputs[:count] = hidden[place]
                if batch.argmax:
                    read = self._programs.argmax(inputs)
                    normalizers[place], argmax[place], argmax_values[place] = (np.asarray(x)[:count] for x in read)
                else:
                    normalizers[place] = np.asarray(self._programs.normalizer(inputs))[:count]
        if batch.vocab_logprobs:
            values -= np.repeat(normalizers, repeats)
            argmax_values -= normalizers[:tops]
        return values, argmax, argmax_values


@dataclass(frozen=True, slots=True)
class _Work:
    """A batch on its way.

    Attributes:
        keys: what sequences share prefixes by: their tokens, with the salt in the upper bits.
        reads: each sequence's read positions, ascending.
        numbering: the planner's sequence number -> the batch's; the planner sees sequences with reads, followed by
            those that are only kept.
        first_read: for each sequence, the number in the batch of its first read.
        computed: for each sequence, tokens computed so far.
    """

    sequences: Sequence[npt.NDArray[np.int32]]
    keys: Sequence[plan.Tokens]
    reads: Sequence[Sequence[int]]
    numbering: Sequence[int]
    first_read: npt.NDArray[np.int64]
    computed: npt.NDArray[np.int32]

    def inputs(self, call: plan.Call) -> tuple[Inputs, list[int]]:
        """A call's arrays, and the numbers in the batch of the call's reads."""
        shape = call.shape
        tokens, segments = np.full((2, shape.tokens), -1, np.int32)
        positions, prefixes = np.zeros((2, shape.tokens), np.int32)
        indices = np.zeros(shape.reads, np.int32)
        numbers: list[int] = []
        for number, placement in enumerate(call.placements):
            segment = placement.segment
            sequence = self.numbering[segment.sequence]
            at = placement.bin * shape.width + placement.offset
            tokens[at : at + segment.length] = self.sequences[sequence][segment.start : segment.stop]
            positions[at : at + segment.length] = np.arange(segment.start, segment.stop)
            prefixes[at : at + segment.length] = placement.prefix
            segments[at : at + segment.length] = number
            for order, position in enumerate(self.reads[sequence]):
                if segment.start <= position < segment.stop:
                    indices[len(numbers)] = at + position - segment.start
                    numbers.append(int(self.first_read[sequence]) + order)
        return Inputs(tokens, positions, prefixes, segments.reshape(shape.bins, shape.width), indices), numbers
