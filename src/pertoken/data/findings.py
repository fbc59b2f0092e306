"""What is worth a word about rows: of each kind how many there are, and where the first ones stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from pertoken.text import one_line

__all__ = ["KINDS", "Findings", "Kind"]

_PLACES = 20  # of each kind that are kept
_SHOWN = 3


@dataclass(frozen=True)
class Kind:
    """One way in which a row is other than its author may think. One of them is one line of `KINDS`."""

    what: str  # "{count} conversation{s} ...", with the remedy where there is one; of a verb, "{v}" is the s for one
    harms: bool  # whether what is trained is not what the row says: then `pertoken audit` exits with 1

    def said(self, count: int | str, listed: str = "") -> str:
        """With the number in it; a text, as N, stands for several."""
        one = count == 1
        number = count if isinstance(count, str) else f"{count:,}"
        forms = {"s": "" if one else "s", "v": "s" if one else "", "are": "is" if one else "are"}
        return self.what.format(count=number, listed=listed, **forms)


KINDS: dict[str, Kind] = {
    "skipped": Kind("{count} bad row{s} skipped{listed}", harms=True),
    "overlong": Kind(
        "{count} conversation{s} longer than data.max_seq_len dropped; raise it, or set data.overlong", harms=True
    ),
    "truncated": Kind("{count} conversation{s} cut to data.max_seq_len", harms=True),
    "unsupervised": Kind("{count} conversation{s} without a supervised token dropped", harms=True),
    "too_short": Kind("{count} document{s} of a single token dropped", harms=True),
    "split": Kind(
        "{count} conversation{s} become{v} several samples, since the chat template renders turns differently later "
        "(data.on_rewrite)",
        harms=False,
    ),
    "split_tokens": Kind("{count} token{s} of context {are} repeated in other samples", harms=False),
    "empty_thinking": Kind("{count} turn{s} learn{v} to write an empty thinking block", harms=False),
    "empty_thinking_avoidable": Kind(
        "{count} turn{s} learn{v} to write an empty thinking block; data.template_kwargs.enable_thinking=false makes "
        "it part of the prompt",
        harms=False,
    ),
    "typed_as_text": Kind("{count} control token{s} typed in the data, encoded as plain text", harms=False),
    "typed_as_special": Kind('{count} control token{s} typed in the data; data.special_in_text="special"', harms=False),
    "rendered_before": Kind(
        "{count} conversation{s} with a message that begins with the chat template's own header, so that it was "
        'rendered before; split it into messages, or set stage="pretrain" and data.special_in_text="special"',
        harms=True,
    ),
    "rendered_document": Kind(
        "{count} document{s} begin{v} with a control token that is encoded as plain text; where a chat template "
        'rendered the text, set data.special_in_text="special"',
        harms=True,
    ),
    "ends_with_eos": Kind("{count} document{s} end{v} with the eos token, so none is added", harms=False),
    "unknown_rows": Kind("{count} row{s} with characters that the tokenizer lacks; choose another one", harms=True),
    "unknown_tokens": Kind("{count} token{s} that stand{v} for such characters", harms=False),
    "weighted": Kind("{count} conversation{s} with weights on messages", harms=False),
    "calls": Kind("{count} conversation{s} with tool calls", harms=False),
    "end_not_supervised": Kind(
        "{count} answer{s} whose end is not supervised, so that the model does not learn to stop", harms=True
    ),
    "empty_answer": Kind("{count} empty answer{s}, so that the model learns to say nothing", harms=True),
    "duplicate": Kind("{count} row{s} that {are} there already, byte for byte", harms=False),
    "in_both": Kind("{count} row{s} of the evaluation data that {are} training data too", harms=False),
    "roles_out_of_order": Kind(
        "{count} conversation{s} with two messages of the user, or two of the assistant, one after the other",
        harms=False,
    ),
    "assistant_first": Kind("{count} conversation{s} that begin{v} with the assistant", harms=False),
    "empty_message": Kind("{count} conversation{s} with an empty message of the user or the system", harms=False),
    "replacement_characters": Kind(
        "{count} row{s} with the replacement character U+FFFD, which stands for text that was lost before", harms=True
    ),
    "crlf": Kind(
        '{count} text file{s} with Windows line ends (CRLF), read as newlines; data.newlines = "keep" keeps them',
        harms=False,
    ),
}


@dataclass
class _Found:
    count: int
    places: list[tuple[int, int]]  # (index into the files, line) of the first


class Findings:
    """Counted by kind. The first 20 places of each are kept, in the order of the rows, however they are split."""

    def __init__(self) -> None:
        self._found: dict[str, _Found] = {}

    def add(self, kind: str, file: int, line: int, count: int = 1) -> None:
        """`kind` is a key of KINDS, `file` an index into the files."""
        assert kind in KINDS, kind
        found = self._found.setdefault(kind, _Found(0, []))
        found.count += count
        if len(found.places) < _PLACES and (file, line) not in found.places:
            found.places.append((file, line))

    def extend(self, later: Findings) -> None:
        """Add what was found in the rows that follow."""
        for kind, of_later in later._found.items():
            found = self._found.setdefault(kind, _Found(0, []))
            found.count += of_later.count
            found.places += of_later.places[: _PLACES - len(found.places)]

    def count(self, kind: str) -> int:
        return self._found[kind].count if kind in self._found else 0

    def places(self, kind: str) -> list[tuple[int, int]]:
        """(index into the files, line) of the first 20."""
        return list(self._found[kind].places) if kind in self._found else []

    def to_json(self) -> dict[str, Any]:
        return {kind: list(astuple(found)) for kind, found in self._found.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Findings:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        findings = cls()
        for kind, (count, places) in values.items():
            findings._found[kind] = _Found(int(count), [(int(file), int(line)) for file, line in places])
        return findings

    def kinds(self) -> list[str]:
        """Those that were found, in the order of KINDS."""
        return [name for name in KINDS if name in self._found]

    def said(self, kind: str, *, listed_in: str | None = None) -> str:
        """What was found of a kind, without the places. `listed_in`: the file of the skipped rows."""
        listed = f", listed in {listed_in}" if listed_in else ""
        return KINDS[kind].said(self.count(kind), listed)

    def notes(self, files: Sequence[str], *, listed_in: str | None = None) -> list[str]:
        """One line for each kind, in the order of KINDS, with the first places."""
        notes = []
        for kind in self.kinds():
            places = self.places(kind)[:_SHOWN]
            more = ", ..." if self.count(kind) > len(places) else ""
            notes.append(one_line(f"{self.said(kind, listed_in=listed_in)} ({_shown(places, files)}{more})"))
        return notes


def _shown(places: Sequence[tuple[int, int]], files: Sequence[str]) -> str:
    """`file:line`, and of a file that was named just before the line alone."""
    before = [None, *(file for file, _ in places)]
    return ", ".join(
        str(line) if file == named else f"{files[file]}:{line}"
        for named, (file, line) in zip(before, places, strict=False)
    )
