"""`python -m flow_rl.evaluation.rate_battles FILE...`: ratings of the battles in files, whoever judged them."""

from __future__ import annotations

import argparse
from pathlib import Path

from flow_rl.evaluation.arena import Rating, expected_win_rate
from flow_rl.evaluation.battles import rate, rate_by_category, read_battles


def main(args: list[str] | None = None) -> None:
    """Print ratings over everything, expected win rates, and ratings by category."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON Lines files of battles or votes")
    given = parser.parse_args(args)
    try:
        battles = [battle for path in given.files for battle in read_battles(path)]
        names = list(dict.fromkeys(name for b in battles for name in (b.first, b.second)))
        ratings = rate(battles, names=names)
        print(f"{len(battles)} battles on {len({b.prompt for b in battles})} prompts\n\n{_table(ratings)}")
        strongest = max(ratings, key=lambda name: ratings[name].elo)
        for name in ratings:
            if name != strongest:
                expected = expected_win_rate(ratings[strongest].elo - ratings[name].elo)
                print(f"{strongest} is expected to win {expected:.1%} of its battles with {name}")
        categories = list(dict.fromkeys(b.category for b in battles))
        if len(categories) > 1:
            for category, found in rate_by_category(battles, names=names).items():
                print(f"\n{category}\n{_table(found)}")
    except ValueError as error:
        parser.error(str(error))


def _table(ratings: dict[str, Rating]) -> str:
    width = max(map(len, ratings))
    ordered = sorted(ratings.items(), key=lambda item: -item[1].elo)
    return "\n".join(f"{name:<{width}}  {r.elo:7.1f}  [{r.low:.1f}, {r.high:.1f}]" for name, r in ordered)


if __name__ == "__main__":
    main()
