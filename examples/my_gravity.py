"""A family whose tasks are keyword arguments: a new task makes a new environment."""

from metarl.envs import GymnasiumFamily, Uniform, check_task_family

gravity = GymnasiumFamily(
    name="gravity",
    env="Pendulum-v1",
    tasks=Uniform({"g": (5.0, 15.0)}, test={"g": (15.0, 20.0)}),  # tested on unseen values
    keywords=True,
    horizon=200,
)

if __name__ == "__main__":
    print(check_task_family(gravity) or "no faults found")
