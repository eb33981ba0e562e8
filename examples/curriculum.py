"""A curriculum: goals move away from the start as the policy improves; takes a few seconds.

Its state is in every checkpoint, so the resumed run equals an uninterrupted one bit for bit. From a
shell:

    metarl train navigation-2d --callback examples.curriculum:Curriculum
"""

import metarl


class Curriculum(metarl.Callback):
    """Goals within a part of their range, which grows while adaptation gains."""

    part = 0.2

    def tasks(self, rng, count, family):
        return self.part * family.tasks.sample(rng, count)

    def update(self, iteration):
        if iteration.metrics["gain"] > 0.0:
            self.part = min(1.1 * self.part, 1.0)

    def state(self):
        return {"part": self.part}

    def load_state(self, state):
        self.part = state["part"]


if __name__ == "__main__":
    for iterations in (3, 6):  # the second time it continues
        curriculum = Curriculum()
        config = metarl.resolve(
            "icml2017", "navigation-2d", overrides={"iterations": iterations, "tasks": 5}
        )
        metarl.train(config, "runs/example-curriculum", resume="auto", callbacks=[curriculum])
        print(f"after {iterations} iterations goals are within {curriculum.part:.0%} of the range")
