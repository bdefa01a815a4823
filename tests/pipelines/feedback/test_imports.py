"""The folder itself is light: each of its pipelines is imported when it is used."""

import subprocess
import sys


def test_importing_the_folder_imports_nothing_heavy():
    code = "import sys, trl_ext.pipelines.feedback; print(*{'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
