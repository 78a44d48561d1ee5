"""The listing shows the architecture: few entries at the top, each class name once, files that fit in the head."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("app", "model") for path in (ROOT / folder).rglob("*.py"))
TOP = {
    "app": {"api", "cli", "engine", "errors", "operations", "settings", "telemetry"},
    "model": {"checkpoint", "data", "device", "diffusion", "evaluation", "output", "images", "network", "training"},
}


@pytest.mark.parametrize("package", TOP)
def test_entries_at_the_top(package):
    entries = {path.stem for path in (ROOT / package).iterdir() if not path.name.startswith("__")}
    assert entries == TOP[package]
    assert len(entries) <= 9


def test_each_class_name_stands_once():
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_files_are_short():
    assert not [str(path) for path in SOURCES if len(path.read_text().splitlines()) > 320]
