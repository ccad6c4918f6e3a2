"""Packages that ask for decisions, as they come from PyPI, and the contract's own test suite, over real HTTP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import VOCAB_SIZE, DirectReplicas
from tests.served import KEY, serving

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("connections_closed")]  # heavy: the packages

STATE = "I was charged twice for March. Please refund one payment today, or I will dispute it."
CONTEXT = 2**15
"""Tokens; 255 described options take most of them, since the small tokenizer knows few words."""


@pytest.fixture(scope="module")
def models(tokenizer: TextTokenizer) -> Iterator[Models]:
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    service = ModelService(
        ModelSettings(model="fake-judge", engine="fake"), tokenizer, engine.info, DirectReplicas(engine)
    )
    yield Models(service)
    service.close()


@pytest.fixture(scope="module")
def url(models: Models) -> Iterator[str]:
    with serving(create_app(lambda: models)) as served:
        yield served.url


@pytest.fixture(scope="module")
def closed_url(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same service, which wants a key."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    with serving(create_app(lambda: models, keys=ApiKeys(str(file)))) as served:
        yield served.url


@pytest.mark.parametrize("key", [None, KEY])
def test_the_contracts_suite_finds_nothing_wrong(url: str, closed_url: str, key: str | None):
    runner = pytest.importorskip("jevcompat.runner")
    report = runner.run(closed_url if key else url, key=key)
    wrong = [(result.id, result.status, result.reason, *map(str, result.findings)) for result in report.results]
    # With keys one requirement does not apply, without three.
    skipped = {"auth.ignored-when-off"} if key else {"auth.bearer", "auth.missing", "auth.invalid"}
    assert [each for each in wrong if each[1] != "pass" and each[0] not in skipped] == []
    assert report.verdict == "conformant"
    assert report.summary()["MUST"] == {"passed": 32, "failed": 0, "skipped": 1, "tested": 32}
    assert report.summary()["SHOULD"]["failed"] == 0


class TestTypeSafe:
    @pytest.mark.parametrize("compression", ["zstd", False])
    def test_its_client(self, url: str, compression: Any):
        sdk = pytest.importorskip("typesafe_sdk")
        questions = {
            "refund": sdk.Noul(instructions={"task": "Does the customer want money back?"}),
            "threat": sdk.Noul(criteria={"true": "The customer threatens", "false": None}),
            "team": sdk.Choice(criteria={"Billing": "payments", "Technical": ["bugs", "outages"], "Sales": None}),
            "anger": sdk.Score(instructions="How angry?", criteria=["Calm", {"label": "Angry"}]),
        }
        state = {"subject": "Charged twice", "body": STATE * 12}  # enough to be compressed
        with sdk.TypeSafeClient(api_key="none", base_url=url, compression=compression) as client:
            answer = client.system_one(state=state, questions=questions)
            assert (answer.model, len(answer.request_id)) == ("fake-judge", 32)
            assert set(answer.nouls) == {"refund", "threat"}
            assert sum(answer.choices["team"].probabilities.values()) == pytest.approx(1)
            assert answer.scores["anger"].legend == {0: "Calm", 1: {"label": "Angry"}}
            assert answer.usage.input_tokens > 0
            plain = client.system_one(state=state, questions={"refund": questions["refund"]}, model="jev-preview")
            assert plain.nouls["refund"] == answer.nouls["refund"]
            assert [model.name for model in client.models.list().models] == ["fake-judge"]

    def test_its_errors(self, url: str, closed_url: str):
        sdk = pytest.importorskip("typesafe_sdk")
        question = {"q": sdk.Noul(instructions="Is it urgent?")}
        with sdk.TypeSafeClient(api_key="none", base_url=url) as client:
            with pytest.raises(sdk.TypeSafeNotFoundError, match="the names are fake-judge") as missing:
                client.system_one(state=STATE, questions=question, model="jev-1.13.0")
            assert len(missing.value.request_id) == 32
            with pytest.raises(sdk.TypeSafeUnprocessableEntityError, match="has 1 entries; it must have at least 2"):
                client.system_one(state=STATE, questions={"q": sdk.Choice(criteria={"a": None})})
            with pytest.raises(sdk.TypeSafeUnprocessableEntityError, match="it takes no images"):
                client.system_one(state=STATE, questions={"q": sdk.Box(instructions="The dog")})
            picture = sdk.Image(b"\x89PNG\r\n\x1a\n")
            with pytest.raises(sdk.TypeSafeUnprocessableEntityError, match=r"multipart/form-data.*it takes no images"):
                client.system_one(state=picture, questions=question)
        with (
            sdk.TypeSafeClient(api_key="wrong", base_url=closed_url) as client,
            pytest.raises(sdk.TypeSafeAuthenticationError, match="invalid API key"),
        ):
            client.system_one(state=STATE, questions=question)


class TestOpenAI:
    def test_its_client_with_every_parameter(self, url: str):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
        answer = client.decisions.create(
            model="fake-judge",
            input=[
                {"role": "developer", "content": "A ticket."},
                {"role": "user", "content": [{"type": "input_text", "text": STATE}]},
                {"type": "function_call", "call_id": "1", "name": "plan", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "pro"},
            ],
            questions=[
                {"type": "predicate", "name": "refund", "instructions": "The customer wants money back."},
                {"type": "choice", "instructions": "Who?", "choices": [{"value": "true"}, {"value": True}]},
                {"type": "score", "instructions": "How angry?", "levels": [{"label": "Calm"}, {"label": "Angry"}]},
            ],
            prompt_cache_key="tenant",
            prompt_cache_options={"mode": "implicit", "ttl": "30m"},
            safety_identifier="someone",
        )
        predicate, choice, score = answer.answers
        assert (predicate.type, predicate.name) == ("predicate", "refund")
        assert 0 <= predicate.probability <= 1
        assert [option.value for option in choice.probabilities] == ["true", True]
        assert [(level.value, level.label) for level in score.probabilities] == [(0, "Calm"), (1, "Angry")]
        assert answer.usage.total_tokens == answer.usage.input_tokens > 0
        type(answer).model_validate_json(answer.model_dump_json(), strict=True)  # answers come unvalidated

    def test_its_errors(self, url: str):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
        asked = {"model": "fake-judge", "input": STATE}
        with pytest.raises(openai.BadRequestError, match="it must have at least 1") as caught:
            client.decisions.create(**asked, questions=[])
        assert caught.value.param == "questions"
        picture = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}]
        with pytest.raises(openai.BadRequestError, match="this service reads text"):
            client.decisions.create(model="fake-judge", input=picture, questions=[{"type": "predicate"}])


def test_langchain(url: str):
    package = pytest.importorskip("langchain_openai.decisions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is beta
        decisions = package.OpenAIDecisions(model="default", api_key="none", base_url=f"{url}/v1", max_retries=0)
    answer = decisions.invoke(
        {
            "input": STATE,
            "questions": {
                "team": package.Choice(instructions="Which team?", choices={"billing": "Payments", "sales": "Prices"}),
                "urgent": package.Predicate(instructions="Is it urgent?"),
                "anger": package.Score(instructions="How angry?", levels=["Calm", "Angry"]),
            },
        }
    )
    assert set(answer.choices["team"].probabilities) == {"billing", "sales"}
    assert 0 <= answer.predicates["urgent"].probability <= 1
    assert answer.scores["anger"].legend == {0: "Calm", 1: "Angry"}
    assert answer.request_id


class Handling(BaseModel):
    """What Pydantic AI's agent fills in: one question a field."""

    refund: bool = Field(description="Does the customer want money back?")
    team: Literal["billing", "technical", "sales"] = Field(description="Which team takes it?")
    urgency: float = Field(description="Must it be answered today?", ge=0, le=1)
    topics: list[Literal["payment", "threat"]] = Field(description="What is it about?")


async def test_pydantic_ai(url: str):
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai_decisions")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0) as client:
        model = models.OpenAIDecisionsModel("fake-judge", provider=providers.OpenAIProvider(openai_client=client))
        run = await ai.Agent(model, output_type=Handling, instructions="A support ticket.").run(STATE)
    teams, topics = (run.response.provider_details["probabilities"][field] for field in ("team", "topics"))
    assert set(teams) == {"billing", "technical", "sales"}
    assert run.output.team == max(teams, key=teams.get)
    assert run.output.topics == [topic for topic, probability in topics.items() if probability >= 0.5]
    assert 0 <= run.output.urgency <= 1
    assert run.usage.input_tokens > run.usage.cache_read_tokens > 0
