"""The demo's shipped networks: three independent sets, and how their weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar, get_args

from safetensors.torch import load_file
from torch import nn

VerifierName = Literal["annotator", "judge", "monitor"]
ASSETS = Path(__file__).parents[1] / "assets"
Network = TypeVar("Network", bound=nn.Module)


def check_name(name: str) -> None:
    """Refuse a set that does not exist.

    Raises:
        ValueError: naming the sets there are.
    """
    if name not in get_args(VerifierName):
        raise ValueError(f"Unknown verifier {name!r}, expected one of {list(get_args(VerifierName))}.")


def load_weights(network: Network, file: str) -> Network:
    """The network with the weights of a shipped file, in evaluation mode and frozen.

    Raises:
        FileNotFoundError: when they have not been trained.
    """
    path = ASSETS / file
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: train it with `python -m demo.making.train_judge`, or for the other sets with "
            "`python -m demo.making.train_verifiers`."
        )
    network.load_state_dict({key: value.float() for key, value in load_file(path).items()}, strict=True)
    return network.eval().requires_grad_(False)
