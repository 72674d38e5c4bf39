"""What no source may contain, and what importing a module must not import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import ROOT

BANNED_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_NAMES = {  # attributes and imported names, wherever they come from
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list", "allow_pickle", "read_pickle", "to_pickle", "Pickler", "Unpickler",
}  # fmt: skip
TORCH_SERIALIZERS = {"load", "save", "serialization", "hub"}
SOURCES = sorted([*(ROOT / "infer").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "setup.py"])
NO_TORCH = [
    "infer",
    "infer.request",
    "infer.outputs",
    "infer.config",
    "infer.launch",
    "infer.hub",
    "infer.jsonl",
    "infer.journal",
    "infer.run_batch",
    "infer.models",
    "infer.models.config",
    "infer.models.source",
    "infer.models.__main__",
    "infer.parallel.topology",
    "infer.cache.blocks",
    "infer.bench.__main__",
    "infer.serve.timeline",
    "infer.engine.batch",
    "infer.engine.scheduler",
    "infer.serve.frontend",
    "infer.serve.link",
    "infer.serve.text",
]


def findings(source):
    """What a source does that it must not, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [(node.lineno, n.name) for n in names if n.name.split(".")[0] in BANNED_MODULES]
            case ast.ImportFrom(module=module, names=names):
                root = (module or "").split(".")[0]
                if root in BANNED_MODULES:
                    found.append((node.lineno, module))
                found += [(node.lineno, n.name) for n in names if n.name in BANNED_NAMES]
                found += [
                    (node.lineno, f"torch.{n.name}") for n in names if module == "torch" and n.name in TORCH_SERIALIZERS
                ]
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr in TORCH_SERIALIZERS:
                found.append((node.lineno, f"torch.{attr}"))
            case ast.Attribute(attr=attr) if attr in BANNED_NAMES:
                found.append((node.lineno, attr))
            case ast.keyword(arg=arg, value=value) if arg in BANNED_NAMES:
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append((value.lineno, arg))
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"), args=args
            ):
                names = [a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found += [(node.lineno, name) for name in names if name.split(".")[0] in BANNED_MODULES]
    return found


def imported_modules(source):
    """Root names of what a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    import cPickle as p",
        "from pickle import loads",
        "import dill.source",
        "from torch.distributed import all_gather_object",
        "dist.broadcast_object_list(x)",
        "torch.load(path)",
        "torch.save(x, path)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "import_module('pickle')",
        "__import__('shelve')",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert findings(source)


def test_the_search_finds_nothing_else():
    assert not findings(
        "import json\nfrom safetensors.torch import load_file\nx.load()\nnp.load(p, allow_pickle=False)"
    )


def test_there_are_sources():
    assert len(SOURCES) > 30 and ROOT / "infer" / "llm.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles(path: Path):
    assert findings(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_uses_transformers(path: Path):
    assert not imported_modules(path.read_text()) & {"transformers", "vllm", "pytest"}


def test_what_imports_no_torch():
    """In one process, cumulatively: the first module that brings torch in is named."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *NO_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
