"""What the host does for a request beside the device: counted, never timed."""

import pytest

from model.contract import PAGE_TOKENS
from model.families.registry import from_hf
from model.sizes import BY_PLATFORM, CALL_PREFIXES
from scripts.planning.estimate import Workload
from scripts.planning.host import HostCost, host_cost

CONFIG = from_hf(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 307,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
)


@pytest.fixture(scope="module")
def cost() -> HostCost:
    """Of a query of 2,000 tokens and 500 items of 20, with the sizes of a TPU's calls."""
    return host_cost(CONFIG, BY_PLATFORM["tpu"], 2020, Workload(2000, 500, 20).request)


def test_a_launch_is_sent_one_array(cost: HostCost) -> None:
    """Pages are written from two: which, and how many."""
    assert cost.launches == 8  # prefill, write, four calls of segments, targets, normaliser
    assert cost.sent == cost.launches + 1


def test_no_hidden_state_moves_between_host_and_device(cost: HostCost) -> None:
    """Up: four numbers for each of the calls' 12,800 positions, the pages of all prefixes that they have room for, and
    little more. Down: 500 reads of two labels."""
    positions, tables = 2048 + (32 + 32 + 16 + 4) * 128, 5 * CALL_PREFIXES * (2020 // PAGE_TOKENS + 2)
    assert 4 * 4 * (2000 + 500 * 20) < cost.sent_bytes < 1.2 * 4 * (4 * positions + tables)
    assert 4 * (1000 + 500) <= cost.fetched_bytes <= 4 * (1024 + 512)


def test_what_is_launched_later_is_planned_while_the_device_computes(cost: HostCost) -> None:
    assert 0 < cost.hidden < cost.seconds


def test_a_request_waits_once(cost: HostCost) -> None:
    assert cost.waits == 1
