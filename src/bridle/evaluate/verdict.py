"""From figures to plain words: does the control steer?

The rule. With fewer than five pairs, or where the ceiling is not clearly better than the pictures without control,
the measure cannot tell. Otherwise the pictures do not follow the hints unless the gain is clear; they follow them in
part if less than half of the room is reached, and follow them if half or more is. "Clear" means a paired mean
difference of more than two of its standard errors. What is better makes a difference above zero, also where lower
figures are.
"""

from typing import Literal

from bridle.evaluate.result import Comparison, Evaluation, Mean

ENOUGH_PAIRS = 5  # below this, two standard errors are reached by chance too often (one in seven with two pairs)
CLEAR_ERRORS = 2.0
FOLLOWS_AT = 0.5

Verdict = Literal["follow", "in part", "do not follow", "unclear"]


def rule(bound: str) -> str:
    """The rule in words. bound: what the ceiling is called."""
    return (
        f"The rule: at least {ENOUGH_PAIRS} pairs, and a {bound} clearly better than the pictures without control, or "
        "nothing is concluded. The pictures follow the hints when the control's gain is clear and reaches "
        f"{FOLLOWS_AT:.0%} of the way to the {bound}; in part when it is clear but smaller; otherwise they do not. "
        f"Clear means that the mean difference over pairs exceeds {CLEAR_ERRORS:.0f} of its standard errors."
    )


def judge(evaluation: Evaluation) -> Verdict:
    """Apply the rule above to the measure that the condition goes by."""
    comparison = evaluation.headline
    if len(evaluation.pairs) < ENOUGH_PAIRS or not _is_clear(comparison.room) or comparison.reached is None:
        return "unclear"
    if not _is_clear(comparison.gain):
        return "do not follow"
    return "follow" if comparison.reached >= FOLLOWS_AT else "in part"


def sentence(evaluation: Evaluation) -> str:
    """The verdict and the figures behind it, as one sentence."""
    comparison, measure = evaluation.headline, evaluation.deciding
    say = measure.text
    figures = (
        f"{measure.words} {say(comparison.control.mean)} with the control, {say(comparison.without.mean)} without; "
        f"the {measure.bound} is {say(comparison.ceiling.mean)}{' (lower is better)' * measure.lower_is_better}"
    )
    return f"{_claim(evaluation, comparison)}: {figures}."


def _claim(evaluation: Evaluation, comparison: Comparison) -> str:
    verdict = judge(evaluation)
    if verdict == "follow":
        return "The pictures follow the hints"
    if verdict == "in part":
        return "The pictures follow the hints only in part"
    if verdict == "do not follow":
        worse = _is_clear(Mean(mean=-comparison.gain.mean, error=comparison.gain.error))
        return "The pictures do not follow the hints" + (", and are further from them than without control" * worse)
    if len(evaluation.pairs) < ENOUGH_PAIRS:
        count = len(evaluation.pairs)
        return f"Too few pairs ({count}) to say whether the pictures follow the hints"
    bound = evaluation.deciding.bound
    return f"This measure cannot say whether the pictures follow the hints, as its {bound} is no better than no control"


def _is_clear(difference: Mean) -> bool:
    return difference.error is not None and difference.mean > CLEAR_ERRORS * difference.error
