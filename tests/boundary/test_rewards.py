"""Rewards over HTTP: ``/classify``, ``/pooling``, ``/v1/embeddings`` and ``/get_reward``, on the fake."""

from __future__ import annotations

import base64
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.contract import BatchResult, TokenBatch
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.batches import sequences_of
from tests.boundary.asking import Http
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas, no_metrics, save_tokenizer
from tests.rewarding import CHAT_TEMPLATE, CHATS
from tests.tiny import write_json

TEXTS = ["the fox", "yes", "the lazy dog jumps"]
BOS = 0
ROUTES = ["/classify", "/v1/classify", "/pooling", "/v1/embeddings"]


class Broken(FakeEngine):
    """An engine whose output is not finite for prompts of one length."""

    length = 0

    def score(self, batch: TokenBatch) -> BatchResult:
        result = super().score(batch)
        for sequence, length in enumerate(batch.lengths):
            (reads,) = np.nonzero(batch.read_sequences == sequence)
            if length == self.length:
                result.values[batch.target_offsets[reads[0]] : batch.target_offsets[reads[-1] + 1]] = math.nan
        return result


class Asked(Http):
    """A client of a service, its engine's batches, and its tokenizer."""

    def __init__(self, client: httpx.AsyncClient, engine: Broken, replicas: DirectReplicas, own: TextTokenizer) -> None:
        super().__init__(client, {})
        self.engine, self._replicas, self.tokenizer = engine, replicas, own

    async def ask(self, path: str, **body: Any) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts of the last job."""
        return [list(ids) for ids in sequences_of(self._replicas.jobs[-1].batch)]


Model = Callable[..., AbstractAsyncContextManager[Asked]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(tmp_path_factory.mktemp("rewards"), adds_bos=True)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def model(files: Path) -> Model:
    @asynccontextmanager
    async def made(classes: int, config: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[Asked]:
        write_json(files / "config.json", config or {})
        engine, own = Broken(VOCAB_SIZE, 8 * CONTEXT, classes=classes), TextTokenizer.load(files)
        replicas = DirectReplicas(engine)
        own_settings = ModelSettings(model="org/judge", engine="fake", **settings)
        service = ModelService(own_settings, own, engine.info, replicas, folder=files)
        services = Models(service)
        transport = httpx.ASGITransport(create_app(lambda: services, metrics=no_metrics))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport, timeout=120) as client:
            yield Asked(client, engine, replicas, own)
        service.close()

    return made


def values(path: str, answer: dict[str, Any]) -> list[Any]:
    name = {"/pooling": "data", "/v1/embeddings": "embedding"}.get(path, "probs")
    return [None if each is None else each[name] for each in answer["data"]]


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-logit)) for logit in logits]


class TestClassifier:
    async def test_every_route_has_the_logits_of_the_score_route(self, model: Model):
        async with model(3) as http:
            plain = (await http.score(items=TEXTS))["scores"]
            for path, switch in (*((path, {"use_activation": False}) for path in ROUTES[:3]), (ROUTES[3], {})):
                answer = await http.ask(path, input=TEXTS, **switch)
                assert values(path, answer) == plain
                assert [each["index"] for each in answer["data"]] == [0, 1, 2]
                assert answer["model"] == "judge"
                assert answer["usage"]["prompt_tokens"] == sum(map(len, http.prompts))
                assert [ids.count(BOS) for ids in http.prompts] == [1, 1, 1]

    @pytest.mark.parametrize(
        ("config", "classes", "activation"),
        [
            ({}, 3, softmax),
            ({}, 1, sigmoid),
            ({"problem_type": None}, 2, softmax),
            ({"problem_type": "single_label_classification"}, 2, softmax),
            ({"problem_type": "multi_label_classification"}, 3, sigmoid),
            ({"problem_type": "regression"}, 1, list),
            ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, list),
        ],
    )
    @pytest.mark.parametrize("path", ROUTES[:3])
    async def test_activations_are_those_of_vllm(
        self, model: Model, path: str, config: dict[str, Any], classes: int, activation: Callable[[list[float]], Any]
    ):
        async with model(classes, config) as http:
            logits = values(path, await http.ask(path, input=TEXTS, use_activation=False))
            for switch in ({}, {"use_activation": True}, {"use_activation": None}, {"activation": True}):
                found = values(path, await http.ask(path, input=TEXTS, **switch))
                assert found == [pytest.approx(activation(row), rel=1e-6) for row in logits]
            for older in ("activation", "softmax"):
                assert values(path, await http.ask(path, input=TEXTS, **{older: False})) == logits
                error = await http.refused(path, input="a", use_activation=True, **{older: True})
                assert "send use_activation alone" in error["message"]

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            ({"id2label": {"0": "bad", "1": "fair", "2": "good"}}, ["bad", "fair", "good"]),
            ({"id2label": {"0": "bad", "1": "good"}}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
            ({}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ],
    )
    async def test_the_label_is_that_of_the_most_probable_class(
        self, model: Model, config: dict[str, Any], names: list[str]
    ):
        async with model(3, config) as http:
            answer = await http.ask("/classify", input=TEXTS)
        assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
        for each in answer["data"]:
            assert set(each) == {"index", "label", "probs", "num_classes"}
            assert each["label"] == names[int(np.argmax(each["probs"]))]
            assert each["num_classes"] == 3

    async def test_ids_and_single_texts(self, model: Model):
        async with model(2) as http:
            assert values("/classify", await http.ask("/classify", input=[5, 6])) == values(
                "/classify", await http.ask("/classify", input=[[5, 6]])
            )
            assert http.prompts == [[5, 6]]
            await http.ask("/classify", input="the fox", add_special_tokens=False)
            assert http.prompts == http.tokenizer.encode(["the fox"], add_special_tokens=False)
            await http.ask("/classify", input="<s>the fox")
            assert http.prompts == http.tokenizer.encode(["the fox"])
            assert http.prompts[0].count(BOS) == 1

    @pytest.mark.parametrize("special", [None, True, False])
    @pytest.mark.parametrize("answer", [None, True, False])
    async def test_a_conversation_has_its_template_once(self, model: Model, answer: bool | None, special: bool | None):
        async with model(1) as http:
            for path in ROUTES:
                body = {"messages": CHATS[0], "add_generation_prompt": answer, "add_special_tokens": special}
                await http.ask(path, **body)
                (ids,) = http.prompts
                assert ids.count(BOS) == 1
                text = http.tokenizer.decode(ids)
                assert text.endswith("assistant:" if answer else "<|im_end|>\n")
                assert text.count(CHATS[0][1]["content"]) == 1
            hidden = {"role": "assistant", "content": "<s>yes<|im_end|>"}
            await http.ask("/classify", messages=[hidden])
            assert http.prompts[0].count(BOS) == 1
            end = http.tokenizer.backend.token_to_id("<|im_end|>")
            assert http.prompts[0].count(end) == 1
            assert http.tokenizer.decode(http.prompts[0]) == "<s>assistant: <s>yes<|im_end|><|im_end|>\n"

    async def test_openrlhfs_shape(self, model: Model):
        async with model(1) as http:
            answer = await http.ask("/get_reward", query=["<s>the fox", "yes"], prompts=["<s>the", "y"], labels=[1, {}])
            assert answer == {"rewards": answer["rewards"], "scores": answer["rewards"], "extra_logs": {}}
            # The text has its template's BOS, or none.
            assert http.prompts == http.tokenizer.encode(["<s>the fox", "yes"], add_special_tokens=False)
            plain = await http.score(items=["<s>the fox", "yes"], add_special_tokens=False)
            assert [[reward] for reward in answer["rewards"]] == plain["scores"]
        async with model(2) as http:
            rewards = (await http.ask("/get_reward", query=["the fox"]))["rewards"]
            ((bad, good),) = (await http.score(items=["the fox"], add_special_tokens=False))["scores"]
            assert rewards == [good - bad]
        async with model(3) as http:
            assert "no class is the reward" in (await http.refused("/get_reward", query=["a"]))["message"]

    @pytest.mark.parametrize("path", ["/pooling", "/v1/embeddings"])
    async def test_base64(self, model: Model, path: str):
        async with model(3) as http:
            switch = {"use_activation": False} if path == "/pooling" else {}
            plain = values(path, await http.ask(path, input=TEXTS, **switch))
            packed = values(path, await http.ask(path, input=TEXTS, encoding_format="base64", **switch))
        assert [np.frombuffer(base64.b64decode(each), "<f4").tolist() for each in packed] == plain


class TestJudge:
    ASKED = "Is the last answer correct, helpful and harmless?"

    async def test_its_reward_is_the_probability_of_yes(self, model: Model):
        questions = {"q": {"type": "noul", "instructions": self.ASKED}}
        async with model(0) as http:
            wanted = []
            for text in TEXTS:
                told = await http.ask("/v1/systemone", state=text, questions=questions)
                wanted.append(told["answers"]["q"]["noul"])
            for path in ROUTES:
                assert values(path, await http.ask(path, input=TEXTS)) == [pytest.approx([p]) for p in wanted]
            answer = await http.ask("/get_reward", query=TEXTS)
            assert answer["rewards"] == answer["scores"] == pytest.approx(wanted)
            assert all(0 < mass <= 1 for mass in answer["extra_logs"]["label_mass"])
            for path in ROUTES[:3]:
                logits = values(path, await http.ask(path, input=TEXTS, use_activation=False))
                assert logits == [pytest.approx([math.log(p / (1 - p))]) for p in wanted]
            (entry, *_) = (await http.ask("/classify", input=TEXTS))["data"]
            assert (entry["label"], entry["num_classes"]) == ("yes", 1)

    async def test_the_question_is_in_the_settings(self, model: Model):
        async with model(0, reward_question="Is it about a fox?") as http:
            await http.ask("/classify", input=TEXTS)
            prompts = list(map(http.tokenizer.decode, http.prompts))
            assert [text in prompt for text, prompt in zip(TEXTS, prompts, strict=True)] == [True] * 3
            assert all("Is it about a fox?" in prompt and self.ASKED not in prompt for prompt in prompts)
            assert [ids.count(BOS) for ids in http.prompts] == [1, 1, 1]
        with pytest.raises(ValueError, match="reward_question"):
            ModelSettings(reward_question=" ")

    async def test_texts_cannot_make_control_tokens(self, model: Model):
        async with model(0) as http:
            await http.ask("/get_reward", query=["the fox<|im_end|>", "<s>the fox"])
            (one, other) = http.prompts
            end = http.tokenizer.backend.token_to_id("<|im_end|>")
            assert one.count(end) == other.count(end)
            assert other.count(BOS) == 1

    async def test_it_reads_a_conversation_as_a_transcript(self, model: Model):
        async with model(0) as http:
            await http.ask("/classify", messages=[{"role": "system", "content": "be kind"}, *CHATS[0]])
            (ids,) = http.prompts
            assert "developer: be kind\n\nuser: is this text" in http.tokenizer.decode(ids)

    async def test_it_takes_no_ids(self, model: Model):
        async with model(0) as http:
            for path in ROUTES:
                assert "send text or messages" in (await http.refused(path, input=[[1, 2]]))["message"]


LONG = "yes no " * 8 * CONTEXT
ON_ERROR = [(path, "input", classes) for path in ROUTES for classes in (0, 1)] + [
    ("/get_reward", "query", classes) for classes in (0, 1)
]


class TestErrors:
    @pytest.mark.parametrize(("path", "field", "classes"), ON_ERROR)
    async def test_a_wrong_text_harms_only_itself(self, model: Model, path: str, field: str, classes: int):
        def found(answer: dict[str, Any]) -> list[Any]:
            return answer["rewards"] if path == "/get_reward" else values(path, answer)

        texts = ["the fox", LONG, "yes no, but it is positive", "the dog jumps over"]
        async with model(classes) as http:
            alone = [found(await http.ask(path, **{field: [texts[index]]}))[0] for index in (0, 3)]
            await http.ask(path, **{field: [texts[2]]})
            http.engine.length = len(http.prompts[0])
            error = await http.refused(path, **{field: texts})
            assert error["param"] == field
            assert error["message"].startswith(f"{field}[1]")
            failed = await http.refused(path, status=500, **{field: [texts[0], texts[2]]})
            assert failed["message"].startswith(f"{field}[1]: the model's output is not finite")
            answer = await http.ask(path, **{field: texts}, on_error="item")
            assert found(answer) == [alone[0], None, None, alone[1]]
            assert [(each["index"], each["code"]) for each in answer["errors"]] == [(1, 400), (2, 500)]
            none = await http.ask(path, **{field: [LONG]}, on_error="item")
            assert found(none) == [None]
            assert (await http.ask(path, **{field: ["the fox"]}, on_error="item"))["errors"] == []

    async def test_ids_out_of_the_vocabulary(self, model: Model):
        async with model(1) as http:
            for path in ROUTES:
                error = await http.refused(path, input=[[1], [2, VOCAB_SIZE]])
                assert error["message"].startswith("input[1][1]: Token ID 512 is out of vocabulary")
                answer = await http.ask(path, input=[[1], [VOCAB_SIZE], []], on_error="item")
                assert [each["index"] for each in answer["errors"]] == [1, 2]
                assert [each is None for each in answer["data"]] == [False, True, True]

    @pytest.mark.parametrize("classes", [0, 1])
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "input"),
            ({"input": "a", "messages": CHATS[0]}, "input"),
            ({"input": []}, "input"),
            ({"input": ["a", 3]}, "input"),
            ({"input": [True]}, "input"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
            ({"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
            ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
            ({"text": "a"}, "text"),
            ({"input": "a", "dimensions": 1}, "dimensions"),
            ({"input": "a", "unknown": 1}, "unknown"),
        ],
    )
    async def test_what_is_wrong_is_named(self, model: Model, classes: int, body: dict[str, Any], param: str):
        async with model(classes) as http:
            for path in ROUTES:
                assert (await http.refused(path, **body))["param"] == param

    async def test_what_is_wrong_in_openrlhfs_shape(self, model: Model):
        async with model(1) as http:
            for body, param in (
                ({}, "query"),
                ({"query": "a"}, "query"),
                ({"query": []}, "query"),
                ({"query": [[1]]}, "query"),
                ({"query": ["a"], "prompts": ["a", "b"]}, "prompts"),
                ({"query": ["a"], "labels": []}, "labels"),
            ):
                assert (await http.refused("/get_reward", **body))["param"] == param

    @pytest.mark.parametrize("classes", [0, 1])
    async def test_limits(self, model: Model, classes: int):
        async with model(classes, limits=Limits(max_items=3, max_request_tokens=600)) as http:
            for path, field in (*((path, "input") for path in ROUTES), ("/get_reward", "query")):
                few = await http.refused(path, status=413, **{field: ["a"] * 4})
                assert few["message"].startswith(f"{field} has 4 entries; this service takes at most 3")
                long = await http.refused(path, status=413, **{field: ["yes no " * 100] * 3})
                assert long["param"] == field
                assert "a request may have at most 600" in long["message"]

    async def test_unknown_models(self, model: Model):
        async with model(1) as http:
            for path, body in (("/classify", {"input": "a"}), ("/get_reward", {"query": ["a"]})):
                await http.refused(path, status=404, **body, model="other")
                await http.ask(path, **body, model="judge")
