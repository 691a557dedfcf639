from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from tests.support.sources import FILES, parsed

from hypha.errors import REFUSALS, Refused, retry_of
from hypha.executor.bridge.client import export_waits, update_waits


def codes_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each code with which a refusal is made there."""
    makers = {"Refused": 0, "RefusedReply": 0, "Decline": 1, "RenewalRefused": 0, "retry_of": 0}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        at = makers.get(node.func.id)
        if at is None:
            continue
        named = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
        for code in [*node.args[at : at + 1], *named]:
            found = [code.body, code.orelse] if isinstance(code, ast.IfExp) else [code]
            yield from (
                (node.lineno, one.value)
                for one in found
                if isinstance(one, ast.Constant) and isinstance(one.value, str)
            )


def test_every_refusal_has_a_code_of_the_table() -> None:
    found = [(path, line, code) for path in FILES for line, code in codes_in(parsed(path))]
    assert len(found) > 100
    assert [one for one in found if one[2] not in REFUSALS] == []


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_passes_by_itself_or_is_final_or_waits_for_a_change(code: str) -> None:
    refused = Refused(code, "a reason")
    assert refused.retryable == (code in ("busy", "internal", "unreachable"))
    assert refused.final == (retry_of(code) == "never")
    assert not (refused.retryable and refused.final)
    assert not REFUSALS[code].meaning.endswith(".")


def test_a_code_of_a_later_version_is_neither_repeated_nor_final() -> None:
    refused = Refused("overloaded-in-2031", "a reason")
    assert not refused.retryable
    assert not refused.final


@pytest.mark.parametrize("code", ["busy", "internal", "unreachable", "no-space"])
def test_what_an_executor_has_made_waits_for_a_receiver_that_will_take_it(code: str) -> None:
    assert update_waits(Refused(code, "a reason"))
    assert export_waits(Refused(code, "a reason"))
    assert not update_waits(Refused("invalid", "a reason"))
    assert not export_waits(Refused("invalid", "a reason"))
