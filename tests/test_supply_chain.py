"""What we depend on: locked with digests, under known licences, listed; and what our code never does."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import replace

import pytest

from cli.licences import ALLOWED, refusals
from cli.packages import Package, locked_packages
from cli.sbom import NAME, bill
from safety.pair import CONCEPTS, OPINION
from tests.paths import PROJECT
from tests.test_build import PINS

TRACKED = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
CODE = {name: ast.parse((PROJECT / name).read_text()) for name in TRACKED if name.endswith(".py")}
OURS = [name for name in CODE if not name.startswith("tests/")]
PACKAGES = locked_packages()

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "imp"}
UNSAFE_CALLS = {
    "torch.load", "torch.hub.load", "os.system", "os.popen", "eval", "exec", "compile", "__import__", "yaml.load",
    "yaml.unsafe_load", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp",
    "shutil.unpack_archive",
}  # fmt: skip
UNSAFE_METHODS = {"extractall", "extract"}
UNSAFE_ARGUMENTS = {"trust_remote_code", "shell", "allow_pickle", "use_auth_token"}


def imported(tree: ast.Module) -> set[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def calls(tree: ast.Module) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_unpickled_evaluated_extracted_or_given_to_a_shell(name: str) -> None:
    tree = CODE[name]
    assert imported(tree) & UNSAFE_MODULES == set()
    for call in calls(tree):
        called = ast.unparse(call.func)
        assert called not in UNSAFE_CALLS, f"line {call.lineno}"
        assert called.rpartition(".")[2] not in UNSAFE_METHODS, f"line {call.lineno}"
        on = [word.arg for word in call.keywords if ast.unparse(word.value) not in ("False", "None")]
        assert UNSAFE_ARGUMENTS & set(on) == set(), f"line {call.lineno}"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "torch.load(x)",
        "t.extractall()",
        "run(x, shell=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODE, "made up", ast.parse(text))
    with pytest.raises(AssertionError):
        test_nothing_is_unpickled_evaluated_extracted_or_given_to_a_shell("made up")


# Packages


def test_every_package_is_locked_with_digests() -> None:
    assert len(PACKAGES) > 80
    assert [package.name for package in PACKAGES if not package.sha256] == []
    assert {package.name for package in PACKAGES} >= set(PINS) - {"triton"}


def test_the_image_has_what_its_requirements_need_and_no_tool() -> None:
    runtime = {package.name for package in PACKAGES if package.runtime}
    assert runtime >= {"torch", "diffusers", "prometheus-client", "nvidia-cublas", "certifi"}
    assert runtime & {"pytest", "mypy", "ruff", "hypothesis", "cog"} == set()


def test_no_licence_is_copyleft_or_unknown() -> None:
    assert refusals(PACKAGES) == []
    assert set(ALLOWED) <= {package.name for package in PACKAGES}


@pytest.mark.parametrize(
    "licence",
    [
        "GPL-3.0-only", "AGPL-3.0", "GNU Lesser General Public License v3 (LGPLv3)", "MIT AND GPL-2.0-or-later",
        "MPL-2.0", "GNU Affero General Public License v3", "SSPL-1.0", "CC-BY-NC-4.0", "EUPL-1.2", "", None,
    ],
)  # fmt: skip
def test_a_copyleft_or_unknown_licence_is_refused(licence: str | None) -> None:
    assert refusals([replace(PACKAGES[0], name="made-up", licence=licence)])


@pytest.mark.parametrize("licence", ["MIT", "Apache-2.0", "BSD-3-Clause", "PSF-2.0", "MIT-CMU", "ISC License (ISCL)"])
def test_other_licences_are_not(licence: str) -> None:
    assert refusals([replace(PACKAGES[0], name="made-up", licence=licence)]) == []


# The bill of materials


def test_the_bill_lists_every_package_once_and_is_reproducible() -> None:
    first, second = bill(PACKAGES, (CONCEPTS, OPINION)), bill(locked_packages(), (CONCEPTS, OPINION))
    assert first == second
    libraries = [part for part in first["components"] if part["type"] == "library"]
    assert [part["name"] for part in libraries] == [package.name for package in PACKAGES]
    assert all(part["externalReferences"][0]["hashes"] and part["licenses"] for part in libraries)
    models = [part for part in first["components"] if part["type"] == "machine-learning-model"]
    assert [part["hashes"][0]["content"] for part in models] == [CONCEPTS.sha256, OPINION.sha256]


def test_everything_in_the_image_is_reached_from_its_requirements() -> None:
    document = bill(PACKAGES, ())
    needs = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    reached, waiting = set(), [NAME]
    while waiting:
        reference = waiting.pop()
        if reference not in reached:
            reached.add(reference)
            waiting += needs[reference]
    required = {part["bom-ref"] for part in document["components"] if part["scope"] == "required"}
    assert reached - {NAME} == required


def test_a_marker_of_another_platform_leaves_a_package_out() -> None:
    names = {package.name for package in PACKAGES}
    assert not names & {"colorama", "pywin32"}
    assert isinstance(PACKAGES[0], Package)
