"""What decides where and how fast nnxp runs here, what is wrong with it, and what fixes it.

First facts are found, each on its own, so that a question without an answer takes no other with
it. Then the problems are read off the facts alone. Then both are put into words.
"""

from __future__ import annotations

from nnxp.doctor.facts import find
from nnxp.doctor.problems import Problem, problems_in
from nnxp.doctor.words import Diagnosis

__all__ = ["Diagnosis", "Problem", "diagnose", "problems_in"]


def diagnose(backend: str = "auto") -> Diagnosis:
    """Everything that decides where and how fast nnxp runs in this process, and what is wrong.

    `backend` is a name as for `nnxp.get_backend`; one that cannot be used is a problem. Looks at
    CUDA even if NNXP_BACKEND=numpy says not to use it. Never raises.
    """
    facts, unknown = find(backend)
    return Diagnosis(facts, unknown, problems_in(facts))
