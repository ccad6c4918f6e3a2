"""Retrieval in two stages: words find candidates, the model ranks them, and the best ones become a prompt's context.

Run it beside a service: python examples/rag_rerank.py --url http://127.0.0.1:8000
"""

import argparse

from score_serve_client import Client

PASSAGES = [
    "The Louvre in Paris is the largest museum in the world, and the Mona Lisa hangs there.",
    "Leonardo da Vinci painted the Mona Lisa between 1503 and 1519.",
    "Michelangelo carved David and painted the ceiling of the Sistine Chapel.",
    "Vermeer painted Girl with a Pearl Earring, which is called the Mona Lisa of the North.",
    "The Eiffel Tower is 330 metres high.",
    "Oil paint dries slowly, which lets painters mix colours on the canvas.",
]
CANDIDATES, KEPT = 4, 2


def candidates(question: str) -> list[str]:
    """The passages that share the most words with the question; here an index or a vector database has its place."""
    words = set(question.lower().split())
    return sorted(PASSAGES, key=lambda passage: -len(words & set(passage.lower().split())))[:CANDIDATES]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--question", default="Who painted the Mona Lisa?")
    given = options.parse_args()
    found = candidates(given.question)
    with Client(given.url) as client:
        ranking = client.rerank(given.question, found, top_n=KEPT)
    for result in ranking.results:
        print(f"{result.relevance_score:.4f}  {found[result.index]}")
    context = "\n".join(found[result.index] for result in ranking.results)
    print(f"\nThe prompt for the writer:\n{context}\n\nQuestion: {given.question}")


if __name__ == "__main__":
    main()
