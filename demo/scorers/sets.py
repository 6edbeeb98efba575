"""The three shipped sets of verifiers and quality scores: annotator, judge and monitor.

Annotator and monitor differ in renders, seeds and widths. The judge has networks of its own.
"""

from __future__ import annotations

from demo.scorers.convolutional_quality import ConvolutionalQuality
from demo.scorers.convolutional_reader import ConvolutionalReader
from demo.scorers.judge_quality import JudgeQuality
from demo.scorers.judge_reader import JudgeReader
from demo.scorers.quality import QualityScore
from demo.scorers.verifiers import Verifier
from demo.scorers.weights import VerifierName, check_name, load_weights

#: channels of the networks
VERIFIER_WIDTHS: dict[str, int] = {"annotator": 32, "judge": 32, "monitor": 26}
QUALITY_WIDTHS: dict[str, int] = {"annotator": 24, "judge": 24, "monitor": 20}


def load_verifier(name: VerifierName) -> Verifier:
    """The shipped verifier ``"annotator"``, ``"judge"`` or ``"monitor"``, in evaluation mode.

    Raises:
        ValueError: for another name.
        FileNotFoundError: when its weights have not been trained.
    """
    check_name(name)
    network = JudgeReader if name == "judge" else ConvolutionalReader
    return load_weights(network(width=VERIFIER_WIDTHS[name]), f"{name}.safetensors")


def load_quality(name: VerifierName) -> QualityScore:
    """The shipped quality score ``"annotator"``, ``"judge"`` or ``"monitor"``, in evaluation mode.

    Raises:
        ValueError: for another name.
        FileNotFoundError: when its weights have not been trained.
    """
    check_name(name)
    network = JudgeQuality if name == "judge" else ConvolutionalQuality
    return load_weights(network(width=QUALITY_WIDTHS[name]), f"quality-{name}.safetensors")
