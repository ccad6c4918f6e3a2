"""A data frame in, a data frame out: a column for each label, and the most probable one.

Run it beside a service: python examples/pandas_scores.py examples/reviews.csv scored.csv --url http://127.0.0.1:8000
"""

import argparse
from pathlib import Path

import pandas as pd
from score_serve_client import Client


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("file", type=Path, help="a CSV file with the column text")
    options.add_argument("output", type=Path)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    given = options.parse_args()
    reviews = pd.read_csv(given.file, index_col="id")
    with Client(given.url) as client:
        scores = client.score_series(
            "\nSentiment:",
            "Review: " + reviews["text"],
            labels=[" positive", " negative"],
            item_first=True,
            apply_softmax=True,
        )
    scores.columns = scores.columns.str.strip()
    scored = reviews.join(scores).assign(found=scores.idxmax(axis="columns"))
    scored.to_csv(given.output)
    print(pd.crosstab(scored["label"], scored["found"]))


if __name__ == "__main__":
    main()
