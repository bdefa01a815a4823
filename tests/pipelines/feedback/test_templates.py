"""Prompt templates: what is checked when they are read, and what they render."""

import pytest

from trl_ext.pipelines.feedback.templates import FOLDER, PromptTemplate


def test_a_text_and_a_file_render_the_same(tmp_path):
    text = "Tasks:\n{% for task in tasks %}\n{{ loop.index }}. {{ task }}\n{% endfor %}\n"
    path = tmp_path / "list.jinja"
    path.write_text(text)
    for source in (text, path, str(path)):
        template = PromptTemplate.read(source, needed={"tasks"})
        assert template.render(tasks=["add", "sort"]) == "Tasks:\n1. add\n2. sort\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{# no field #} Tell me.", "does not use the field 'prompt'"),
        ("{{ prompt }} {{ answer }}", "uses the field 'answer'"),
        ("{{ prompt }}\n{% if %}", "line 2, is not valid Jinja"),
    ],
)
def test_a_wrong_template_is_refused_when_it_is_read(text, said):
    with pytest.raises(ValueError, match=said):
        PromptTemplate.read(text, needed={"prompt"}, optional={"rubric"})


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        PromptTemplate.read(tmp_path / "none.jinja", needed=())


def test_a_template_of_the_user_reaches_nothing_of_python():
    template = PromptTemplate.read("{{ prompt.__class__.__mro__ }}", needed={"prompt"})
    with pytest.raises(Exception, match="unsafe"):
        template.render(prompt="x")


def test_the_templates_of_the_package_are_packaged():
    import tomllib

    root = FOLDER.parents[3]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["trl_ext"]
    assert packaged == ["**/*.jinja"]
