"""A judge of film reviews: its temperature and threshold are found on one half of labelled rows, checked on the other.

Prints how often it is right, and how far its probabilities are from how often it is right; --plot draws them.
Run it beside a service: python examples/judge.py examples/reviews.csv --url http://127.0.0.1:8000 --plot judge.png
"""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

from score_serve_client import Client

LABELS = [" positive", " negative"]
BINS = 4
Row = tuple[float, float]
"""The log-odds of the first label, and whether it is the right one: 1 or 0."""


def probability(log_odds: float, temperature: float) -> float:
    return 1 / (1 + math.exp(-log_odds / temperature))


def loss(rows: Sequence[Row], temperature: float) -> float:
    """Mean negative log-likelihood of the right labels, in nats."""
    return sum(math.log1p(math.exp((1 - 2 * right) * odds / temperature)) for odds, right in rows) / len(rows)


def accuracy(rows: Sequence[Row], temperature: float, threshold: float) -> float:
    return sum((probability(odds, temperature) >= threshold) == (right == 1) for odds, right in rows) / len(rows)


def bins(rows: Sequence[Row], temperature: float) -> list[tuple[float, float, int]]:
    """For each range of probabilities that has rows: their mean, the share of rows that are positive, and the rows."""
    found = []
    for number in range(BINS):
        inside = [
            (p, right)
            for odds, right in rows
            if min(int((p := probability(odds, temperature)) * BINS), BINS - 1) == number
        ]
        if inside:
            count = len(inside)
            found.append((sum(p for p, _ in inside) / count, sum(right for _, right in inside) / count, count))
    return found


def calibration_error(rows: Sequence[Row], temperature: float) -> float:
    """The mean distance between probability and share, over all rows."""
    return sum(count * abs(p - share) for p, share, count in bins(rows, temperature)) / len(rows)


def draw(path: Path, rows: Sequence[Row], temperature: float) -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 5)).subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    for name, own in (("temperature 1", 1.0), (f"temperature {temperature:.2f}", temperature)):
        points = bins(rows, own)
        axes.plot([p for p, _, _ in points], [share for _, share, _ in points], marker="o", label=name)
    axes.set(xlabel="probability of positive", ylabel="share that is positive", title=f"{len(rows)} rows held out")
    axes.legend()
    axes.figure.savefig(path)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("file", type=Path, help="a CSV file with the columns text and label")
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--plot", type=Path, help="draw the calibration into this file; needs matplotlib")
    given = options.parse_args()
    with given.file.open(encoding="utf-8", newline="") as file:
        known = [*csv.DictReader(file)]
    with Client(given.url) as client:
        answer = client.score(
            "\nSentiment:",
            [f"Review: {row['text']}" for row in known],
            labels=LABELS,
            item_first=True,
            return_token_logprobs=True,
        )
    rows = [
        (logprobs[0] - logprobs[1], float(row["label"] == LABELS[0].strip()))
        for row, logprobs in zip(known, answer.token_logprobs, strict=True)
    ]
    half = len(rows) // 2
    fitted, held_out = rows[:half], rows[half:]
    temperature = min((step / 10 for step in range(1, 51)), key=lambda each: loss(fitted, each))
    thresholds = [step / 100 for step in range(1, 100)]
    best = max(accuracy(fitted, temperature, each) for each in thresholds)
    good = [each for each in thresholds if accuracy(fitted, temperature, each) == best]
    threshold = good[len(good) // 2]  # the middle of all that are equally good
    print(f"found on {half} rows: temperature {temperature:.2f}, threshold {threshold:.2f}")
    print(f"right on {len(held_out)} others: {accuracy(held_out, temperature, threshold):.0%}")
    for each in (1.0, temperature):
        print(
            f"loss {loss(held_out, each):.3f}, calibration error {calibration_error(held_out, each):.3f} at {each:.2f}"
        )
    if given.plot:
        draw(given.plot, held_out, temperature)


if __name__ == "__main__":
    main()
