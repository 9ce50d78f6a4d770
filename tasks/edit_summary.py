"""Records of edited pictures -> figures with Wilson's intervals, the judge's own errors among them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emuworld.envs.rooms.edit_words import PHRASINGS
from emuworld.envs.tabletop.edit_words import TABLE_PHRASINGS
from emuworld.tasks.metrics import wilson
from emuworld.tasks.run_folder import Record
from emuworld.tasks.suites import BARS

# Pictures whose worth is known, and what a perfect judge says of them: done, kept (None: either may be said).
EXPECTED: dict[str, tuple[bool, bool | None]] = {
    "after": (True, True),
    "after, tokenizer": (True, True),
    "copied, tokenizer": (True, True),
    "before": (False, None),
    "before, tokenizer": (False, None),
    "wrong": (False, None),
    "wrong, tokenizer": (False, None),
    "spoilt": (True, False),
    "spoilt, tokenizer": (True, False),
}
VERDICTS = ("success", "done", "kept")
KNOWN_WORDS, OTHER_WORDS = "words of all splits", "words of the test split alone"
UNHEARD_WORDS, BY_SHAPE = "made-up words", "things by their shape alone"


def _patterns(templates: Iterable[str]) -> list[re.Pattern[str]]:
    return [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(template))) for template in templates]


_ALL_PHRASINGS = (*PHRASINGS.values(), *TABLE_PHRASINGS.values())
_OTHER = _patterns(template for one in _ALL_PHRASINGS for template in one.held_out)
_KNOWN = _patterns(template for one in _ALL_PHRASINGS for template in one.templates)


def summarise_x2i(records: Sequence[Record]) -> dict[str, Any]:
    """Share of edits that are done and leave the rest as it was, by kind, by world and by whether training
    ever words one so, and how often the judge says so of pictures that are not, or does not of pictures that
    are.
    """
    cases = [record for record in records if record["kind"] == "edit"]
    figures: dict[str, Any] = {"num_edits": len(cases), "groups": {}}
    labelled = [(case["judged"], (case["world"], _words(case), case["group"])) for case in cases]
    names = {name: None for place in range(3) for name in sorted({labels[place] for _, labels in labelled})}
    for name in ("all", *names):
        chosen = [judged for judged, labels in labelled if name in ("all", *labels)]
        figures["groups"][name] = {
            "dream": {verdict: _rate([one["dream"] for one in chosen], verdict) for verdict in VERDICTS},
            "judge": _errors(chosen),
        }
    figures["judged"] = {
        who: {verdict: _rate([case["judged"][who] for case in cases], verdict) for verdict in VERDICTS}
        for who in EXPECTED
    }
    whole = figures["groups"]["all"]
    figures["detector"] = {
        "edits taken for done and kept that are not": whole["judge"]["false successes, tokenizer"],
        "edits not taken for done and kept that are": whole["judge"]["missed successes, tokenizer"],
    }
    success = whole["dream"]["success"]
    bar = BARS["x2i_success"]
    met = success["value"] is not None and success["value"] >= bar
    figures["bars"] = {
        "edit done, rest kept": {"estimate": success, "bar": bar, "at_least": True, "met": met}
    }
    return figures


def _words(case: Record) -> str:
    asked, target = case["instruction"], case["target"]
    if " " in target and target not in asked and f"the {target.rpartition(' ')[2]}" in asked:
        return BY_SHAPE
    if any(pattern.fullmatch(asked) for pattern in _OTHER):
        return OTHER_WORDS
    return KNOWN_WORDS if any(pattern.fullmatch(asked) for pattern in _KNOWN) else UNHEARD_WORDS


def _errors(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often the judge errs about success, on plain pictures and on those through the tokenizer."""
    errors = {}
    for way, ending in (("plain", ""), ("tokenizer", ", tokenizer")):
        of_way = {who: want for who, want in EXPECTED.items() if who.endswith(", tokenizer") == bool(ending)}
        good = [_success(one[who]) for one in judged for who, want in of_way.items() if want == (True, True)]
        poor = [_success(one[who]) for one in judged for who, want in of_way.items() if want != (True, True)]
        errors[f"false successes, {way}"] = wilson(sum(poor), len(poor)).as_dict()
        errors[f"missed successes, {way}"] = wilson(len(good) - sum(good), len(good)).as_dict()
    return errors


def _rate(verdicts: Sequence[Mapping[str, bool]], name: str) -> dict[str, Any]:
    hits = [_success(one) if name == "success" else one[name] for one in verdicts]
    return wilson(sum(hits), len(hits)).as_dict()


def _success(verdict: Mapping[str, bool]) -> bool:
    return verdict["done"] and verdict["kept"]
