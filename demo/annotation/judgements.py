"""The demo's annotators: what a rubric of `demo/rubrics` says of an image whose content is known.

Nobody was asked. What an image shows is known exactly (it was rendered so) or is the trained annotator's verdict
(it was sampled); these rules turn that into the score and the reasoning that a person following the rubric would
write down. They stand in for human annotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from demo.world.captions import Request
from demo.world.vocabulary import ATTRIBUTES

#: attributes that are the object itself: without them the hierarchy's first criterion has failed
OBJECTS = {("plant", "kind"), ("typography", "text")}
YES, NO, MISSING = "yes", "no", "missing"
DONE, HALF, UNDONE = "done", "half", "undone"
KEPT, CHANGED = "kept", "changed"
#: stands for everything unnamed that makes this person or plant that one
IDENTITY = "identity"
#: an edit that also broke the picture
DAMAGE = "damage"
_WEIGHTS = {IDENTITY: 2}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One annotation.

    Attributes:
        score: 1..5.
        reasoning: what the rubric asks for, without the score.
    """

    score: int
    reasoning: str


def say(name: str, value: str) -> str:
    """An attribute's name or value in words."""
    return " ".join(value) if name == "text" else value.replace("_", " ")


def judge_alignment(request: Request, category: str, attributes: Mapping[str, str]) -> Judgement:
    """Compare an image with a prompt, requirement by requirement, in the order of the vocabulary; a text by letters.

    Another category scores 1. Another kind of plant or other letters: 2, or 1 if anything else is wrong as well.
    Otherwise 5, less 1 for each wrong attribute, at least 1.

    Args:
        request: what the prompt asks for.
        category: what the image shows.
        attributes: of the image; one that is not there counts as "none".
    """
    if category != request.category:
        return Judgement(score=1, reasoning=f"object {request.category}: {category} {MISSING}")
    lines, verdicts = [f"object {category}: {category} {YES}"], []
    for attribute in ATTRIBUTES[category]:
        name = attribute.name
        if name not in request.attributes:
            continue
        asked, shown = request.attributes[name], attributes.get(name, "none")
        other = MISSING if (category, name) in OBJECTS else NO
        # Letter by letter: who writes it down compares neighbouring words.
        pairs = zip_longest(asked, shown, fillvalue="none") if name == "text" else [(asked, shown)]
        lines += [f"{say('', name)} {say('', a)}: {say('', b)} {YES if a == b else other}" for a, b in pairs]
        verdicts.append(YES if asked == shown else other)
    wrong, missing = verdicts.count(NO), verdicts.count(MISSING)
    score = max(1, 5 - wrong) if not missing else 2 if missing == 1 and not wrong else 1
    return Judgement(score=score, reasoning=", ".join(lines))


def judge_edit(
    attribute: str,
    asked: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    *,
    category: str,
    looks: tuple[str, str],
    broken: Sequence[str] = (),
) -> Judgement:
    """Compare an edit's result with its instruction and its source.

    The reasoning puts what is compared side by side: of the attribute to change, the value asked for, the one shown
    and the one before, with the verdict; of every other, and of who it is, before and after; then all that changed.
    Who writes it down compares neighbouring words, not pictures.

    Core: done (the attribute has the value asked for), half (it changed to something else) or undone. The rest: every
    other attribute that changed, and what is broken besides. Undone scores 1; half 3, or 2 if anything else changed;
    done 5, 4 or 3 as nothing, one thing or more changed, a lost identity counting for two.

    Args:
        attribute: to change.
        asked: its value in the instruction.
        before: attributes of the source.
        after: attributes of the result.
        category: of both.
        looks: of source and result, see `demo.world.looks`.
        broken: `IDENTITY`, `DAMAGE`, both or neither.
    """
    shown = after.get(attribute, "none")
    old = before.get(attribute, "none")
    core = DONE if shown == asked else UNDONE if shown == old else HALF
    names = [a.name for a in ATTRIBUTES[category] if a.name != attribute]
    changed = [n for n in names if before.get(n, "none") != after.get(n, "none")]
    changed += [name for name in (IDENTITY, DAMAGE) if name in broken]
    weight = sum(_WEIGHTS.get(name, 1) for name in changed)
    score = {DONE: 5 - min(weight, 2), HALF: 3 - min(weight, 1), UNDONE: 1}[core]
    lines = [f"{say('', attribute)} {say(attribute, asked)}: {say(attribute, shown)} {say(attribute, old)} {core}"]
    for name in names:
        values = f"{say(name, before.get(name, 'none'))} {say(name, after.get(name, 'none'))}"
        lines.append(f"{say('', name)}: {values} {CHANGED if name in changed else KEPT}")
    lines.append(f"{IDENTITY}: {' '.join(looks)} {CHANGED if IDENTITY in changed else KEPT}")
    rest = " and ".join(say("", name) for name in changed) or "nothing"
    return Judgement(score=score, reasoning=", ".join((*lines, f"{CHANGED} {rest}")))


def judge_damage(kinds: Sequence[str], grade: int) -> Judgement:
    """Name the damage and grade the picture.

    The reasoning names kinds alone, so that how strong they are is left to the score's own distribution.

    Args:
        kinds: of damage; empty for a sound picture.
        grade: 0 (none) to 4 (wrecked).
    """
    assert 0 <= grade <= 4, grade
    return Judgement(score=5 - grade, reasoning=f"damage: {' and '.join(kinds) or 'none'}")
