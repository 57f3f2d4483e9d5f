"""No file from outside runs code: what the package may not call, and where it may.

The readers themselves are tested where they are: see tests/RELIABILITY.md.
"""

import ast
import pathlib

import pytest

import t5x_lite

PACKAGE = pathlib.Path(t5x_lite.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# Modules whose readers run what a file says.
MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"),
    *("marshal", "code", "codeop", "xmlrpc"),
}
# Calls by their last name; a dict says which keyword makes one safe.
BUILTINS = ("eval", "exec", "compile", "__import__")
CALLS = {
    "exec_module": None,
    "execfile": None,
    "extractall": None,
    "unpack_archive": None,
    "system": None,
    "popen": None,
    "mktemp": None,
    "read_array": {"allow_pickle": False},
    "fromfile": None,
}
# module.load: the keyword that makes it safe; None = never.
LOADS = {
    "np": {"allow_pickle": False},
    "numpy": {"allow_pickle": False},
    "torch": {"weights_only": True},
    "yaml": None,
    "pickle": None,
    "marshal": None,
}
# (file, what) -> why it is right there.
ALLOWED = {
    ("cli.py", "exec_module"): "config files are Python, as the README says",
    ("studies/grid.py", "exec_module"): "studies are Python, as their docs say",
    ("interop/torch_files.py", "import pickle"): "for the name of an error",
    ("interop/fairseq.py", "import pickle"): "for the name of an error",
    ("data/encoding.py", "import pickle"): "pipes of the processes it starts itself",
    ("data/encoding.py", "pickle.load"): "pipes of the processes it starts itself",
}


def offences(tree: ast.AST) -> set[str]:
    """What a module does that might run code of others."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {(node.module or "").partition(".")[0]}
        else:
            names = set()
        found |= {f"import {name}" for name in names & MODULES}
        if isinstance(node, ast.Call):
            found |= set(call_offences(node))
    return found


def call_offences(node: ast.Call):
    keywords = {
        k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
    }

    def safe(needed) -> bool:
        return needed is not None and all(
            keywords.get(k) == v for k, v in needed.items()
        )

    name, owner = "", ""
    if isinstance(node.func, ast.Name):
        name = node.func.id
    elif isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if isinstance(node.func.value, ast.Name):
            owner = node.func.value.id
    # re.compile and nnx.Module.eval are others.
    bare = isinstance(node.func, ast.Name) or owner == "builtins"
    if name in BUILTINS and bare or name in CALLS and not safe(CALLS[name]):
        yield name
    if name in ("load", "loads") and owner in LOADS and not safe(LOADS[owner]):
        yield f"{owner}.load"
    if keywords.get("shell") or keywords.get("allow_pickle"):
        yield "shell or allow_pickle"


def test_the_package_runs_no_code_of_others():
    found = {}
    for path in FILES:
        name = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
        for offence in offences(ast.parse(path.read_text())):
            found[str(name), offence] = path
    assert set(found) == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.hashing",
        "eval(text)",
        "builtins.exec(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, mmap_mode='r')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "tar.extractall(folder)",
        "np.save(path, x, allow_pickle=True)",
        "loader.exec_module(module)",
    ],
)
def test_the_search_finds(source):
    assert offences(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
        "json.loads(text)",
        "re.compile(text)",
        "jitted.lower(x).compile()",
        "ast.literal_eval(text)",
        "subprocess.run([a, b], check=True)",
    ],
)
def test_the_search_leaves_alone(source):
    assert not offences(ast.parse(source))


@pytest.mark.parametrize(
    "name, words",
    [
        ("cli.py", "Python file, run as it is"),
        ("studies/run.py", "Python file with get_study()"),
    ],
)
def test_the_help_says_what_is_run(name, words):
    assert words in " ".join((PACKAGE / name).read_text().split())
