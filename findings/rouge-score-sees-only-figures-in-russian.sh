#!/usr/bin/env bash
# rouge-score 0.1.2, which most papers report: its tokenizer lowers a text and splits it at everything
# but a-z and 0-9. Of a Russian sentence its figures are left, so two sentences with one year in
# common score 100, and the same sentence without one scores 0 against itself.
#
# Output seen:
#   two sentences, one year in common: 1.0
#   a sentence and itself:             0
#   words seen in 'größte Straße':     ['gr', 'te', 'stra', 'e']
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env; env/bin/pip install --quiet rouge-score==0.1.2
env/bin/python - <<'PYTHON'
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

scorer = RougeScorer(["rougeL"])


def score(reference: str, answer: str) -> float:
    return scorer.score(reference, answer)["rougeL"].fmeasure


capital, people = "Столица Франции — Париж, 2024.", "Население Земли растёт с 2024 года."
alone = "Столица Франции — Париж."
words = DefaultTokenizer().tokenize("größte Straße")
print("two sentences, one year in common:", score(capital, people))
print("a sentence and itself:            ", score(alone, alone))
print("words seen in 'größte Straße':    ", words)
assert (score(capital, people), score(alone, alone)) == (1.0, 0.0), "this has changed"
assert words == ["gr", "te", "stra", "e"], "this has changed"
PYTHON
