import importlib.util
import pkgutil
import re
import subprocess
import sys

import nanomoe
from nanomoe import errors
from nanomoe.errors import NanomoeError
from nanomoe.tokenizer import TokenizerError


def defined() -> dict[str, type[NanomoeError]]:
    """Every error of the library by its name."""
    without = ("nanomoe.assets", "nanomoe.kernels.__main__")
    if not importlib.util.find_spec("triton"):  # an extra; in CI it is installed
        without += ("nanomoe.training.steps.kernels.",)
    for module in pkgutil.walk_packages(nanomoe.__path__, "nanomoe."):
        if not module.name.startswith(without):
            importlib.import_module(module.name)
    return {kind.__name__: kind for kind in NanomoeError.__subclasses__() if kind.__module__.startswith("nanomoe.")}


def test_the_tree_in_the_docstring_names_every_error_with_its_code_and_its_module() -> None:
    drawn = re.findall(r"[├└]── (\w+) +(\S+) +(\S+)", errors.__doc__ or "")
    found = {(name, getattr(kind, "code", "tokenizer_..."), kind.__module__) for name, kind in defined().items()}
    assert set(drawn) == found


def test_an_error_of_a_tokenizer_has_the_code_that_it_was_made_with() -> None:
    assert TokenizerError("tokenizer_not_found", "no such name").code == "tokenizer_not_found"


def test_the_errors_are_known_without_torch() -> None:
    code = "import sys; import nanomoe.errors, nanomoe.lineage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
