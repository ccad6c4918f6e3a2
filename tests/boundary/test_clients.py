"""Client packages that users already have, unchanged from PyPI, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas, save_tokenizer

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("connections_closed")]  # heavy: the packages

QUERY = "who is lazy?"
DOCUMENTS = ["the fox", "the dog", "yes", "a cat"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_bos=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = TextTokenizer.load(folder)
    settings = ModelSettings(model="fake-judge", aliases=("rerank-v3.5",), engine="fake")
    service = ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))
    models = Models(service)
    server = uvicorn.Server(uvicorn.Config(create_app(lambda: models), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    service.close()


@pytest.fixture(scope="module")
def ranking(url: str) -> list[tuple[int, float]]:
    """The ranking by the service's own route."""
    answer = httpx.post(f"{url}/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
    return [(result["index"], result["relevance_score"]) for result in answer["results"]]


class TestCohere:
    def test_both_versions_of_its_client(self, url: str, ranking: list[tuple[int, float]]):
        cohere = pytest.importorskip("cohere")
        for client in (cohere.ClientV2(api_key="none", base_url=url), cohere.Client(api_key="none", base_url=url)):
            answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=3)
            assert [(result.index, result.relevance_score) for result in answer.results] == ranking[:3]
            assert answer.id
            assert answer.meta.tokens.input_tokens > 0

    def test_objects_and_their_text(self, url: str):
        cohere = pytest.importorskip("cohere")
        documents = [{"text": text, "title": "none"} for text in DOCUMENTS]
        client = cohere.Client(api_key="none", base_url=url)
        answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=documents, return_documents=True)
        for result in answer.results:
            assert result.document.text == DOCUMENTS[result.index]

    def test_its_errors(self, url: str):
        cohere = pytest.importorskip("cohere")
        client = cohere.ClientV2(api_key="none", base_url=url)
        with pytest.raises(cohere.errors.NotFoundError, match="fake-judge"):
            client.rerank(model="rerank-v2", query=QUERY, documents=DOCUMENTS)
        with pytest.raises(cohere.errors.BadRequestError, match="top_n"):
            client.rerank(model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, top_n=0)


def test_llama_index(url: str, ranking: list[tuple[int, float]]):
    package = pytest.importorskip("llama_index.postprocessor.cohere_rerank")
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.0) for text in DOCUMENTS]
    reranker = package.CohereRerank(api_key="none", base_url=url, model="rerank-v3.5", top_n=2)
    best = reranker.postprocess_nodes(nodes, query_str=QUERY)
    assert [(DOCUMENTS.index(node.text), node.score) for node in best] == ranking[:2]


def test_langchain(url: str, ranking: list[tuple[int, float]]):
    package = pytest.importorskip("langchain_cohere")
    from langchain_core.documents import Document

    reranker = package.CohereRerank(cohere_api_key="none", base_url=url, model="rerank-v3.5", top_n=2)
    best = reranker.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY)
    found = [(DOCUMENTS.index(document.page_content), document.metadata["relevance_score"]) for document in best]
    assert found == ranking[:2]


class TestOpenAI:
    def test_completions(self, url: str):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1")
        answer = client.completions.create(
            model="fake-judge", prompt=["the fox", "a dog"], max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        for choice, prompt in zip(answer.choices, ["the fox", "a dog"], strict=True):
            assert choice.text.startswith(prompt)
            assert choice.logprobs.token_logprobs[0] is None
            assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
            assert "".join(choice.logprobs.tokens) == choice.text
        assert answer.usage.completion_tokens == 2
        assert [model.id for model in client.models.list()] == ["fake-judge", "rerank-v3.5"]
        assert client.models.retrieve("rerank-v3.5").id == "rerank-v3.5"
        with pytest.raises(openai.NotFoundError, match="the names are fake-judge"):
            client.models.retrieve("org/none")

    def test_its_errors(self, url: str):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="never generates text") as caught:
            client.completions.create(model="fake-judge", prompt="a", max_tokens=16)
        assert (caught.value.param, caught.value.type) == ("max_tokens", "BadRequestError")
        with pytest.raises(openai.NotFoundError, match="fake-judge"):
            client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a", max_tokens=1)


class TestLmEval:
    def test_its_remote_tokenizer(self, url: str):
        utils = pytest.importorskip("lm_eval.utils")
        assert utils.check_remote_tokenizer_support(f"{url}/v1/completions")
        remote = utils.RemoteTokenizer(f"{url}/v1/completions")
        assert (remote.bos_token, remote.eos_token, remote.pad_token) == ("<s>", "</s>", None)
        assert (remote.bos_token_id, remote.eos_token_id) == (0, 1)
        for text in ("the quick fox", "狐狸 🦊", "<s>the</s>"):
            assert remote.decode(remote.encode(text)) == text
        assert remote("the fox")["input_ids"] == remote.encode("the fox")
        chat = [{"role": "user", "content": "a fox"}]
        assert remote.apply_chat_template(chat) == "user: a fox\nassistant:"

    @pytest.mark.parametrize("tokenized", [True, False])
    def test_its_completions_with_the_services_tokenizer(self, url: str, tokenized: bool):
        """lm-eval finds the tokenizer by itself."""
        api = pytest.importorskip("lm_eval.models.openai_completions")
        from lm_eval.api.instance import Instance

        model = api.LocalCompletionsAPI(
            model="default", base_url=f"{url}/v1/completions", tokenized_requests=tokenized, num_concurrent=1
        )
        assert model.tokenizer_backend == "remote"
        asked = [("the quick", " fox"), ("is it", " 狐狸 🦊"), ("", "yes")]
        found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
        for (context, continuation), (logprob, greedy) in zip(asked, found, strict=True):
            prompt = context or "</s>"
            body = {"query": prompt, "items": [""], "labels": [continuation], "return_token_logprobs": True}
            score = httpx.post(f"{url}/v1/score", json=body).json()
            assert logprob == pytest.approx(score["token_logprobs"][0][0], abs=1e-4)
            assert greedy in (False, True)
