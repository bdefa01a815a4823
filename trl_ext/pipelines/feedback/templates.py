"""Prompt templates: Jinja texts in files, which you can replace by your own.

The templates of the package are in the folder `templates` beside this file. A template is checked when it is read: it
must use the fields that it needs, and it may use only fields that it gets. This module does not know what a prompt is
for.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment


FOLDER = Path(__file__).parent / "templates"

# As in the chat templates of Transformers: a line with only a tag leaves nothing, and templates cannot change values.
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@dataclass(frozen=True)
class PromptTemplate:
    """
    A prompt with fields, in Jinja.

    Args:
        name (`str`): its name in errors.
        text (`str`): the template. It belongs in the cache key of everything that is generated with it.

    Example:

    ```python
    >>> PromptTemplate.read("Question: {{ prompt }}", needed={"prompt"}).render(prompt="2 + 2?")
    'Question: 2 + 2?'
    ```
    """

    name: str
    text: str

    @classmethod
    def read(
        cls, source: str | Path, *, needed: Collection[str], optional: Collection[str] = (), name: str | None = None
    ) -> "PromptTemplate":
        """
        Read a template, and check its fields.

        Args:
            source (`str` or `Path`): the path of a file, or the template itself: a text with a brace.
            needed (collection of `str`): fields that the template must use.
            optional (collection of `str`, *optional*): fields that it may use too.
            name (`str`, *optional*): its name in errors; defaults to that of the file.

        Raises:
            ValueError: the template is not valid Jinja, lacks a field that it needs, or uses one that it does not get.
            FileNotFoundError: there is no such file.
        """
        is_text = isinstance(source, str) and "{" in source
        name = name or ("The template" if is_text else str(source))
        text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
        known = ", ".join(sorted({*needed, *optional}))
        try:
            used = meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
        except TemplateSyntaxError as error:
            raise ValueError(f"{name}, line {error.lineno}, is not valid Jinja: {error.message}.") from error
        missing, unknown = sorted(set(needed) - used), sorted(used - {*needed, *optional})
        if missing:
            raise ValueError(
                f"{name} does not use the field {missing[0]!r}. Needed: {{{{ {missing[0]} }}}} somewhere in the text."
            )
        if unknown:
            raise ValueError(f"{name} uses the field {unknown[0]!r}, which it does not get. Its fields are: {known}.")
        return cls(name, text)

    def render(self, **fields: Any) -> str:
        """Fill in the fields. The line feed at the end of the file is not part of the prompt."""
        return self._template.render(**fields)

    @cached_property
    def _template(self) -> Template:
        return _ENVIRONMENT.from_string(self.text)
