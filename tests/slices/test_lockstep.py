"""One engine over several processes, on simulated hosts of a slice: the scores of one process, in step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from serve_app.batches import join
from serve_app.settings import ModelSettings
from serve_app.tpu import Tpu
from tests.batches import batch_of
from tests.invariance.rows import LABELS, TOLERANCE, prompts, with_halved_head
from tests.sharding.one_of_two import SIZES, sequences
from tests.slices.leading import FOUR_HOSTS, TWO_HOSTS, alone, leader_of, on_cpu, slice_of
from tests.tiny import make_llama
from tests.workloads import with_reference

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("tpu", "devices"),
    [
        pytest.param(TWO_HOSTS, 2, id="2x2"),
        pytest.param(FOUR_HOSTS, 1, id="4x1", marks=pytest.mark.slow),
    ],
)
def test_hosts_score_as_one_process(nodes: Cluster, tmp_path: Path, tpu: Tpu, devices: int):
    import ray

    folder = with_halved_head(make_llama(tmp_path / "llama", heads=4, ff=32, layers=2))
    batches = [
        batch_of(sequences(), LABELS),
        batch_of(prompts(3, longest=300, seed=5), LABELS),  # longer than a call, so computed in chunks
        batch_of(prompts(40, query=20, seed=6), LABELS),
    ]
    wanted = alone(folder, batches, **SIZES)
    settings = ModelSettings(model=str(folder), tpu=tpu, scorer_cpus=0.1)
    with slice_of(nodes, tpu, devices), leader_of(settings, on_cpu(**SIZES)) as leader:
        info, begun, told, _ = ray.get(leader.state.remote())
        assert info.max_prompt_tokens == 512
        assert told[-1][0] == told[-1][1] == begun.compilations > 0
        for _ in range(3):
            at_once = [leader.score.remote(each) for each in batches]
            for found, values in zip(ray.get(at_once), wanted, strict=True):
                np.testing.assert_allclose(found.values, values, rtol=0, atol=TOLERANCE)
        with pytest.raises(ValueError, match="sequence 0 has 600 tokens; this model reads 1 to 512"):
            ray.get(leader.score.remote(batch_of([[1] * 600], LABELS)))
        _, ended, _, jax_is_loaded = ray.get(leader.state.remote())
        assert ended.prefix_hit_tokens > 0
        assert ended.compilations == begun.compilations
        assert not jax_is_loaded


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_model_over_two_hosts_equals_the_reference(nodes: Cluster):
    import ray

    asked, references = zip(with_reference("W1", 1, most=12), with_reference("W2", 1, most=6), strict=True)
    sizes = {**SIZES, "max_segment_tokens": 128, "call_tokens": 256, "chunks": (256,), "prefix_cache_bytes": 2**26}
    settings = ModelSettings(model="demo", tpu=TWO_HOSTS, scorer_cpus=0.1)
    with slice_of(nodes, TWO_HOSTS, 3), leader_of(settings, on_cpu(data=2, **sizes)) as leader:
        for _ in range(2):
            found = ray.get(leader.score.remote(join(asked)))  # W2's items are longer than a segment, and than W1's
            np.testing.assert_allclose(found.values, np.concatenate(references), rtol=0, atol=1e-4)
        _, stats, _, _ = ray.get(leader.state.remote())
        assert stats.prefix_hit_tokens >= 256, "W1's query"
