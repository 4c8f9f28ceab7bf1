"""What the documents say exists, exists; what they show, happens."""
import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest

from gpucnn import reference

ROOT = Path(__file__).resolve().parents[1]
ARTICLE = ROOT / "docs" / "article.md"
# `path/to/file.py` `name`, `Class.method`
_REFERENCE = re.compile(r"`([\w/]+\.(?:py|cu|cuh|md))`((?:,? `[\w.]+`)*)")


def named_places() -> list[tuple[str, str]]:
    """(file, name) of all that docs/article.md names; the name is "" where it names a file."""
    places = []
    for file, names in _REFERENCE.findall(ARTICLE.read_text(encoding="utf-8")):
        names = re.findall(r"`([\w.]+)`", names)
        places += [(file, name) for name in names] or [(file, "")]
    return sorted(set(places))


def names_in(file: Path) -> set[str]:
    """What a file defines: functions, classes, methods and constants, or __global__ kernels."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return set(re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", text))
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


@pytest.mark.parametrize(("file", "name"), named_places())
def test_each_place_named_in_the_article_table_exists(file, name):
    assert (ROOT / file).is_file()
    assert not name or name in names_in(ROOT / file)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *(
    f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_files_and_functions_that_a_document_names_exist(document):
    """`kernels/x.cu`, `backend/x.py`, a bare `x.cu`; `module.name` of gpucnn/module.py."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for file in re.findall(r"`([\w/]+\.(?:py|cuh?|md))`", text):
        assert any((ROOT / folder / file).is_file() for folder in
                   (".", "gpucnn", "gpucnn/layers", "kernels", "scripts")), file
    for module, name in re.findall(r"`(\w+)\.(\w+)[(`]", text):
        file = ROOT / "gpucnn" / f"{module}.py"
        assert not file.is_file() or name in {*names_in(file), "py", "toml"}, f"{module}.{name}"


def test_the_table_has_a_plain_and_a_fast_place_for_each_formula():
    table = ARTICLE.read_text(encoding="utf-8").split("## Formulas")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) > 20
    for formula, *places in rows[2:]:
        if not formula.startswith("**"):
            cells = [cell for cell in places if cell]
            assert len(places) == 2, formula
            assert cells, formula
            for cell in cells:  # nothing in it but places
                assert not _REFERENCE.sub("", cell).strip(", "), formula


def test_the_table_leaves_out_no_public_function_of_the_reference():
    """im2col, col2im, the other optimisers and hits are no formulas of the article; zero_pad is a
    step of one."""
    public = {name for name, value in vars(reference).items() if inspect.isfunction(value)
              and value.__module__ == reference.__name__ and not name.startswith("_")}
    named = {name for file, name in named_places() if file == "gpucnn/reference.py"}
    assert public - named == {"im2col", "col2im", "zero_pad", "hits", "momentum", "rms_prop",
                              "adam", "clip", "loss_scale"}


def test_the_examples_give_what_they_show():
    failed, tried = doctest.testfile(str(ARTICLE), module_relative=False, encoding="utf-8")
    assert tried > 5
    assert failed == 0
