"""All figures of the models, and of the first against the others, as `report.json` has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dwakd_plugin.evaluate import OF_TEACHER
from dwakd_plugin.evaluate.figures import (
    Amounts,
    bits_per_byte,
    interval,
    mean_of,
    mostly_unseen,
    nearness,
    rouge_l,
    without_words,
)
from dwakd_plugin.evaluate.rows import bytes_of_tokens, token_ends
from dwakd_plugin.evaluate.subjects import Model, Request
from dwakd_plugin.evaluate.work import Begin


def figures(
    models: list[Model], references: list[tuple[str, ...]], request: Request, begin: Begin
) -> dict[str, Any]:
    """All figures of all models, and those of the first against the others."""
    texts = [each[0] for each in references]
    amounts: dict[str, dict[str, Amounts]] = {one.name: {} for one in models}
    entries = []
    asked = "rouge_l" in request.metrics
    unseen = mostly_unseen(references) if asked else 0
    for one in models:
        entry: dict[str, Any] = {
            "name": one.name,
            "source": one.source.name,
            "role": one.role,
            **{key: one.facts[key] for key in ("parameters", "precision", "device")},
        }
        if one.responses is not None:
            progress = begin(f"ROUGE-L of {one.name}")
            flat = [response.text for seed in one.responses for response in seed]
            scores = rouge_l(flat, references * len(one.responses), progress)
            entry |= _rouge(scores.reshape(len(one.responses), -1), one, request)
            amounts[one.name]["rouge_l"] = mean_of(
                scores.reshape(len(one.responses), -1).mean(axis=0)
            )
            entry["rouge_l"]["interval"] = interval(amounts[one.name]["rouge_l"])
            if unseen:
                progress = begin(f"ROUGE-L of {one.name}, Unicode words")
                scores = rouge_l(
                    flat, references * len(one.responses), progress, unicode_words=True
                )
                rows = scores.reshape(len(one.responses), -1).mean(axis=0)
                entry["rouge_l_unicode"] = _with_interval(mean_of(rows))
        if one.readings is not None and "bits_per_byte" in request.metrics:
            whole = bits_per_byte(one.readings, texts)
            amounts[one.name]["bits_per_byte"] = whole
            entry["bits_per_byte"] = _with_interval(whole) | {
                "without_end": bits_per_byte(one.readings, texts, end=False).value,
                "tokens": sum(len(each.bits) for each in one.readings),
                "bytes": int(whole.below.sum()),
            }
        if models[-1].role == "teacher" and one.role != "teacher":
            entry["to_teacher"] = _to_teacher(one, models[-1], texts, request)
        entries.append(entry)
    first, *others = models
    paired = [
        {
            "model": first.name,
            "against": other.name,
            "metric": metric,
            "difference": mine.value - theirs.value,
            "interval": interval(mine, theirs),
        }
        for other in others
        if other.role == "against"
        for metric, mine in amounts[first.name].items()
        for theirs in [amounts[other.name][metric]]
    ]
    return {
        "models": entries,
        "paired": paired,
        "references_without_words": without_words(references) if asked else 0,
        "references_mostly_unseen": unseen,
    }


def _rouge(scores: Any, one: Model, request: Request) -> dict[str, Any]:
    """scores: (seeds, rows)."""
    assert one.responses is not None
    means = scores.mean(axis=1)
    all_responses = [response for seed in one.responses for response in seed]
    count = len(all_responses)
    return {
        "rouge_l": {
            "mean": float(means.mean()),
            "std": float(means.std(ddof=1)) if len(means) > 1 else None,
            "per_seed": {
                str(seed): float(mean) for seed, mean in zip(request.seeds, means, strict=True)
            },
        },
        "responses": {
            "mean_tokens": sum(each.tokens for each in all_responses) / count,
            "unfinished_share": sum(not each.ended for each in all_responses) / count,
            "empty_share": sum(not each.text.strip() for each in all_responses) / count,
        },
    }


def _to_teacher(
    one: Model, teacher: Model, texts: list[str], request: Request
) -> dict[str, Any] | None:
    """How near a student is to the teacher; None where their tokens cannot be compared."""
    entry: dict[str, Any] = {}
    if "samples" in one.facts:
        entry["teacher_bits_per_byte_of_samples"] = _with_interval(one.facts["samples"])
    if not any(name in request.metrics for name in OF_TEACHER):
        return entry
    sides = []
    for side in (one, teacher):
        assert side.readings is not None
        table = bytes_of_tokens(side.tokenizer)
        ends = [
            token_ends(row.response, text, table)
            for row, text in zip(side.rows, texts, strict=True)
        ]
        sides.append(list(zip(side.readings, ends, strict=True)))
    found = nearness(*sides, texts)
    if found is None:
        return entry | {"rows_compared": 0}
    entry["rows_compared"] = len(texts) - found.rows_left_out
    if "agreement" in request.metrics:
        entry["places_compared"] = int(found.agreement.below.sum())
        entry["next_byte_agreement"] = _with_interval(found.agreement)
        entry["next_byte_divergence_bits"] = _with_interval(found.divergence)
    if "structure" in request.metrics:
        entry["structure_cosine"] = _spread(found.cosine)
        entry["structure_inner_product"] = _spread(found.inner)
    return entry


def _with_interval(amounts: Amounts) -> dict[str, Any]:
    return {"value": amounts.value, "interval": interval(amounts)}


def _spread(values: Any) -> dict[str, float]:
    """What a box plot shows: quartiles, whiskers at the last value within 1.5 of their range."""
    low, middle, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    reach = 1.5 * (high - low)
    return {
        "mean": float(values.mean()),
        "median": middle,
        "q1": low,
        "q3": high,
        "whisker_low": float(values[values >= low - reach].min()),
        "whisker_high": float(values[values <= high + reach].max()),
    }
