"""Progress bar over the iterations of a run, in a terminal or a notebook."""

from __future__ import annotations

from typing import Any


class ProgressBar:
    """Progress bar, created at the first iteration. It is a `display` of `metarl.train`."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name.replace(":", "-"), total
        self._bar: Any = None

    @property
    def shown(self) -> bool:
        """Whether an iteration was shown."""
        return self._bar is not None

    def __call__(self, row: dict[str, Any]) -> None:
        """Show an iteration's metrics."""
        if self._bar is None:
            from tqdm.auto import tqdm

            first = row["iteration"] - 1
            self._bar = tqdm(
                total=self._total, initial=first, unit="it", desc=self._name, smoothing=0.1
            )
        if "returns" in row:
            returns = [f"{r:.1f}" if r is not None else "none" for r in row["returns"]]
            self._bar.set_postfix_str(f"return {' -> '.join(returns)}", False)
        else:
            self._bar.set_postfix_str(
                f"loss {row['loss_pre']:.3g} -> {row['loss_post']:.3g}", False
            )
        if "skipped" in row:
            self._bar.write(f"iteration {row['iteration']}: update skipped, {row['skipped']}")
        self._bar.update()

    def close(self) -> None:
        """Leave the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
