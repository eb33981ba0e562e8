"""A family over a Gymnasium id: a function puts the task into the environment at every reset."""

from metarl.envs import GymnasiumFamily, Uniform, check_task_family


def set_task(env, task):
    env.g, env.m = task


pendulum = GymnasiumFamily(
    name="pendulum",
    env="Pendulum-v1",
    tasks=Uniform({"gravity": (5.0, 15.0), "mass": (0.5, 1.5)}),
    set_task=set_task,
    horizon=200,
)

if __name__ == "__main__":
    print(check_task_family(pendulum) or "no faults found")
