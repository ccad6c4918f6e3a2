"""A replica's LoRA adapters: loaded, replaced while jobs are computed, and refused with a reason."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve_app.contract import ScoreJob
from serve_app.errors import NotFoundError, OverloadedError
from serve_app.model_source import ModelSourceError, adapter
from serve_app.scorer.adapters import AdapterSlots
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from tests.batches import batch_of

JOB = ScoreJob("one", batch_of([[1, 2, 3], [4]]))


def slot_of(slots: AdapterSlots, name: str) -> int:
    with slots.used(replace(JOB, adapter=name)) as job:
        assert job.batch.adapters is not None
        [slot] = set(job.batch.adapters.tolist())
        return slot


async def test_each_name_has_a_slot_and_the_model_itself_has_none() -> None:
    slots = AdapterSlots(FakeEngine(adapters=2), find=Path)
    await slots.change({"en": "/adapters/en", "de": "/adapters/de"})
    slots.check()
    assert {slot_of(slots, "en"), slot_of(slots, "de")} == {1, 2}
    with slots.used(JOB) as job:
        assert job is JOB
    with pytest.raises(NotFoundError, match="no adapter 'fr'; the adapters are en, de"):
        slot_of(slots, "fr")


async def test_a_slot_is_taken_only_when_its_last_job_is_computed() -> None:
    engine = FakeEngine(adapters=1)
    slots = AdapterSlots(engine, find=Path)
    await slots.change({"en": "/adapters/en"})
    with slots.used(replace(JOB, adapter="en")) as job:
        before = engine.score(job.batch).values
        changing = asyncio.create_task(slots.change({"de": "/adapters/de"}))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(NotFoundError, match="no adapter 'en'"):
            slot_of(slots, "en")
        with pytest.raises(OverloadedError, match="'de' is still being loaded"):
            slot_of(slots, "de")
        assert not changing.done()
        np.testing.assert_array_equal(engine.score(job.batch).values, before)
    await changing
    with slots.used(replace(JOB, adapter="de")) as job:
        assert (engine.score(job.batch).values != before).all()


async def test_another_source_under_the_same_name_is_loaded() -> None:
    engine = FakeEngine(adapters=1)
    slots = AdapterSlots(engine, find=Path)
    found: list[np.ndarray] = []
    for source in ("/adapters/1", "/adapters/2", "/adapters/2"):
        await slots.change({"en": source})
        with slots.used(replace(JOB, adapter="en")) as job:
            found.append(engine.score(job.batch).values)
    assert (found[0] != found[1]).all()
    np.testing.assert_array_equal(found[1], found[2])


async def test_an_adapter_that_cannot_be_loaded_harms_no_other(tmp_path: Path) -> None:
    slots = AdapterSlots(FakeEngine(adapters=2), find=lambda source: adapter(source) if "/" in source else Path(source))
    (tmp_path / "empty").mkdir()
    await slots.change({"bad": str(tmp_path / "empty"), "good": "good"})
    assert slot_of(slots, "good")
    with pytest.raises(NotFoundError, match=r"'bad' could not be loaded: .*empty has no adapter_config\.json"):
        slot_of(slots, "bad")
    with pytest.raises(ValueError, match=r"adapter bad .* cannot be loaded"):
        slots.check()
    await slots.change({"bad": "better", "good": "good"})
    assert slot_of(slots, "bad") != slot_of(slots, "good")


def test_where_an_adapter_comes_from(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelSourceError, match=r"has no adapter_model\.safetensors"):
        adapter(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    assert adapter(str(tmp_path)) == tmp_path.resolve()


def test_settings_have_room_for_adapters_that_come_later() -> None:
    assert ModelSettings().adapter_room == 0
    settings = ModelSettings(adapters={"en": "a"})
    assert settings.adapter_room == 4
    assert settings.live({"adapters": {str(number): "a" for number in range(4)}}).adapter_room == 4
    with pytest.raises(ValueError, match="5 adapters; max_adapters has room for 4"):
        settings.live({"adapters": {str(number): "a" for number in range(5)}})
    assert not settings.live({"adapters": {}}).adapters
    with pytest.raises(ValueError, match="1 adapters; max_adapters has room for 0"):
        ModelSettings().live({"adapters": {"en": "a"}})
    with pytest.raises(ValueError, match="slices of several hosts"):
        ModelSettings.model_validate({"adapters": {"en": "a"}, "tpu": {"chip": "v6e", "topology": "4x4", "chips": 16}})
