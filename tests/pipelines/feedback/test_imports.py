"""The folder itself is light: each of its pipelines is imported when it is used."""

import subprocess
import sys


def test_importing_the_folder_imports_nothing_heavy():
    heavy = "{'torch', 'trl', 'transformers', 'datasets'}"
    code = f"import sys, trl_ext.pipelines.feedback; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
