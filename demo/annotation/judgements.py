"""The demo's annotators: what a rubric of `demo/rubrics` says of an image whose content is known.

Nobody was asked. What an image shows is known exactly (it was rendered so) or is the trained annotator's verdict
(it was sampled); these rules turn that into the score and the reasoning that a person following the rubric would
write down. They stand in for human annotation.

A score is a mean, as the mean of several people's scores is: where the annotator is not certain of what an image
shows, the score lies between those of the readings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from demo.world.captions import Request
from demo.world.vocabulary import ATTRIBUTES

YES, NO, MISSING = "yes", "no", "missing"
DONE, HALF, UNDONE = "done", "half", "undone"
KEPT, CHANGED = "kept", "changed"
#: stands for everything unnamed that makes this person or plant that one
IDENTITY = "identity"
#: an edit that also broke the picture
DAMAGE = "damage"
_WEIGHTS = {IDENTITY: 2}
_DECIMALS = 2


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One annotation.

    Attributes:
        score: in [1, 5].
        reasoning: what the rubric asks for, without the score.
    """

    score: float
    reasoning: str


def say(name: str, value: str) -> str:
    """An attribute's name or value in words."""
    return " ".join(value) if name == "text" else value.replace("_", " ")


def judge_alignment(
    request: Request, category: str, attributes: Mapping[str, str], *, certainty: Mapping[str, float] | None = None
) -> Judgement:
    """Compare an image with a prompt, requirement by requirement, in the order of the vocabulary.

    The object comes first: an image of another category scores 1. Otherwise the score is 1 + 4 times the share of the
    requirements that the image meets. A text is one requirement, met by the share of its letters.

    Args:
        request: what the prompt asks for.
        category: what the image shows.
        attributes: of the image; one that is not there counts as "none".
        certainty: for each requested attribute, how likely it is that the image meets it, in [0, 1]; None where the
            attributes are known.
    """
    if category != request.category:
        return Judgement(score=1.0, reasoning=f"object {request.category}: {category} {MISSING}")
    lines, met = [f"object {category}: {category} {YES}"], []
    for attribute in ATTRIBUTES[category]:
        name = attribute.name
        if name not in request.attributes:
            continue
        asked, shown = request.attributes[name], attributes.get(name, "none")
        # Letter by letter: who writes it down compares neighbouring words.
        pairs = list(zip_longest(asked, shown, fillvalue="none")) if name == "text" else [(asked, shown)]
        lines += [f"{say('', name)} {say('', a)}: {say('', b)} {YES if a == b else NO}" for a, b in pairs]
        met.append(sum(a == b for a, b in pairs) / len(pairs) if certainty is None else certainty[name])
    return Judgement(score=round(1 + 4 * sum(met) / len(met), _DECIMALS), reasoning=", ".join(lines))


def judge_edit(
    attribute: str,
    asked: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    *,
    category: str,
    looks: tuple[str, str],
    broken: Sequence[str] = (),
    certainty: Mapping[str, float] | None = None,
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
        certainty: for each attribute of the category, how likely it is that the result shows what it should: the value
            asked for, or the source's; in [0, 1]. None where the attributes are known.
    """
    shown = after.get(attribute, "none")
    old = before.get(attribute, "none")
    core = DONE if shown == asked else UNDONE if shown == old else HALF
    names = [a.name for a in ATTRIBUTES[category] if a.name != attribute]
    changed = [n for n in names if before.get(n, "none") != after.get(n, "none")]
    changed += [name for name in (IDENTITY, DAMAGE) if name in broken]
    if certainty is None:
        certainty = {name: float(name not in changed) for name in names} | {attribute: float(core == DONE)}
    weight = sum(1 - certainty[name] for name in names)
    weight += sum(_WEIGHTS.get(name, 1) for name in (IDENTITY, DAMAGE) if name in broken)
    done = certainty[attribute]
    otherwise = 3 - min(weight, 1) if core == HALF else 1
    score = round(done * (5 - min(weight, 2)) + (1 - done) * otherwise, _DECIMALS)
    lines = [f"{say('', attribute)} {say(attribute, asked)}: {say(attribute, shown)} {say(attribute, old)} {core}"]
    for name in names:
        values = f"{say(name, before.get(name, 'none'))} {say(name, after.get(name, 'none'))}"
        lines.append(f"{say('', name)}: {values} {CHANGED if name in changed else KEPT}")
    lines.append(f"{IDENTITY}: {' '.join(looks)} {CHANGED if IDENTITY in changed else KEPT}")
    rest = " and ".join(say("", name) for name in changed) or "nothing"
    return Judgement(score=score, reasoning=", ".join((*lines, f"{CHANGED} {rest}")))


def judge_damage(kinds: Sequence[str], grade: float) -> Judgement:
    """Name the damage and grade the picture.

    The reasoning names kinds alone, so that how strong they are is left to the score's own distribution.

    Args:
        kinds: of damage; empty for a sound picture.
        grade: 0 (none) to 4 (wrecked).
    """
    assert 0 <= grade <= 4, grade
    return Judgement(score=round(5.0 - grade, _DECIMALS), reasoning=f"damage: {' and '.join(kinds) or 'none'}")
