"""Rows of any columns as questions and answers, by the task's keys `question` and `answer`."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from llm.errors import UserError
from tasks.base import RowReader

KEPT = ("subject", "keywords")  # columns that a row keeps under their own names


def as_text(value: str | int | float) -> str:
    """Return a value of a table as text; a whole number stored as a fraction stands without it: 145.0 is 145."""
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return str(value)


class Columns:
    """The rule that makes {question, answer} of a row: one template for each, such as "{Body} {Question}".

    A name in braces is a column, with dots a field inside it (`{answers.text.0}`); `{{` is a brace. key: the task's
    place in the config, which errors name.
    """

    def __init__(self, question: str, answer: str, key: str):
        self.key, self.templates = key, {}
        for name, template in (("question", question), ("answer", answer)):
            try:
                self.templates[name] = list(Formatter().parse(str(template)))
            except ValueError as error:
                raise UserError(f"{key}.{name}={template}: {error}; a single brace is written {{{{ or }}}}") from None
            if all(not column for _, column, _, _ in self.templates[name]):
                raise UserError(f"{key}.{name}={template}: names no column; write {{column}} where its value belongs")

    @classmethod
    def of(cls, spec: Mapping[str, Any], key: str) -> "Columns | None":
        """Return the rule of a task's configuration, None if it has none. Raises UserError for half a rule."""
        question, answer = spec.get("question"), spec.get("answer")
        if question is None and answer is None:
            return None
        if question is None or answer is None:
            given, missing = ("answer", "question") if question is None else ("question", "answer")
            raise UserError(f"{key}.{given}={spec[given]}: give {key}.{missing} too, as both make the row")
        return cls(question, answer, key)

    def read(self, row: Any, where: str) -> dict:
        """Return the question and answer of a row. Raises UserError, beginning with `where`, for a missing column."""
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: a row must be an object with columns, found {type(row).__name__}")
        made = {name: self._filled(name, row, where) for name in self.templates}
        return {name: row[name] for name in KEPT if row.get(name) is not None} | made

    def _filled(self, name: str, row: Mapping, where: str) -> str:
        pieces = []
        for text, column, form, _ in self.templates[name]:
            pieces.append(text)
            if column is not None:
                value = self._value(name, column, row, where)
                try:
                    pieces.append(format(value, form) if form else as_text(value))
                except ValueError as error:
                    raise UserError(f"{where}: {self.key}.{name}: {{{column}:{form}}}: {error}") from None
        return "".join(pieces).strip()

    def _value(self, name: str, column: str, row: Mapping, where: str) -> Any:
        value: Any = row
        for step in [column] if column in row else column.split("."):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif _is_list(value) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise UserError(f"{where}: {self.key}.{name} names {column!r}, which is not there ({', '.join(row)})")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            found = "nothing" if value is None else type(value).__name__
            raise UserError(f"{where}: {self.key}.{name}: {column!r} must be text or a number, found {found}")
        return value


class ColumnReader:
    """Reader of rows of other columns: `columns` makes questions and answers, which the type's own reader reads."""

    def __init__(self, columns: Columns, reader: RowReader):
        self._columns, self._reader, self.may_drop = columns, reader, reader.may_drop

    def read(self, row: Any, where: str) -> dict:
        """Return the row in the form that the task takes. Raises UserError, beginning with `where`, or Dropped."""
        return self._reader.read(self._columns.read(row, where), where)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
