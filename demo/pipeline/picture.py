"""The boxes of the report's pipeline picture."""

from __future__ import annotations

from demo.pipeline.models import STUDENT, TEACHERS, VERIFIER
from flow_rl.evaluation import Box

_CHAIN = (
    Box(name="base", note="pretrained, shipped", row=0),
    Box(name="vlm", note="pretrained, shipped", row=0),
    Box(name="reward models", note="one VLM, tuned on annotations", row=1, after=["base", "vlm"]),
    Box(name="curation", note="prompts whose scores differ", row=2, after=["reward models"]),
    Box(name="weights", note="of rewards, by category", row=2, after=["reward models"]),
)
_STUDENT = Box(name=STUDENT, note="distilled, drawn without guidance", row=4, after=list(TEACHERS.values()))


def boxes(*, whole: bool, upper_bound: bool) -> list[Box]:
    """What was made from what.

    Args:
        whole: the whole recipe, or a verifier-rewarded text-to-image teacher alone.
        upper_bound: also the verifier-rewarded teachers.
    """
    if not whole:
        return [_CHAIN[0], Box(name=f"t2i_teacher{VERIFIER}", note="guided RL on prompts", row=1, after=["base"])]
    after = ["curation", "weights"]
    trained = [
        Box(name="t2i_teacher", note="guided RL on prompts", row=3, after=after),
        Box(name="mix_rl", note="guided RL on both", row=3, after=after, baseline=True),
        Box(name="edit_teacher", note="guided RL on edits", row=3, after=after),
    ]
    verifier = [
        Box(name=f"{teacher}{VERIFIER}", note="rewarded by verifiers", row=5, baseline=True)
        for teacher in (TEACHERS.values() if upper_bound else ())
    ]
    return [*_CHAIN, *trained, _STUDENT, *verifier]
