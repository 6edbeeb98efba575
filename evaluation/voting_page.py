"""The pages of `evaluation.voting`: plain HTML without scripts, names or prompt ids."""

from __future__ import annotations

from html import escape

from evaluation.ballot import VOTES

_STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 960px; padding: 24px 16px; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; line-height: 1.35; margin: 0 0 4px; text-wrap: balance; }
p { margin: 0 0 16px; opacity: 0.75; }
.images { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
.images img, .source img { display: block; width: 100%; border-radius: 6px; image-rendering: pixelated; }
.source { max-width: 200px; margin: 0 0 16px; }
figure { margin: 0; } figcaption { font-size: 0.85rem; opacity: 0.75; }
form { display: grid; grid-template-columns: 1fr auto 1fr; gap: 12px; margin-top: 16px; }
button { font: inherit; padding: 14px 8px; border: 1px solid #8886; border-radius: 8px; cursor: pointer; }
button:hover, button:focus-visible { border-color: currentColor; }
@media (max-width: 480px) { form { gap: 8px; } button { padding: 14px 4px; } }
"""


def voting_page(*, token: str, prompt: str, left: int, source: bool) -> str:
    """The page of one battle.

    Args:
        token: the battle's keyed name.
        prompt: what both images were asked for; for edits, the instruction.
        left: battles that are left, this one included.
        source: whether there is a source image to show.
    """
    shown = (
        f'<figure class="source"><img src="/image/{token}/source" alt="source"><figcaption>before</figcaption></figure>'
        if source
        else ""
    )
    buttons = "".join(
        f'<button name="vote" value="{value}" accesskey="{key}">{escape(text)}</button>'
        for (value, text), key in zip(VOTES.items(), "123", strict=True)
    )
    return _page(
        f"<h1>{escape(prompt)}</h1><p>Which image is the better answer? {left} to go.</p>{shown}"
        f'<div class="images"><img src="/image/{token}/left" alt="left image">'
        f'<img src="/image/{token}/right" alt="right image"></div>'
        f'<form method="post" action="/vote"><input type="hidden" name="battle" value="{token}">{buttons}</form>'
    )


def done_page(votes: int) -> str:
    """The page when nothing is left to vote on."""
    return _page(f"<h1>Done</h1><p>Every pair has a vote ({votes}). Thank you; this page can be closed.</p>")


def _page(body: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Which is better?</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )
