"""Who may import whom, read from the source, and what `import bert_fast` must not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bert_fast"
KERNELS = PACKAGE.parent / "kernels"

LIGHT = {"activation", "checks", "config", "outputs", "ragged", "inputs"}
#: What each room may import of bert_fast at all; every file must belong to one.
ALLOWED = {
    "activation": set(),
    "checks": set(),
    "folders": set(),
    "lines": set(),
    "disk": set(),
    "config": {"activation", "folders"},
    "outputs": set(),
    "sharding": set(),
    "ragged": set(),
    "inputs": {"checks", "config", "ragged"},
    "heads": LIGHT,
    "sentence_embedding": LIGHT | {"heads"},
    "reference": LIGHT | {"heads", "sentence_embedding"},
    "ops": {"kernels", "_C", "ops", "checks"},
    "encoder": LIGHT | {"ops", "sharding"},
    "engine": LIGHT | {"encoder", "engine", "kernels", "ops", "sharding", "_C"},
    "masked_lm": LIGHT | {"encoder", "engine", "heads", "ops"},
    "modules": LIGHT
    | {"encoder", "engine", "masked_lm"}
    | {"heads", "reference", "ops", "loading", "sentence_embedding", "sharding"},
    "electra": LIGHT | {"encoder", "engine", "masked_lm", "modules"} | {"heads", "reference", "folders", "loading"},
    "drop_in": LIGHT | {"encoder", "engine", "heads", "masked_lm", "modules", "ops"},
}
#: These may import everything above them, and of each other what stands here.
LATE = {
    "data": set(), "vocabulary": set(), "tasks": {"data", "training"}, "training": {"data"},
    "recipes": {"data", "tasks", "training", "vocabulary"},
}  # fmt: skip
ABOVE = {
    "__init__", "loading", "ladder", "tokenization", "batching", "transfer", "embedder", "bulk", "verify", "timing",
    "benchmarking", "info", "doctor", "demo", "tuning", "cli", "sentence_folder", *LATE,
}  # fmt: skip
#: Imported only inside functions, by whoever imports them.
LAZY = {
    "kernels", "_C", "loading", "transformers", "triton", "sentence_transformers", "matplotlib", "pyarrow", "sklearn",
    "scipy", "optuna",
}  # fmt: skip
#: But for these: classes of a library that ours extend. Who imports them needs the library.
EXTENDS = {
    "transformers": {f"training/{name}.py" for name in ("arguments", "batched", "durable", "progress", "trainer")}
}


def imports(path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "bert_fast":
                yield from ((f"bert_fast.{alias.name}", id(node) in top) for alias in node.names)
            else:
                yield node.module, id(node) in top


def room(module):
    return module.split(".")[1]


def sources():
    return [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms(path):
    home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert home in ALLOWED or home in ABOVE, f"{home} belongs to no room"
    for module, top_level in imports(path):
        library = module.split(".")[0]
        if library in LAZY and path.relative_to(PACKAGE).as_posix() not in EXTENDS.get(library, ()):
            assert not top_level, f"{path.name} imports {module} at its top"
        if library != "bert_fast" or module == "bert_fast":
            continue
        if room(module) in LAZY and home in ALLOWED:
            assert not top_level, f"{path.name} imports {module} at its top"
        if home in ALLOWED:
            assert room(module) in ALLOWED[home], f"{home} may not import {module}"
        if room(module) in LATE and home != "cli":
            assert home == room(module) or room(module) in LATE.get(home, ()), f"{home} may not import {module}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_only_torch_and_triton(path):
    allowed = {"torch", "triton", "bert_fast", *sys.stdlib_module_names}
    for module, _ in imports(path):
        assert module.split(".")[0] in allowed, module
        assert not module.startswith("bert_fast") or module.startswith("bert_fast.kernels"), module


def test_only_bindings_includes_torch():
    csrc = PACKAGE.parent / "csrc"
    for path in [*csrc.rglob("*.h"), *csrc.rglob("*.cpp")]:
        text = path.read_text()
        if path.parent.name != "bindings":
            assert "<torch/" not in text, path
            assert "<ATen/" not in text, path
            assert "pybind11" not in text, path


def test_kernels_folder_is_a_namespace():
    """With an `__init__.py` it would shadow the PyPI package of that name, which transformers imports."""
    assert not (KERNELS / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()


def test_import_is_light():
    """`import bert_fast` and building a model need none of these, and do not load torch before it is used."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        libraries = ("triton", "transformers", "sentence_transformers", "matplotlib")
        if name.split(".")[0] in libraries or name == "bert_fast._C":
            raise ImportError(f"{name} is refused by the test")
sys.meta_path.insert(0, Refuse())
import bert_fast
assert "torch" not in sys.modules, "import bert_fast loads torch"
import warnings
warnings.simplefilter("ignore")
import torch
from bert_fast.modules import BertModel
model = BertModel(bert_fast.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                       intermediate_size=8))
print(tuple(model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 8)"


def test_a_fork_does_not_load_torch():
    program = """
import bert_fast, os, sys
pid = os.fork()
if pid == 0:
    os._exit("torch" in sys.modules)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
