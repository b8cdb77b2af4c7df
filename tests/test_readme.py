"""The README and its pages are right: commands exist and parse, code runs, links lead on, the tree is the tree."""

import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {path: path.read_text(encoding="utf-8") for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
ON_A_GPU = ROOT / "benchmarks" / "GPU.md"
LINKED = {**PAGES, ON_A_GPU: ON_A_GPU.read_text(encoding="utf-8")}


def blocks(language: str, text: str = "\n".join(PAGES.values())) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command in a ``bash`` block, and each in running text, without comments; those for a GPU too."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:make|cpt|python benchmarks/\w+\.py) [^`]+)`", "\n".join(LINKED.values()))
    found = [shlex.join(shlex.split(line, comments=True)) for line in [*lines, *inline]]
    return sorted({command for command in found if command and "|" not in command and "..." not in command})


BATCH_SCRIPT = "sbatch configs/slurm/preemptible.sbatch "
"""Hands its arguments on to ``cpt fit``."""


def test_every_form_of_command_is_checked_below():
    """A new kind of command needs a test here first."""
    known = ("make ", "cpt ", "python benchmarks/", "pip install -e '.[", BATCH_SCRIPT, "torchrun ")
    unknown = [command for command in commands() if not command.startswith(known)]
    assert unknown == []
    assert any(command.startswith("cpt fit") for command in commands())


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make ")])
def test_make_targets_exist(command):
    """``make --dry-run`` fails on a target without a rule."""
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_two_commands_come_first_and_ci_runs_the_test_command():
    assert re.findall(r"^make \w+", blocks("bash", PAGES[README])[0], flags=re.MULTILINE) == ["make demo", "make test"]
    assert re.search(r"^make test", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)


def test_benchmarks_that_are_named_exist_with_their_options():
    for command in commands():
        if command.startswith("python benchmarks/"):
            script, *arguments = shlex.split(command)[1:]
            sources = [(ROOT / script).read_text(), (ROOT / "benchmarks" / "workload.py").read_text()]
            assert all(f'"{name}"' in "".join(sources) for name in arguments if name.startswith("--"))


STARTED = [command.replace(BATCH_SCRIPT, "cpt fit ") for command in commands()]
CPT = [re.sub(r"^torchrun .* -m cpt_lightning ", "cpt ", command) for command in STARTED]


@pytest.mark.parametrize("command", [command for command in CPT if command.startswith("cpt ")])
def test_cli_commands_parse(command, monkeypatch, capsys):
    """``--print_config`` parses everything, prints and stops; ``--help`` stops by itself."""
    from cpt_lightning.cli import main

    monkeypatch.chdir(ROOT)
    args = shlex.split(command)[1:]
    if args[0] in ("export", "report", "study"):  # have no configuration of their own
        with pytest.raises(SystemExit):
            main([args[0], "--help"])
        text = capsys.readouterr().out
        assert all(arg in text for arg in args if arg.startswith("--"))
        assert all((ROOT / arg).exists() for arg in args if arg.startswith("configs/"))
        return
    if not any(arg.startswith("--") and arg.endswith("help") for arg in args) and "--print_config" not in args:
        args.append("--print_config")
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code in (0, None), capsys.readouterr().err
    assert capsys.readouterr().out


def test_options_exist_that_are_named_beside_those_of_other_trainers(monkeypatch, capsys):
    from cpt_lightning.cli import main
    from cpt_lightning.cli.misspelt import ELSEWHERE

    section = (
        PAGES[ROOT / "docs" / "extending.md"].split("## Options by the names that others have")[1].split("\n## ")[0]
    )
    named = re.findall(r"`((?:model|data|trainer)\.[a-z_.]+)`", section)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["fit", "-c", "configs/demo/grpo.yaml", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    config["model"] = config["model"]["init_args"]
    assert len(named) > 20
    for name in named:
        options = config
        for part in name.split("."):
            assert part in options, name
            options = options[part]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("| `")]
    quoted = re.compile(r"`([a-z_0-9.]+)`")
    ours = {name: tuple(quoted.findall(cell)) for names, cell in rows for name in quoted.findall(names)}
    known = ELSEWHERE.keys() & ours.keys()
    assert len(known) > 25 and all(ELSEWHERE[name].startswith(ours[name]) for name in known)


def test_extras_that_are_installed_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"pip install [^\n`]*\[(.*?)\]", "\n".join(PAGES.values()) + (ROOT / "Makefile").read_text())
    assert extras
    assert {extra for each in extras for extra in each.split(",")} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n", 1)[0].lstrip("# ")[:40])
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "readme"})


def test_yaml_examples_are_overlays_that_parse(tmp_path, monkeypatch, capsys):
    """Each starts with the command that uses it: it is written where that command looks, then the command is parsed."""
    from cpt_lightning.cli import main

    examples = blocks("yaml")
    assert examples
    for text in examples:
        command = re.match(r"# (cpt .*-c (\S+))\n", text)
        assert command, f"the first line of a YAML example is its command: {text[:80]!r}"
        overlay = tmp_path / Path(command[2]).name
        overlay.write_text(text, encoding="utf-8")
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as stop:
            main([*shlex.split(command[1].replace(command[2], str(overlay)))[1:], "--print_config"])
        assert stop.value.code in (0, None), capsys.readouterr().err


def test_the_tree_names_what_exists_and_every_folder_of_the_package():
    (tree,) = [block for block in blocks("text", PAGES[README]) if block.startswith("cpt_lightning/\n")]
    folders, named, missing = [ROOT / "cpt_lightning"], set(), []
    for line in tree.splitlines()[1:]:
        indent, entries = re.match(r"( *)(.*?)(?:  +.*)?$", line).groups()
        depth = len(indent) // 2
        for entry in entries.split(" "):
            path = folders[depth - 1] / entry if depth else ROOT / entry
            missing += [] if path.exists() else [str(path.relative_to(ROOT))]
            if entry.endswith("/"):
                folders[depth:] = [path]
                named.add(path)
    assert missing == []
    packages = {path.parent for path in (ROOT / "cpt_lightning").glob("*/__init__.py")}
    assert packages <= named, "folders that the tree leaves out"


def anchors(page: Path) -> set[str]:
    """What links may lead to within a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    missing = []
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", LINKED[page]):
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (heading and heading not in anchors(path)):
            missing.append(target)
    assert missing == []


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / name).resolve() for name in re.findall(r"\]\((docs/[^)#]+\.md)", PAGES[README])}
    assert set(PAGES) - {README} == linked


def test_modules_named_in_the_text_exist():
    names = {name for text in PAGES.values() for name in re.findall(r"`(cpt_lightning(?:\.[a-z_]+)+)`", text)}
    assert [name for name in sorted(names) if importlib.util.find_spec(name) is None] == []
