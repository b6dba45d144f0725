"""The public names are there, cost nothing before they are used, and do what docs/ says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_composer

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_there_and_documented():
    for name in vlm_composer.__all__:
        assert getattr(vlm_composer, name).__doc__
        assert name in vlm_composer.__doc__
        assert name in dir(vlm_composer)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vlm_composer.nothing  # noqa: B018


def test_importing_the_library_imports_nothing_heavy():
    code = (
        "import sys, vlm_composer; "
        "print({'torch', 'transformers', 'composer', 'streaming'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_importing_the_trainer_leaves_torchs_compiler_alone():
    """Which takes almost as long as the rest, and starts processes; not every run needs it."""
    code = "import sys, vlm_composer.train; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_script_of_the_page_captions_a_picture(qwen_export, tmp_path, monkeypatch, capsys):
    section = (ROOT / "docs/export.md").read_text()
    (script,) = re.findall(r"```python\n(from vlm_composer .*?)```", section, re.DOTALL)
    assert len(script.splitlines()) <= 20
    (tmp_path / "export").symlink_to(qwen_export.folder)
    (tmp_path / "picture.jpg").write_bytes(qwen_export.pictures[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "export.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 1
