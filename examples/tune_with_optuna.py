"""Tune the inner step size with Optuna, which ends bad trials early; needs optuna.

Each trial is a run folder of its own.
"""

import tempfile
from pathlib import Path

import optuna

import metarl

FOLDER = Path(tempfile.mkdtemp(prefix="metarl-optuna-"))


def objective(trial):
    def report(iteration):
        trial.report(iteration.metrics["return_post"], iteration.number)
        if trial.should_prune():
            raise optuna.TrialPruned

    size = trial.suggest_float("step_size", 0.01, 1.0, log=True)
    config = metarl.resolve(
        None,
        "navigation-2d",
        overrides={"iterations": 4, "tasks": 5, "episodes": 5, "inner.step_sizes": (size,)},
    )
    meta_policy = metarl.train(config, FOLDER / str(trial.number), callbacks=[report])
    return metarl.evaluate(meta_policy, tasks=5, episodes=5, steps=1).curve.returns[1]


if __name__ == "__main__":
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    study.optimize(objective, n_trials=5)
    states = [trial.state.name for trial in study.trials]
    print(f"best step size {study.best_params['step_size']:.2g}; trials: {', '.join(states)}")
