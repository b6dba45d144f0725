"""The code that an export carries is this project's own, and needs nothing of it."""

import ast
import importlib
import sys

from vlm_composer.export.code_files import code_files

ALLOWED = {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names}
ROOMS = ("export.remote_code", "models", "data", "images")


def source_of(name):
    for room in ROOMS:
        try:
            module = importlib.import_module(f"vlm_composer.{room}.{name.removesuffix('.py')}")
        except ModuleNotFoundError:
            continue
        assert module.__file__ is not None
        with open(module.__file__, encoding="utf-8") as file:
            return file.read()
    raise AssertionError(name)


def without_imports(source):
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
    return ast.dump(tree)


def test_it_holds_the_modules_that_were_trained():
    assert {"resampler.py", "projector.py", "connector.py", "template.py"} <= code_files().keys()


def test_copies_differ_from_their_sources_in_imports_alone():
    for name, copy in code_files().items():
        assert without_imports(copy) == without_imports(source_of(name)), name


def test_copies_import_each_other_and_what_every_transformers_has():
    files = code_files()
    for name, copy in files.items():
        for node in ast.walk(ast.parse(copy)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED, name
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                top = node.module.partition(".")[0]
                assert top in ALLOWED if node.level == 0 else f"{top}.py" in files, name
