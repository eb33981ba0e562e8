"""The tables of an evaluation: the same figures in the terminal and in the report."""

from __future__ import annotations

from metarl.evaluation.tables import as_text, tables, task_table

EVALUATION = {
    "name": "mine",
    "algorithm": "maml-trpo",
    "role": "meta-learner",
    "seeds": [0, 3],
    "returns": [1.0, 2.25],
    "ci95": [[0.5, 1.5], [2.0, 2.5]],
    "iqm": [1.5, None],
    "iqm_ci95": [[1.0, 2.0], [None, None]],
    "step_sizes": [0.1, 0.05, 0.05],
    "components": ["goal"],
    "tasks": [[0.5], [1.0]],
    "cvar_fraction": 0.1,
    "worst_task": [0.5, -2.0],
    "cvar": [0.75, None],
    "per_task": [[1.0, 2.0], [1.0, None]],
    "achieved": {"goal": [[0.25, 0.5], [0.75, 1.0]]},
    "success": [0.0, 0.125],
    "gap_closed": [0.1, 0.5],
    "gap_closed_ci95": [[0.0, 0.2], [0.4, 0.6]],
    "references": {
        "oracle": {
            "algorithm": "oracle",
            "role": "oracle",
            "returns": [9.0],
            "ci95": [[None, None]],
            "step_sizes": [],
            "worst_task": [8.0],
            "cvar": [8.5],
            "gap_closed": [1.0],
            "gap_closed_ci95": [[1.0, 1.0]],
        }
    },
}


def test_tables_hold_every_figure_that_is_known():
    returns, several, success, gaps = tables(EVALUATION)
    assert returns.heads[0] == "return"
    assert len(returns.heads) == 6
    assert returns.rows == [
        ["mine", "1.0 ± 0.5", "2.2 ± 0.2", "-2.0", "nan", "0.1, 0.05"],
        ["oracle", "9.0", "", "8.0", "8.5", "none"],
    ]
    assert several.rows == [["mine, seeds 0, 3", "1.5 ± 0.5", "nan"]]
    assert success.rows == [["mine", "0.0", "12.5"]]
    assert gaps.rows == [["mine", "0.10 ± 0.10", "0.50 ± 0.10"]]  # an oracle's is 1 by definition


def test_text_tables_are_aligned():
    lines = as_text(tables(EVALUATION)).splitlines()
    head = tables(EVALUATION)[0].heads[2]
    assert len({line.index(head) for line in lines if head in line}) == 1
    assert lines[2].split() == ["oracle", "9.0", "8.0", "8.5", "none"]
    assert all(line == line.rstrip() for line in lines)


def test_the_table_by_task_says_what_was_achieved():
    table = task_table(EVALUATION)
    assert table.heads == [
        "goal", "return 0", "return 1", "goal achieved 0", "goal achieved 1",
    ]  # fmt: skip
    assert table.rows == [
        ["0.50", "1.0", "2.0", "0.25", "0.50"],
        ["1.00", "1.0", "nan", "0.75", "1.00"],
    ]
    lines = as_text([table]).splitlines()
    assert len({len(line) for line in lines}) == 1  # figures end where their heads do
