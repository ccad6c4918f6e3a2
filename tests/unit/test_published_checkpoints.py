"""Published checkpoints: each config loads, or is refused for the reason that the documentation gives."""

from pathlib import Path

import pytest

from model.families.registry import from_hf
from model.families.wrappers import unwrapped
from model.fields import ConfigError
from tests.published import CHECKPOINTS, Checkpoint, table

DOCUMENT = Path(__file__).parents[2] / "docs/families.md"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_each_config_loads_or_is_refused_as_documented(checkpoint: Checkpoint) -> None:
    if checkpoint.refused:
        with pytest.raises(ConfigError) as refusal:
            from_hf(checkpoint.config)
        assert checkpoint.refused in str(refusal.value)
        return
    parsed = from_hf(checkpoint.config)
    declared = unwrapped(checkpoint.config)["max_position_embeddings"]
    assert parsed.context_length == (checkpoint.context or declared)
    positions = declared - (parsed.encoder.first_position if parsed.encoder else 0)
    bounded = parsed.context_length < positions or parsed.rope.kind == "dynamic"
    told = [note for note in parsed.notes if "mtp" not in note]
    assert bool(told) == bounded, "a shorter context is told, with its reason"


def test_tests_that_compare_such_checkpoints_are_there() -> None:
    root = Path(__file__).parents[2]
    assert all((root / each.compared).is_file() for each in CHECKPOINTS if each.compared)


def test_the_documentation_has_this_table() -> None:
    assert table() in DOCUMENT.read_text()


def test_no_checkpoint_is_listed_twice() -> None:
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    assert len(set(names)) == len(names) >= 60
