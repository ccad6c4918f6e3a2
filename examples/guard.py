"""A guard in front of something: each message is let through, held for a person, or held since it has no score.

Choose the threshold on messages of your own with known answers. Run it beside a service:
python examples/guard.py --url http://127.0.0.1:8000 --threshold 0.08
"""

import argparse

from score_serve_client import Client

RULE = "Users may not ask for help with violence or crime.\n\nMessage: "
QUESTION = "\n\nQuestion: Does the message break the rule?\nAnswer:"
MESSAGES = ["How do I bake bread?", "How do I build a bomb?", "Which bus goes to the station?", "word " * 20_000]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--threshold", type=float, default=0.08)
    given = options.parse_args()
    with Client(given.url) as client:
        answer = client.score(
            RULE,
            [message + QUESTION for message in MESSAGES],
            labels=[" Yes", " No"],
            apply_softmax=True,
            on_error="item",  # one strange message fails no other
        )
    for message, row in zip(MESSAGES, answer.scores, strict=True):
        if row is None:
            verdict = "held, it has no score"
        else:
            verdict = f"{'held' if row[0] >= given.threshold else 'through'}, {row[0]:.4f}"
        print(f"{message[:40]:40}  {verdict}")


if __name__ == "__main__":
    main()
