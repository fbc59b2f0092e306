"""Names of the hub in a recipe, as paths that every rank can read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pertoken.hub.choose import Part
from pertoken.hub.fetch import Fetched, fetch, name_of
from pertoken.tracking.listener import Listener
from pertoken.training.parallel import World

__all__ = ["HubNames"]


@dataclass(frozen=True)
class HubNames:
    """Turns what a recipe names into paths. Every rank asks, in the same order; one of each machine downloads.

    `commits` says which commit each name of the hub means in this run. Those that a resume brings are taken, whatever
    the hub has by now; those of other names are added.
    """

    listener: Listener
    world: World  # whose ranks wait for each other as long as a download may take
    commits: dict[str, str]

    def model(self, text: str, label: str) -> str:
        """A folder with weights and tokenizer; `text` itself where it is a path. Raises ModelError."""
        return self._path(text, "model", label)

    def tokenizer(self, text: str, label: str) -> str:
        """The folder of a tokenizer, without the weights that the hub may have beside it. Raises ModelError."""
        return self._path(text, "tokenizer", label)

    def data(self, paths: Iterable[str], label: str) -> tuple[str, ...]:
        """Paths as `find_files` takes them. Raises DataError."""
        return tuple(self._path(path, "data", label) for path in paths)

    def _path(self, text: str, part: Part, label: str) -> str:
        """Rank 0 says whether it is a name and which commit that means, and downloads it; then one rank of each machine
        that lacks it does."""
        world, tell = self.world, self.listener
        name = world.on_main(lambda: name_of(text, part, label))
        if name is None:
            return text

        def here() -> Fetched:
            commit = self.commits.get(name.source)
            return fetch(name, part, label=label, commit=commit, on_message=tell.message, on_progress=tell.downloading)

        found = world.on_main(here)
        self.commits[name.source] = found.commit
        world.together(lambda: here() if world.local_rank == 0 and not world.is_main else None)
        return world.together(lambda: found if world.is_main else here()).path
