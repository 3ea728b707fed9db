"""Whether this process lives and is ready: named conditions that parts of it set, answered on /health and /ready."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Health:
    """alive: the event loop turns (whoever asks gets an answer at all). ready: started, not draining, and every
    condition holds.
    """

    started: bool = False
    draining: bool = False
    _conditions: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, problem: str = "") -> None:
        """States a condition: `problem` empty when it holds, else a few words such as "database unreachable"."""
        self._conditions[name] = problem

    def problems(self) -> dict[str, str]:
        """Name -> problem, of conditions that do not hold."""
        found = {name: problem for name, problem in self._conditions.items() if problem}
        if not self.started:
            found["start"] = "starting"
        if self.draining:
            found["drain"] = "draining"
        return found

    @property
    def ready(self) -> bool:
        """Whether new work should come here."""
        return not self.problems()
