"""A diagnosis, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nnxp._printed import Printed, beside
from nnxp.doctor.facts import Facts
from nnxp.doctor.problems import Problem


@dataclass(frozen=True)
class Diagnosis(Printed):
    """The facts by section and name, what could not be found out, and the problems."""

    facts: Facts
    unknown: dict[str, str]
    problems: tuple[Problem, ...]

    @property
    def broken(self) -> bool:
        """Whether something that was asked for does not work."""
        return any(problem.severity == "broken" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a fact that could not be found out is None, and in `unknown`."""
        problems = [asdict(problem) for problem in self.problems]
        return {"ok": not self.broken, "problems": problems, **self.facts, "unknown": self.unknown}

    def __str__(self) -> str:
        width = max(len(name) for facts in self.facts.values() for name in facts) + 4
        lines = []
        for section, facts in self.facts.items():
            lines.append(section if facts else f"{section}: nothing set")
            for name, value in facts.items():
                missing = self.unknown.get(f"{section}.{name}")
                text = f"could not be found out ({missing})" if missing else in_words(value)
                lines.append(beside(f"  {name}", text, width))
        lines.append("problems" if self.problems else "problems: none")
        for problem in self.problems:
            lines.append(beside(f"  {problem.severity}", problem.what, 10))
            # A command is one for the shell, however many lines it has; a sentence needs nothing.
            sentence = problem.fix[:1].isupper()
            lines.append(beside("  fix", problem.fix, 10, "" if sentence else " \\"))
        return "\n".join(lines)


def in_words(value: Any) -> str:
    """A fact as one reads it."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, list):
        return ", ".join(value)
    if not isinstance(value, dict):
        return str(value)
    if "ok" not in value:
        return "; ".join(f"{name} {in_words(part)}" for name, part in value.items())
    shown = ("ok", "reason", "hint", "asked", "backend", "device", "count", "name")
    more = [f"{name} {part}" for name, part in value.items() if name not in shown]
    return ", ".join([("" if value["ok"] else "not usable: ") + value["reason"], *more])
